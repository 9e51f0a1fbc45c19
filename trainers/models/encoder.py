"""What every backbone can do, whatever it is built of.

Methods hand it a mask during pre-training; everything downstream hands it whole pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import cast

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimray.trainers.types import Features


class Encoder(nn.Module, ABC):
    """A backbone that outlives its method.

    Attributes:
        width: width D of the output tokens.
        depth: number of layers that `features` can be asked for.
        stride: pixels between neighbouring output tokens; a vit's patch size.
        in_chans: channels of the input.
        image_size: (height, width) it was built for; other multiples of the stride work too.
        strides: stride in pixels of each layer's feature map.
        widths: channels of each layer's feature map.
        activation_checkpointing: compute activations again in the backward pass.
    """

    width: int
    depth: int
    stride: int
    in_chans: int
    image_size: tuple[int, int]
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    activation_checkpointing: bool = False

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
            mask: over the output grid, True = hidden. None encodes whole pictures.
            mask_token: of the width of the first layer, stands in for every hidden patch after
                the patch embedding. Without one, hidden patches are left out of the computation
                altogether, and every row must hide the same number.
            norm: apply the final norm to the tokens.

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
            layers: which layers, in the order wanted.
            norm: apply the final norm to each map of the final width.

        Returns:
            Maps [B, widths[layer], H / strides[layer], W / strides[layer]].
        """

    def forward_intermediates(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Features, tuple[Float[Tensor, "B _ _ _"], ...]]:
        """What `forward` and `features` give; encoders that can give both in one pass.

        Args:
            images: normalised pictures.
            layers: as of `features`; may be empty.
            norm: as of `features`; the tokens are always normed.
        """
        return self(images), self.features(images, layers, norm) if layers else ()

    @property
    @abstractmethod
    def last_decay_layer(self) -> int:
        """Layer, as `decay_layer` counts, of what lies behind all blocks, the head included."""

    @abstractmethod
    def decay_layer(self, name: str) -> int:
        """The layer of a parameter for layer-wise decay of the learning rate.

        Counted from 0, the patch embedding, to `last_decay_layer`, finer than the layers of
        `features` where these are stages.

        Args:
            name: of a parameter of this encoder.
        """

    def _wanted(self, layers: Sequence[int]) -> list[int]:
        """Layers counted from 0; refuses those that do not exist."""
        wanted = [layer + self.depth if layer < 0 else layer for layer in layers]
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise ValueError(f"layers {tuple(layers)} must lie in 0..{self.depth - 1}")
        return wanted

    def _grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Output tokens down and across for pictures of (height, width)."""
        height, width = size
        s = self.stride
        if height % s or width % s or not height or not width:
            raise ValueError(f"input of {height}x{width} pixels is not a multiple of patch {s}")
        return height // s, width // s

    def _cast(self, images: Tensor) -> Tensor:
        """Pictures in the precision of the weights; methods keep their targets in fp32."""
        weights = chain(self.parameters(), self.buffers())  # an average's are buffers
        return images.to(next(w.dtype for w in weights if w.is_floating_point()))

    def _run(self, block: nn.Module, *inputs: object) -> Tensor:
        """Call a block, trading memory for time where asked to."""
        if self.activation_checkpointing and self.training:
            return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False))
        return cast(Tensor, block(*inputs))
