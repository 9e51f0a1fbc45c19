"""BEiT: masked image modelling with the codes of a tokenizer as targets.

Source: Bao et al. 2022, "BEiT: BERT Pre-Training of Image Transformers".
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.data.views import Inputs, Masks, same_crops, training_view
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.draws import beit_mask
from mimray.trainers.methods.load import load_method
from mimray.trainers.methods.losses import mean_over_hidden
from mimray.trainers.methods.needs import Need
from mimray.trainers.models import build_encoder
from mimray.trainers.models.full_precision import full_precision
from mimray.trainers.models.normalise import denormalise, normalise, pixels_at, resize
from mimray.trainers.models.patches import patchify, unpatchify
from mimray.trainers.models.vit import init_cut_normal_
from mimray.trainers.pictures import hide_patches
from mimray.trainers.types import MethodOutput, Panel


@runtime_checkable
class Tokenizer(Protocol):
    """The protocol of BEiT's tokenizer, which a trained `dvae` has.

    Attributes:
        recipe: the recipe that the tokenizer was trained by.
    """

    recipe: Recipe

    def codes(self, images: Tensor) -> Tensor:
        """Codes int64 [B, h, w] of pictures [B, C, H, W] in the tokenizer's own normalisation."""

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in the tokenizer's own normalisation, of codes [B, h, w]."""

    def to(self, device: torch.device) -> Tokenizer:
        """Move the tokenizer to a device, in place."""


