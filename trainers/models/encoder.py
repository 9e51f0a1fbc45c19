"""What every backbone can do, whatever it is built of.

Methods hand it a mask during pre-training; everything downstream hands it whole pictures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainers.types import Features


class Encoder(nn.Module, ABC):
    """A backbone that outlives its method.

    Attributes:
        width: token width D.
        depth: number of layers that `features` can be asked for.
        patch_size: side of a patch in pixels.
        in_chans: channels of the input.
        image_size: (height, width) it was built for; other multiples of the patch work too.
        strides: stride in pixels of each layer's feature map.
    """

    width: int
    depth: int
    patch_size: int
    in_chans: int
    image_size: tuple[int, int]
    strides: tuple[int, ...]

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> Features:
        """Encode pictures.

        Args:
            images: normalised pictures, H and W multiples of the patch size.
            mask: True = hidden; every row must hide the same number. Hidden patches are left
                out of the computation altogether. None encodes whole pictures.

        Returns:
            Tokens after the final norm, their mean, and the grid.
        """

    @abstractmethod
    def features(
        self, images: Float[Tensor, "B C H W"], layers: Sequence[int], norm: bool = True
    ) -> tuple[Float[Tensor, "B D h w"], ...]:
        """Feature maps after the given layers (counted from 0; negative from the end).

        Args:
            images: normalised pictures.
            layers: which layers, in the order wanted.
            norm: apply the final norm to each.
        """
