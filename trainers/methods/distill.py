"""Feature targets: the tokens of a frozen teacher, predicted of a masked picture.

Sources: EVA (Fang et al. 2023) predicts a frozen CLIP's tokens at hidden places under a cosine;
BEiT v2 (Peng et al. 2022) learns its codes from such tokens likewise. Averages over layers, each
after a layer norm without affine parameters, and smooth L1 are data2vec's (Baevski et al. 2022,
sec. 3.3).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.bundles import BundleCard, FrozenEncoder, load_bundle
from mimray.trainers.config.composition import check_size
from mimray.trainers.config.distill import DistillConfig
from mimray.trainers.config.model import DalleConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Masks, same_crops, training_view
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.draws import distill_mask
from mimray.trainers.methods.losses import mean_over_hidden
from mimray.trainers.methods.needs import Need
from mimray.trainers.models import build_encoder
from mimray.trainers.models.colours import enlarged, principal_colours
from mimray.trainers.models.normalise import normalise, pixels_at
from mimray.trainers.pictures import hide_patches, pixel_mask
from mimray.trainers.types import MethodOutput, Panel

Grid = tuple[int, int]


class Targets(NamedTuple):
    """A teacher's targets.

    Attributes:
        tokens: fp32 [B, N, D], normalised, row-major over the student's grid.
        pooled: fp32 [B, D], normalised; None if it is not predicted.
    """

    tokens: Tensor
    pooled: Tensor | None


class Teacher(nn.Module):
    """A frozen encoder, and the targets that are made of its maps.

    A target is the mean, over the chosen layers, of the layer's tokens: with the encoder's final
    norm, as they are served, then normalised by a layer norm without affine parameters, then, where
    the grids differ, interpolated bilinearly to the student's (with antialiasing, so that a coarser
    grid gets means of what it covers). The mean is normalised once more.

    Args:
        frozen: the encoder.
        config: the recipe's `method` section.
        grid: (rows, columns) of the student's tokens.
    """

    def __init__(self, frozen: FrozenEncoder, config: DistillConfig, grid: Grid) -> None:
        super().__init__()
        self.frozen = frozen.eval()
        self.layers = config.chosen_layers(frozen.depth)
        self.grid = grid
        self.pools = config.pooled_weight > 0

    @torch.no_grad()
    def forward(self, pixels: UInt8[Tensor, "B C h w"]) -> Targets:
        """Make the targets of pictures, in the precision that autocast wants of the encoder.

        Args:
            pixels: pictures as stored, at the teacher's size.
        """
        card = self.frozen.card
        images = normalise(pixels, card.mean, card.std)
        if not self.pools:
            return Targets(self._tokens(self.frozen.features(images, self.layers)), None)
        features, maps = self.frozen.encoder.forward_intermediates(images, self.layers)
        pooled = features.prefix[:, 0] if card.pooling == "cls" else features.pooled  # B D
        return Targets(self._tokens(maps), normalised(pooled))

    def _tokens(self, maps: tuple[Tensor, ...]) -> Tensor:
        found = [normalised(m.flatten(2).transpose(1, 2)) for m in maps]  # B n D each
        grids = [(m.shape[2], m.shape[3]) for m in maps]
        resized = [_to_grid(t, of, self.grid) for t, of in zip(found, grids, strict=True)]
        return normalised(torch.stack(resized).mean(dim=0))


class Distill(Method):
    """Predicts a teacher's tokens by a linear head on the student's.

    Hidden patches go through the encoder as mask tokens. The teacher sees the whole crop at its own
    size; it is attached, not owned: it is in no state dict, checkpoint, optimiser or bundle.

    Attributes:
        config: the recipe's `method` section.
        mask_token: the token in the place of hidden patches; None if nothing is hidden.
        pooled_head: the head that predicts the pooled feature; None if it is not predicted.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, DistillConfig)
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.mask_token: nn.Parameter | None = None
        if config.mask_ratio:
            self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.embed_width))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = _linear(self.encoder.width, config.teacher_width)
        self.pooled_head = (
            _linear(self.encoder.width, config.teacher_width) if config.pooled_weight else None
        )
        self._teacher: Teacher | _NoTeacher | None = None

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """A masked view, and the same crop as uint8 pixels at the teacher's size."""
        config = recipe.method
        assert isinstance(config, DistillConfig)
        draw: Any = partial(cls.draw_mask, recipe)  # never None where anything is hidden
        masks = Masks(draw, mean_name="hidden_mean") if config.mask_ratio else None
        images = training_view(recipe, masks=masks)
        size = config.teacher_image_size or recipe.data.image_size
        return images, same_crops(images, "teacher_images", size, recipe.data.interpolation)

    @classmethod
    def needs(cls) -> tuple[Need, ...]:
        """The teacher, a bundle of any method."""
        missing = ConfigError(
            "method.teacher names no teacher",
            hint="a bundle or run with an encoder: `mimray import` makes one of public weights, "
            "then --set method.teacher=…",
        )
        return (Need("teacher", "teacher", "teacher", _held, "training", missing),)

    def take(self, name: str, folder: Path) -> None:
        """Load the teacher and attach it."""
        self.attach(load_bundle(folder, verify=False))  # verified as a need

    def expect(self, name: str, card: BundleCard | None) -> None:
        """Attach a teacher without weights, or a stand-in whose targets cost nothing."""
        if card is None:
            self._attach(_NoTeacher(self.config, self.recipe.grid))
            return
        encoder = build_encoder(card.encoder, card.image_size, card.channels)
        self.attach(FrozenEncoder(encoder, card))

    def attach(self, frozen: FrozenEncoder) -> None:
        """Attach a teacher, which fits the recipe."""
        self._attach(Teacher(frozen, self.config, self.recipe.grid))

    def _attach(self, teacher: Teacher | _NoTeacher) -> None:
        # Around nn.Module, which would register it as a submodule.
        self.__dict__["_teacher"] = teacher

    @property
    def teacher(self) -> Teacher | _NoTeacher:
        """The attached teacher.

        Raises:
            ConfigError: no teacher is attached.
        """
        if self._teacher is None:
            raise ConfigError(
                "this distill has no teacher, which bundles go without",
                hint="use the run's own folder on this machine, which keeps it",
            )
        return self._teacher

    def parts(self) -> dict[str, list[nn.Module]]:
        """The parts of the base class, the second head, and the teacher, which is not owned."""
        parts = super().parts()
        if self.pooled_head is not None:
            parts["head"].append(self.pooled_head)
        return {**parts, "teacher": [] if self._teacher is None else [self._teacher]}

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        teacher_images: UInt8[Tensor, "B C h w"] | None = None,
        hidden_mean: Float[Tensor, ""] | None = None,
    ) -> MethodOutput:
        """Mean error of the predicted places over the batch, and that of the pooled feature.

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator by default.
            teacher_images: the same crops as uint8 pixels, at the teacher's size. By default they
                are resized from `images`, which comes close.
            hidden_mean: as for `mean_over_hidden`.

        Returns:
            Predictions and targets of all tokens, whatever the loss weighs; the term `similarity`,
            the mean cosine at the predicted places; with a pooled feature, both parts of the loss.
        """
        if self.mask_token is None:
            if mask is not None:
                raise ConfigError("trained with method.mask_ratio 0, so there is no mask token")
        elif mask is None:
            mask = self.draw_masks(images)
        if teacher_images is None:
            data, size = self.recipe.data, self.config.teacher_image_size
            teacher_images = pixels_at(images, data.mean, data.std, size or data.image_size)
        target = self.teacher.to(images.device)(teacher_images)

        features = self.encoder(images, mask, self.mask_token)
        prediction = self.head(features.tokens)  # B N P
        shown_mask = torch.ones_like(prediction[..., 0], dtype=torch.bool) if mask is None else mask
        places = self.places(shown_mask)
        mean = self._places_mean(places, hidden_mean)
        similarity = F.cosine_similarity(prediction.float(), target.tokens, dim=-1)  # B N
        error = self._error(prediction, target.tokens)  # B N
        loss = mean_over_hidden((error * places).sum(), places, mean)
        terms = {"similarity": mean_over_hidden((similarity * places).sum(), places, mean)}
        if self.pooled_head is not None:
            assert target.pooled is not None
            pooled = features.prefix[:, 0] if self.config.pooling == "cls" else features.pooled
            pooled_loss = self._error(self.pooled_head(pooled), target.pooled).mean()
            terms |= {"token_loss": loss, "pooled_loss": pooled_loss}
            loss = loss + self.config.pooled_weight * pooled_loss
        return MethodOutput(loss, prediction, target.tokens, shown_mask, terms)

    def places(self, mask: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
        """The predicted places, True = predicted.

        Args:
            mask: True = hidden; all True if the method hides nothing.
        """
        if not self.config.mask_ratio or self.config.predict == "all":
            return torch.ones_like(mask)
        return mask if self.config.predict == "hidden" else ~mask

    def _places_mean(self, places: Tensor, hidden_mean: Tensor | None) -> Tensor | None:
        """Predicted places of a picture, averaged over the global batch, of hidden ones so."""
        if hidden_mean is None or self.config.predict == "hidden":
            return hidden_mean
        num_places = torch.full_like(hidden_mean, places.shape[1])
        return num_places if self.config.predict == "all" else num_places - hidden_mean

    def _error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The error of each vector, in fp32, over the last dimension."""
        if self.config.loss == "cosine":
            return 1 - F.cosine_similarity(prediction.float(), target, dim=-1)
        beta = self.config.smooth_l1_beta
        return F.smooth_l1_loss(prediction.float(), target, beta=beta, reduction="none").mean(-1)

    draw_mask = staticmethod(distill_mask)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Raise NotImplementedError: features give no pixels."""
        raise NotImplementedError("distill predicts no pixels")

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Originals, visible patches, and the teacher's and the predicted tokens in false colours.

        Both are coloured by the same principal components, the teacher's; places that are not
        predicted are grey.
        """
        original, stride = self.pixels(images), self.encoder.stride
        places = self.places(output.mask).cpu().numpy()
        shades = principal_colours(output.target, normalised(output.prediction))
        theirs, ours = (enlarged(tokens, self.recipe.grid, stride) for tokens in shades)
        predicted = pixel_mask(places, original.shape[1:3], stride)[..., None]
        panels = [
            Panel("original", original),
            Panel("teacher's tokens", theirs),
            Panel("predicted tokens", np.where(predicted, ours, np.uint8(127))),
        ]
        if self.mask_token is not None:
            masked = hide_patches(original, output.mask.cpu().numpy(), stride)
            panels.insert(1, Panel("masked", masked))
        return panels


def normalised(tokens: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
    """Layer norm without affine parameters, in fp32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def _to_grid(tokens: Float[Tensor, "B n D"], old: Grid, new: Grid) -> Float[Tensor, "B N D"]:
    if old == new:
        return tokens
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *old)  # B D h w
    resized = F.interpolate(maps, new, mode="bilinear", antialias=True)
    return resized.flatten(2).transpose(1, 2)