class BEiT(Method):
    """Replaces blocks of patches by a mask token and predicts the tokenizer's codes of them.

    The tokenizer is attached, not owned: it is in no state dict, checkpoint or optimiser, and
    stays in fp32 and evaluation mode when the method is cast or trained.

    Attributes:
        config: the recipe's `method` section.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, BEiTConfig)
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.embed_width))
        self.head = nn.Linear(self.encoder.width, config.vocab_size)
        init_cut_normal_(self.mask_token)
        init_cut_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """A masked view, and the same crop as uint8 pixels at the tokenizer's size."""
        config = recipe.method
        assert isinstance(config, BEiTConfig)
        masks = Masks(partial(cls.draw_mask, recipe), mean_name="hidden_mean")
        images = training_view(recipe, masks=masks)
        size = config.tokenizer_image_size
        return images, same_crops(images, "tokenizer_images", size, "lanczos")

    @classmethod
    def needs(cls) -> tuple[Need, ...]:
        """The tokenizer, a bundle of method dvae."""
        missing = ConfigError(
            "method.tokenizer names no tokenizer",
            hint="train one with `mimray pretrain dvae-tiny`, "
            "then --set method.tokenizer=runs/dvae-tiny",
        )
        return (Need("tokenizer", "tokenizer", "tokenizer", _held, "always", missing),)

    def take(self, name: str, folder: Path) -> None:
        """Load the tokenizer and attach it."""
        tokenizer = load_method(folder)
        if not isinstance(tokenizer, Tokenizer):
            raise BundleError(f"{folder} is no tokenizer", hint="a bundle of method dvae")
        self.attach(tokenizer)

    def expect(self, name: str, card: BundleCard | None) -> None:
        """Attach a tokenizer without weights, or a stand-in whose codes cost nothing."""
        if card is None:
            self.attach(_NoTokenizer(self.recipe))
            return
        found = build_method(parse_recipe(card.recipe, "the tokenizer's bundle.json")).eval()
        assert isinstance(found, Tokenizer)
        self.attach(found)

    def parts(self) -> dict[str, list[nn.Module]]:
        """The parts of the base class, and the tokenizer, which is not owned."""
        found = self._tokenizer
        return {
            **super().parts(),
            "tokenizer": [found] if isinstance(found, nn.Module) else [],
        }

    @property
    def tokenizer(self) -> Tokenizer:
        """The attached tokenizer.

        Raises:
            BundleError: no tokenizer is attached.
        """
        if self._tokenizer is None:
            raise BundleError(
                "this BEiT has no tokenizer",
                hint="load a bundle that holds one",
            )
        return self._tokenizer

    def attach(self, tokenizer: Tokenizer) -> None:
        """Attach a tokenizer, which must be in evaluation mode and stays so."""
        # Around nn.Module, which would register it as a submodule.
        self.__dict__["_tokenizer"] = tokenizer

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        tokenizer_images: UInt8[Tensor, "B C h w"] | None = None,
        hidden_mean: Float[Tensor, ""] | None = None,
    ) -> MethodOutput:
        """Mean cross-entropy over all hidden patches of the batch (Bao et al. 2022, eq. 3).

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator by default.
            tokenizer_images: the same crops as uint8 pixels, at the tokenizer's size. By default
                they are resized from `images`, which comes close: training resizes the stored
                picture, by another filter.
            hidden_mean: as for `mean_over_hidden`.
        """
        if mask is None:
            mask = self.draw_masks(images)
        if tokenizer_images is None:
            tokenizer_images = self._second_view(images)
        target = self.codes(tokenizer_images)[mask]  # M
        features = self.encoder(images, mask, self.mask_token)
        logits = self.head(features.tokens[mask])  # M K
        loss = F.cross_entropy(logits.float(), target, reduction="sum")
        right = (logits.argmax(dim=-1) == target).float().sum()
        loss, accuracy = (mean_over_hidden(total, mask, hidden_mean) for total in (loss, right))
        return MethodOutput(loss, logits, target, mask, {"accuracy": accuracy})

    draw_mask = staticmethod(beit_mask)

    @torch.no_grad()
    def codes(self, tokenizer_images: UInt8[Tensor, "B C h w"]) -> Int64[Tensor, "B N"]:
        """The tokenizer's codes of pictures at its size, row-major over the grid."""
        tokenizer = self.tokenizer.to(tokenizer_images.device)
        data = tokenizer.recipe.data
        with self.within("tokenizer"), full_precision(tokenizer_images):
            return tokenizer.codes(normalise(tokenizer_images, data.mean, data.std)).flatten(1)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Decode the likeliest codes of hidden patches with the codes of visible ones.

        The tokenizer's receptive field is wider than a patch, so hidden pixels would leak into the
        codes of their neighbours. In their place it gets the prediction, as a first round, with
        the mean colour there, has drawn it.
        """
        predicted = output.prediction.argmax(dim=-1)  # M
        drawn = torch.zeros_like(images)
        for _ in range(2):
            codes = self.codes(self._second_view(self._behind(images, drawn, output.mask)))
            codes[output.mask] = predicted
            drawn = self._decoded(codes)
        return drawn

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Originals, visible patches, decoded codes of the originals, and decoded predictions.

        A tokenizer without a decoder draws no codes: wrongly predicted codes are marked instead.
        """
        original = self.pixels(images)
        theirs = self.tokenizer.recipe.method
        if isinstance(theirs, DVAEConfig) and not theirs.decoder_widths:
            return self._hits(original, output)
        best = self._decoded(self.codes(self._second_view(images)))
        mask = output.mask.cpu().numpy()
        return [
            Panel("original", original),
            Panel("masked", hide_patches(original, mask, self.encoder.stride)),
            Panel("codes of the original", self.pixels(best)),
            Panel("prediction", self.pixels(self.reconstruct(images, output))),
        ]

    def _hits(self, original: np.ndarray, output: MethodOutput) -> list[Panel]:
        """Originals, visible patches, and the patches whose codes are wrong, hidden."""
        mask, stride = output.mask.cpu(), self.encoder.stride
        wrong = mask.clone()
        wrong[mask] = (output.prediction.argmax(dim=-1) != output.target).cpu()
        return [
            Panel("original", original),
            Panel("masked", hide_patches(original, mask.numpy(), stride)),
            Panel("wrong codes", hide_patches(original, wrong.numpy(), stride)),
        ]

    def _second_view(self, images: Float[Tensor, "B C H W"]) -> UInt8[Tensor, "B C h w"]:
        """Normalised pictures as uint8 pixels at the tokenizer's size."""
        data = self.recipe.data
        return pixels_at(images, data.mean, data.std, self.config.tokenizer_image_size)

    @torch.no_grad()
    def _decoded(self, codes: Int64[Tensor, "B N"]) -> Float[Tensor, "B C H W"]:
        """Pictures decoded from codes, in the encoder's size and normalisation."""
        ours, theirs = self.recipe.data, self.tokenizer.recipe.data
        maps = codes.reshape(-1, *self.recipe.grid)  # B h w
        drawn = self.tokenizer.to(codes.device).decode_codes(maps)
        pixels = denormalise(resize(drawn, ours.image_size), theirs.mean, theirs.std)
        return normalise(pixels, ours.mean, ours.std)

    def _behind(
        self,
        images: Float[Tensor, "B C H W"],
        drawn: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"],
    ) -> Float[Tensor, "B C H W"]:
        """Pictures whose hidden patches are taken from `drawn`."""
        stride = self.encoder.stride
        patches = torch.where(
            mask.unsqueeze(-1), patchify(drawn, stride), patchify(images, stride)
        )  # B N P
        return unpatchify(patches, stride, self.recipe.grid)


