"""The protocol of methods: modules that turn pictures and a mask into a loss."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Masks, training_view
from mimray.trainers.methods.needs import Need
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.models.noise import SampleNoise
from mimray.trainers.models.normalise import denormalise
from mimray.trainers.models.patches import unpatchify
from mimray.trainers.pictures import hide_patches, paste_visible
from mimray.trainers.types import Features, MethodOutput, Panel

# Names, within a method, of modules that turn the last tokens or maps into predictions.
HEADS = ("head", "decoder.pred", "decoder.to_pixels")


class Assessment(NamedTuple):
    """Figures of a trained method over pictures, and warnings.

    Attributes:
        figures: figures by name.
        warnings: sentences on what is wrong, with the figures and the cure.
    """

    figures: dict[str, float]
    warnings: tuple[str, ...]


class Method(nn.Module, ABC):
    """A pre-training objective around an encoder. Only the engine calls backward and step.

    A method declares its inputs (`views`), the bundles it needs (`needs`), its moving averages
    (`averages`) and the module to export (`result`). Each parameter is trained; or fixed
    (`requires_grad` False) and exported with its initial value; or in `averages`. State that is not
    learnt by gradient is in buffers.

    Args:
        recipe: the checked recipe; a method reads its sections `encoder`, `method` and `data`.

    Attributes:
        encoder: the encoder that is trained.
        averages: moving averages of modules, such as a teacher; None for none.
        ema: the average that the recipe's `optim.ema` asks for; the engine adds it, and it takes no
            part in the loss. None for none.
        start: the encoder as it began, frozen; None unless the config `holds_start`, and in a
            method that was loaded after its training. It is attached, not owned: it is in no state
            dict, checkpoint, optimiser or bundle.
        result: name of the encoder to export: `encoder`, or its moving average,
            `averages.encoder`.
        within: makes a context whose operations are attributed to one of the `parts` when costs are
            counted; without effect otherwise.
    """

    result: ClassVar[str] = "encoder"

    encoder: Encoder
    averages: MovingAverages | None
    ema: MovingAverages | None
    start: Encoder | None
    within: Callable[[str], AbstractContextManager[None]]

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.averages = None
        self.ema = None
        self.start = None
        self.within = _unmarked

    @abstractmethod
    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Compute the loss of a batch; the arguments are the inputs that `views` declares.

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator by default.
        """

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """Declare the inputs of a picture, named as the arguments of `forward`.

        By default one view as the recipe's `data` describes it, with a mask if the method overrides
        `draw_mask`. Inputs must be picklable: they go to the decode processes.
        """
        hides = cls.draw_mask is not Method.draw_mask
        draw: Any = partial(cls.draw_mask, recipe)  # never None where it is overridden
        masks = Masks(draw) if hides else None
        return (training_view(recipe, masks=masks),)

    @classmethod
    def needs(cls) -> tuple[Need, ...]:
        """Declare the bundles that the method needs, one for each of its config's `places`."""
        return ()

    def take(self, name: str, folder: Path) -> None:
        """Load a bundle that the method needs.

        Args:
            name: the `folder` of the need.
            folder: the folder of the bundle, verified.
        """
        raise AssertionError(f"{type(self).__name__} needs no {name}")

    def begin_with(self, encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> None:
        """Load weights to begin with; moving averages begin with the same.

        Args:
            encoder: weights of the encoder, of its names and shapes; some may be missing.
            rest: weights of the method beside its encoder, by their names in the method.
        """
        self.encoder.load_state_dict(dict(encoder), strict=False)
        self.load_state_dict(dict(rest), strict=False)
        if self.averages is not None:
            self.averages.begin(self)

    def hold_start(self) -> None:
        """Attach a frozen copy of the encoder as it is now; called once it has its weights."""
        frozen = copy.deepcopy(self.encoder).eval().requires_grad_(False)
        # Around nn.Module, which would register it as a submodule.
        self.__dict__["start"] = frozen

    @torch.no_grad()
    def at_start(self, images: Float[Tensor, "B C H W"]) -> Features:
        """Features of pictures by the encoder as it began, in the method's precision.

        Args:
            images: normalised pictures.
        """
        assert self.start is not None, "the config does not hold on to the start"
        dtype = next(self.encoder.parameters()).dtype
        lower = dtype != torch.float32 and not images.is_meta
        with torch.autocast(images.device.type, dtype) if lower else nullcontext():
            found: Features = self.start.to(images.device)(images)
        return found

    def expect(self, name: str, card: BundleCard | None) -> None:
        """Build a needed network that the method calls without its weights, to count costs.

        Args:
            name: the `folder` of the need.
            card: the bundle's description, bundle.json; None if there is no bundle yet.
        """
        raise AssertionError(f"{type(self).__name__} needs no {name}")

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules by part of the method, as costs are reported; the rest is the decoder.

        Networks that the method calls but does not own may be among them.
        """
        heads = [module for name, module in self.named_modules() if name in HEADS]
        parts: dict[str, list[nn.Module]] = {"encoder": [self.encoder], "head": heads}
        if self.averages is not None:
            averages = self.averages
            parts["teacher"] = [averages.get_submodule(name) for name in averages.names]
        if self.start is not None:
            parts["start"] = [self.start]
        return parts

    @staticmethod
    def draw_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N] | None:
        """Draw the mask of one sample; runs in the loader.

        Args:
            recipe: the checked recipe.
            rng: the sample's own generator, the only source of randomness.

        Returns:
            bool [N], True = hidden; None if the method hides nothing.
        """
        return None

    def at_step(self, step: int, num_steps: int) -> None:
        """Called before each update, on every rank; sets values that change over a run.

        Args:
            step: updates made so far.
            num_steps: updates of the whole run.
        """

    def at_batch(self, seeds: np.ndarray) -> None:
        """Called before each micro batch; its noise then depends on its samples alone.

        Args:
            seeds: uint64 [B], a seed for each sample.
        """
        bits = torch.from_numpy(seeds.view(np.int64))
        for module in self.modules():
            if isinstance(module, SampleNoise):
                module.seeds = bits

    def after_step(self, step: int) -> dict[str, float]:
        """Called after each update, on every rank; may be collective.

        Updates state that is not learnt by gradient, from the micro batches of all ranks since the
        last call.

        Args:
            step: updates made, this one included.

        Returns:
            Figures for the row of metrics, by name, the same on every rank.
        """
        return {}

    @property
    def pictures_to_assess(self) -> int:
        """Pictures that `assess` wants; 0 if there is nothing to assess."""
        return 0

    def assess(self, batches: Iterable[Float[Tensor, "B C H W"]]) -> Assessment:
        """Examine a trained method, in evaluation mode, by pictures that it was not trained on.

        Args:
            batches: normalised whole pictures, one batch at least.
        """
        return Assessment({}, ())

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Turn predictions into normalised pictures, in hidden and visible patches alike.

        By default predictions are pixels. A method that predicts something else overrides this or
        `panels`.

        Args:
            images: the normalised pictures that were encoded.
            output: the result of `forward` for them.
            oracle: True to undo a normalisation of targets by the statistics of the hidden patches
                themselves, which leaks the answer; without effect on other targets.
        """
        stride = self.encoder.stride
        grid = images.shape[2] // stride, images.shape[3] // stride
        return unpatchify(output.prediction.float(), stride, grid)

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Draw predictions beside the originals, as columns of a sheet.

        Args:
            images: the normalised pictures that were encoded.
            output: the result of `forward` for them.
            oracle: True to draw as `reconstruct` does with `oracle`; the headings then say so.
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
        """Denormalised pictures, uint8 [B, H, W, C] on the host."""
        data = self.recipe.data
        return denormalise(images, data.mean, data.std).permute(0, 2, 3, 1).cpu().numpy()

    def draw_masks(self, images: Float[Tensor, "B C H W"]) -> Bool[Tensor, "B N"]:
        """Draw a mask for each picture from torch's generator."""
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        masks = [self.draw_mask(self.recipe, rng) for _ in range(images.shape[0])]
        return torch.from_numpy(np.stack([m for m in masks if m is not None])).to(images.device)


def _unmarked(part: str) -> AbstractContextManager[None]:
    return nullcontext()
