"""What a method is: a module that turns pictures and a mask into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn

from trainers.config.run import Recipe
from trainers.models.encoder import Encoder
from trainers.types import MethodOutput


class Method(nn.Module, ABC):
    """One objective around one encoder. The engine alone calls backward and step.

    Args:
        recipe: the checked recipe; a method reads `encoder`, `method` and `data` of it.

    Attributes:
        encoder: the backbone that outlives the method.
    """

    encoder: Encoder

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Compute the loss of a batch.

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator when left out.
        """

    @staticmethod
    @abstractmethod
    def draw_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
        """The mask of one sample, a pure function of its generator; runs in the loader."""

    @abstractmethod
    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput
    ) -> Float[Tensor, "B C H W"]:
        """The prediction as normalised pictures, hidden and visible patches alike."""
