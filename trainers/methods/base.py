"""What a method is: a module that turns pictures and a mask into a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Masks, training_view
from mimray.trainers.methods.needs import Need
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.models.normalise import denormalise
from mimray.trainers.models.patches import unpatchify
from mimray.trainers.pictures import hide_patches, paste_visible
from mimray.trainers.types import MethodOutput, Panel

# Modules that turn the last tokens or maps into predictions, by their names in a method.
HEADS = ("head", "decoder.pred", "decoder.to_pixels")


class Method(nn.Module, ABC):
    """One objective around one encoder. The engine alone calls backward and step.

    A method declares what the rest of the house has to know: its inputs (`views`), what it needs
    from elsewhere (`needs`), which modules follow others (`averages`), and which is the result.
    Every parameter is trained; or fixed (`requires_grad` False) and exported with its value at the
    start; or lies in `averages`. State that is learnt in another way lives in buffers.

    Args:
        recipe: the checked recipe; a method reads `encoder`, `method` and `data` of it.

    Attributes:
        encoder: the backbone that is trained.
        averages: modules that follow others, such as a teacher; None for none.
        result: name of the module that outlives the method, an encoder: `encoder`, or the average
            of one, `averages.encoder`.
        within: marks what is computed as of one of the `parts`, where costs are counted.
    """

    result: ClassVar[str] = "encoder"

    encoder: Encoder
    averages: MovingAverages | None
    within: Callable[[str], AbstractContextManager[None]]

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.averages = None
        self.within = _unmarked

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Compute the loss of a batch. The arguments are the inputs that `views` declares.

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator when left out.
        """

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """The inputs of a picture, by the names of `forward`'s arguments.

        Here: one view as the recipe's `data` describes it, and its mask where `draw_mask` makes
        one. What they hold must be picklable: they go to the decode processes.
        """
        hides = cls.draw_mask is not Method.draw_mask
        draw: Any = partial(cls.draw_mask, recipe)  # never None where it is overridden
        masks = Masks(draw) if hides else None
        return (training_view(recipe, masks=masks),)

    @classmethod
    def needs(cls) -> tuple[Need, ...]:
        """Bundles that the method needs; a need for each of its config's `places`."""
        return ()

    def take(self, name: str, folder: Path) -> None:
        """Take a bundle that was needed.

        Args:
            name: the need's `folder`.
            folder: the bundle's, verified.
        """
        raise AssertionError(f"{type(self).__name__} needs no {name}")

    def expect(self, name: str, recipe: Recipe | None) -> None:
        """Take the shape of a network that is needed and stays, to count costs with.

        Args:
            name: the need's `folder`.
            recipe: of the network; None where it is not there yet.
        """
        raise AssertionError(f"{type(self).__name__} needs no {name}")

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules by the part of the method they are, as costs are told; the rest is the decoder.

        Modules that are needed but not owned may be among them.
        """
        heads = [module for name, module in self.named_modules() if name in HEADS]
        parts: dict[str, list[nn.Module]] = {"encoder": [self.encoder], "head": heads}
        if self.averages is not None:
            averages = self.averages
            parts["teacher"] = [averages.get_submodule(name) for name in averages.names]
        return parts

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


def _unmarked(part: str) -> AbstractContextManager[None]:
    return nullcontext()
