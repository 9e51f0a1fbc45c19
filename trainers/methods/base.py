"""What a method is: a module that turns pictures and a mask into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.run import Recipe
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.models.normalise import denormalise
from mimray.trainers.models.patches import unpatchify
from mimray.trainers.pictures import hide_patches, paste_visible
from mimray.trainers.types import MethodOutput, Panel


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
    def draw_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N] | None:
        """The mask of one sample, a pure function of its generator; runs in the loader.

        None where the method hides nothing.
        """
        return None

    def at_step(self, step: int, num_steps: int) -> None:
        """Told before each update, on every rank; for what changes over a run.

        Args:
            step: updates made so far.
            num_steps: of the whole run.
        """

    def after_step(self, step: int) -> dict[str, float]:
        """Called after each update, on every rank; may be collective.

        For state that is not learnt by gradient. Counts what the micro batches of all ranks
        brought since the last call.

        Args:
            step: updates made, this one included.

        Returns:
            Figures for the row of metrics, the same on every rank.
        """
        return {}

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """The prediction as normalised pictures, hidden and visible patches alike.

        Here: predictions that are pixels. A method whose predictions are something else says how
        they become pixels, or draws its `panels` itself.

        Args:
            images: what was encoded.
            output: of `forward` on them.
            oracle: where targets were normalised by a hidden patch's own statistics, use those,
                which leaks the answer; elsewhere it changes nothing.
        """
        stride = self.encoder.stride
        grid = images.shape[2] // stride, images.shape[3] // stride
        return unpatchify(output.prediction.float(), stride, grid)

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """The pictures people look at, column by column.

        Args:
            images: what was encoded.
            output: of `forward` on them.
            oracle: as for `reconstruct`; the headings say so.
        """
        original = self.pixels(images)
        drawn = self.pixels(self.reconstruct(images, output, oracle=oracle))
        suffix = " (oracle)" if oracle else ""
        mask = output.mask.cpu().numpy()
        if mask.all():
            return [Panel("original", original), Panel("reconstruction" + suffix, drawn)]
        stride = self.encoder.stride
        return [
            Panel("original", original),
            Panel("masked", hide_patches(original, mask, stride)),
            Panel("reconstruction" + suffix, paste_visible(drawn, original, mask, stride)),
            Panel("prediction alone" + suffix, drawn),
        ]

    def pixels(self, images: Float[Tensor, "B C H W"]) -> np.ndarray:
        """Normalised pictures as uint8 [B, H, W, C] on the host."""
        data = self.recipe.data
        return denormalise(images, data.mean, data.std).permute(0, 2, 3, 1).cpu().numpy()

    def draw_masks(self, images: Float[Tensor, "B C H W"]) -> Bool[Tensor, "B N"]:
        """A mask for each picture, from torch's generator."""
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        masks = [self.draw_mask(self.recipe, rng) for _ in range(images.shape[0])]
        return torch.from_numpy(np.stack([m for m in masks if m is not None])).to(images.device)