def _linear(width: int, teacher_width: int) -> nn.Linear:
    linear = nn.Linear(width, teacher_width)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


class _NoTeacher(nn.Module):
    """A stand-in for a missing teacher, whose targets cost nothing."""

    def __init__(self, config: DistillConfig, grid: Grid) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = grid[0] * grid[1]

    def forward(self, pixels: Tensor) -> Targets:
        width = self.config.teacher_width
        tokens = torch.zeros(len(pixels), self.num_tokens, width, device=pixels.device)
        return Targets(tokens, tokens[:, 0] if self.config.pooled_weight else None)


def _held(recipe: Recipe, card: BundleCard) -> dict[str, Any]:
    """Check a recipe against its teacher's card; returns the teacher's size and width.

    Raises:
        ConfigError: the teacher's channels, layers or size do not fit the recipe, or it makes
            codes.
    """
    config = recipe.method
    assert isinstance(config, DistillConfig)
    named = f"method.teacher {config.teacher}"
    if recipe.data.auto_augment:
        raise ConfigError(
            f"data.auto_augment {recipe.data.auto_augment} moves the student's pixels and not the "
            "teacher's, whose tokens it is to predict place by place",
            hint="leave it out; data.color_jitter changes both views alike",
        )
    if isinstance(card.encoder, DalleConfig):
        raise ConfigError(
            f"{named} is a tokenizer, which makes codes and no features",
            hint="--set method.name=beit --set method.tokenizer=… predicts its codes",
        )
    if card.channels != recipe.data.channels:
        raise ConfigError(
            f"{named} reads {card.channels} channels, data.channels is {recipe.data.channels}",
            hint=f"--set data.channels={card.channels}, or a teacher of {recipe.data.channels}",
        )
    size = config.teacher_image_size or card.image_size
    with torch.device("meta"):
        encoder = build_encoder(card.encoder, card.image_size, card.channels)
    try:
        widths = [encoder.widths[layer] for layer in config.chosen_layers(encoder.depth)]
    except ValueError as error:
        raise ConfigError(f"{named} has {encoder.depth} layers: {error}") from None
    try:
        check_size(card.encoder, size)
    except ValueError:
        height, width = card.image_size
        raise ConfigError(
            f"method.teacher_image_size {list(size)} does not fit {named}, of stride "
            f"{encoder.stride} and trained at {height}x{width} pixels",
            hint=f"--set method.teacher_image_size=[{height},{width}], or leave it out",
        ) from None
    if len({*widths, *([encoder.width] if config.pooled_weight else [])}) > 1:
        raise ConfigError(
            f"{named} has layers of widths {encoder.widths}, and those of one target, the pooled "
            "feature's last one included, must be of one width",
            hint="--set method.last_layers=1 --set method.layers=[]",
        )
    if "teacher_width" in config.model_fields_set and config.teacher_width != widths[0]:
        raise ConfigError(
            f"{named} has tokens of width {widths[0]}, method.teacher_width is "
            f"{config.teacher_width}",
            hint=f"--set method.teacher_width={widths[0]}, or leave it out",
        )
    return {"teacher_image_size": size, "teacher_width": widths[0]}
