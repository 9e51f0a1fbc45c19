"""The protocol of all encoders.

Methods pass a mask during pre-training; everything downstream passes whole pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain

from jaxtyping import Bool, Float
from torch import Tensor

from mimray.trainers.models.blocks import BlockRunner
from mimray.trainers.types import Features


class Encoder(BlockRunner, ABC):
    """A backbone, trained by a method and exported without it.

    Attributes:
        width: width D of the output tokens.
        depth: number of layers that have feature maps.
        stride: pixels between neighbouring output tokens; a vit's patch size.
        in_chans: channels of the input.
        image_size: (height, width) it was built for, pixels; other multiples of the stride work.
        strides: stride in pixels of each layer's feature map.
        widths: channels of each layer's feature map.
    """

    width: int
    depth: int
    stride: int
    in_chans: int
    image_size: tuple[int, int]
    strides: tuple[int, ...]
    widths: tuple[int, ...]

    @abstractmethod
    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        mask_token: Float[Tensor, "1 1 D"] | None = None,
        norm: bool = True,
    ) -> Features:
        """Encode pictures.

        Args:
            images: normalised pictures, H and W multiples of the stride.
            mask: a mask over the output grid, True = hidden; None encodes whole pictures.
            mask_token: a token of width `embed_width` that replaces every hidden patch after the
                patch embedding. Without one, hidden patches are left out of the computation, and
                every row must hide the same number.
            norm: True to apply the final norm to the tokens.

        Returns:
            Tokens after the last layer, their mean, and the grid.
        """

    @property
    @abstractmethod
    def embed_width(self) -> int:
        """Width of the patch embedding, and so of a mask token."""

    @abstractmethod
    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B _ _ _"], ...]:
        """Feature maps after the given layers (counted from 0; negative from the end).

        Args:
            images: normalised pictures.
            layers: indices of the layers, in the order of the result.
            norm: True to apply the final norm to each map of the final width.

        Returns:
            Maps, float [B, widths[layer], H / strides[layer], W / strides[layer]].
        """

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Features, tuple[Float[Tensor, "B _ _ _"], ...]]:
        """The results of `forward` and `features`; in one pass where an encoder can.

        Args:
            images: normalised pictures.
            layers: layers as for `features`; may be empty.
            norm: norm of the maps as for `features`; the tokens are always normalised.
        """
        return self(images), self.features(images, layers, norm) if layers else ()

    @property
    @abstractmethod
    def last_decay_layer(self) -> int:
        """The `decay_layer` of all parameters behind the blocks, the head included."""

    @abstractmethod
    def decay_layer(self, name: str) -> int:
        """The layer of a parameter for layer-wise decay of the learning rate.

        Counted from 0, the patch embedding, to `last_decay_layer`; finer than the layers of
        `features` if these are stages.

        Args:
            name: the name of a parameter of this encoder.
        """

    def _wanted(self, layers: Sequence[int]) -> list[int]:
        """Layers counted from 0; raises ValueError for one that does not exist."""
        wanted = [layer + self.depth if layer < 0 else layer for layer in layers]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"layers {tuple(layers)} must lie in 0..{self.depth - 1}")
        return wanted

    def _grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of output tokens for pictures of (height, width) in pixels."""
        height, width = size
        s = self.stride
        if height % s or width % s or not height or not width:
            raise ValueError(f"input of {height}x{width} pixels is not a multiple of patch {s}")
        return height // s, width // s

    def _cast(self, images: Tensor) -> Tensor:
        """Cast pictures to the weights' precision; methods keep their targets in fp32."""
        weights = chain(self.parameters(), self.buffers())  # a moving average has buffers only
        return images.to(next(w.dtype for w in weights if w.is_floating_point()))