class _NoTokenizer(Tokenizer):
    """A stand-in for a missing tokenizer, whose codes cost nothing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def codes(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), *self.recipe.grid, dtype=torch.int64)

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("no training step decodes codes")

    def to(self, device: torch.device) -> _NoTokenizer:
        return self


def _held(recipe: Recipe, card: BundleCard) -> dict[str, Any]:
    """Check a recipe against its tokenizer's card; returns the number of codes.

    Raises:
        ConfigError: the bundle is no tokenizer, or its channels, sizes or number of codes do not
            fit the recipe.
    """
    method = recipe.method
    assert isinstance(method, BEiTConfig)
    named = f"method.tokenizer {method.tokenizer}"
    if card.method != "dvae":
        raise ConfigError(
            f"{named} is no tokenizer: its method is {card.method!r}",
            hint="`mimray pretrain dvae-tiny` trains one",
        )
    theirs = parse_recipe(card.recipe, "the tokenizer's bundle.json")
    assert isinstance(theirs.method, DVAEConfig)
    data = theirs.data
    if data.channels != recipe.data.channels:
        raise ConfigError(
            f"{named} reads {data.channels} channels, data.channels is {recipe.data.channels}",
            hint=f"--set data.channels={data.channels}, or a tokenizer of {recipe.data.channels}",
        )
    if data.image_size != method.tokenizer_image_size:
        raise ConfigError(
            f"{named} was trained at {_by(data.image_size)} pixels, "
            f"method.tokenizer_image_size is {_by(method.tokenizer_image_size)}",
            hint=f"--set method.tokenizer_image_size={_yaml(data.image_size)}, "
            "or train a tokenizer at the other size",
        )
    if theirs.grid != recipe.grid:
        ours_px = [side * recipe.encoder.stride for side in theirs.grid]
        theirs_px = [side * theirs.encoder.stride for side in recipe.grid]
        raise ConfigError(
            f"{named} makes {_by(theirs.grid)} codes of {_by(data.image_size)} pixels, the "
            f"encoder {_by(recipe.grid)} tokens of {_by(recipe.data.image_size)}",
            hint=f"--set data.image_size={_yaml(ours_px)}, "
            f"or a tokenizer trained at {_by(theirs_px)} pixels",
        )
    num_codes = theirs.method.codebook_size
    if "vocab_size" in method.model_fields_set and method.vocab_size != num_codes:
        raise ConfigError(
            f"{named} has {num_codes} codes, method.vocab_size is {method.vocab_size}",
            hint=f"--set method.vocab_size={num_codes}",
        )
    return {"vocab_size": num_codes}


def _by(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _yaml(size: Iterable[int]) -> str:
    return f"[{','.join(map(str, size))}]"
