"""Fine-tuning: classification of labelled pictures, the whole encoder trained end to end.

Source: He et al. 2022 (MAE), A.1 and Table 9; github.com/facebookresearch/mae `main_finetune.py`,
`models_vit.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.bundles import ENCODER, BundleCard, read_card
from mimray.trainers.config.method import FinetuneConfig
from mimray.trainers.config.model import EncoderConfig, ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Labels, Numbers
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.mixing import draw_mixing, mix, smoothed_targets
from mimray.trainers.methods.needs import Need
from mimray.trainers.models import build_encoder
from mimray.trainers.models.rel_pos import spread_over_blocks
from mimray.trainers.models.resize import for_size, resized
from mimray.trainers.types import MethodOutput, Panel

HEAD_STD = 2e-5
# Keys in which two encoders may differ and still take each other's weights.
_FREE = {"name", "init", "drop_path"}
_FRAMES = {True: (40, 160, 70), False: (205, 50, 45)}


class Finetune(Method):
    """A linear head on the encoder's pooled features; cross-entropy against soft targets.

    A vit's patches are averaged before the final norm, which thus serves as MAE's `fc_norm`. Other
    encoders' patches are averaged after it, as in the official SimMIM code; a class token is
    normalised too.

    Attributes:
        config: the recipe's `method` section.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, FinetuneConfig)
        assert config.num_classes, "filled in before a method is built"
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.pools_first = config.pooling == "mean" and isinstance(recipe.encoder, ViTConfig)
        self.head = nn.Linear(self.encoder.width, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """An unmasked view, its class, and the numbers it is mixed by."""
        config = recipe.method
        assert isinstance(config, FinetuneConfig)
        inputs = (*super().views(recipe), Labels())
        if not config.pairs:
            return inputs
        draw = partial(draw_mixing, config=config, size=recipe.data.image_size)
        return (*inputs, Numbers(draw, "mixing"))

    @classmethod
    def needs(cls) -> tuple[Need, ...]:
        """A bundle with the initial encoder; without one, the encoder is freshly initialised."""
        return (Need("bundle", "initial", "encoder", _held, "start"),)

    def take(self, name: str, folder: Path) -> None:
        """Begin with the encoder of a bundle, resized to this encoder's input.

        Relative positions that its blocks share are spread over blocks, where this one has such.

        Raises:
            BundleError: the bundle cannot be read.
        """
        card = read_card(folder)
        try:
            state = load_file(folder / ENCODER)
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{folder / ENCODER} cannot be read: {error}") from None
        recipe = self.recipe
        theirs = card.encoder, card.image_size
        state = resized(state, theirs, (recipe.encoder, recipe.data.image_size))
        if _shares(card.encoder) and not _shares(recipe.encoder):
            assert isinstance(card.encoder, ViTConfig)
            state = spread_over_blocks(state, card.encoder.depth)
        self.begin_with(state)

    def begin_with(self, encoder: Mapping[str, Tensor]) -> None:
        """Load an encoder's weights to begin with.

        A norm after the pooling starts afresh, since it was trained on single patches.

        Args:
            encoder: the encoder's state, of this one's architecture and size.
        """
        self.encoder.load_state_dict(dict(encoder))
        if self.pools_first:
            norm = self.encoder.get_submodule("norm")
            assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
            norm.reset_parameters()

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        mixing: Float[Tensor, "B 5"] | None = None,
        partners: Int64[Tensor, " M"] | None = None,
    ) -> MethodOutput:
        """Mean cross-entropy, in training with mixed pictures and smoothed labels.

        Args:
            images: normalised pictures.
            mask: None; fine-tuning hides nothing.
            labels: the pictures' classes.
            mixing: the result of `draw_mixing` for each picture; None to mix nothing.
            partners: rows of the pictures that the first M ones are mixed with; the loss is that of
                these M.

        Returns:
            Logits, target probabilities, and the term `accuracy`, which counts the class of the
            largest target probability as the right one.
        """
        assert mask is None, "fine-tuning hides nothing"
        assert labels is not None, "a loss needs labels; `logits` needs none"
        smoothing = self.config.label_smoothing if self.training else 0.0
        targets = smoothed_targets(labels, self.config.num_classes, smoothing)  # B K
        if self.training and mixing is not None:
            assert partners is not None
            images, targets = mix(images, targets, mixing, partners)
        logits = self.logits(images)
        loss = F.cross_entropy(logits.float(), targets)
        accuracy = (logits.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        num_tokens = self.recipe.grid[0] * self.recipe.grid[1]
        all_seen = torch.ones(len(images), num_tokens, dtype=torch.bool, device=images.device)
        return MethodOutput(loss, logits, targets, all_seen, {"accuracy": accuracy})

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Scores of the classes before the softmax.

        Args:
            images: normalised pictures.
        """
        features = self.encoder(images, norm=not self.pools_first)
        if self.config.pooling == "cls":
            pooled = features.prefix[:, 0]  # B D
        elif self.pools_first:
            pooled = self.encoder.get_submodule("norm")(features.pooled)
        else:
            pooled = features.pooled
        scores: Tensor = self.head(pooled)
        return scores

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Raise NotImplementedError: classes give no pixels."""
        raise NotImplementedError("fine-tuning predicts no pixels")

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """The augmented pictures, framed in green if the predicted class is right, else in red."""
        right = output.prediction.argmax(dim=1) == output.target.argmax(dim=1)
        framed = self.pixels(images).copy()  # B H W C
        width_px = max(1, min(framed.shape[1:3]) // 24)
        inside = np.zeros(framed.shape[1:3], dtype=bool)
        inside[width_px:-width_px, width_px:-width_px] = True
        for picture, hit in zip(framed, right.tolist(), strict=True):
            picture[~inside] = _FRAMES[hit][: picture.shape[-1]]
        return [Panel("class right (green) or wrong (red)", framed)]


def trainable_encoder(card: BundleCard, image_size: tuple[int, int]) -> EncoderConfig:
    """The architecture that takes a bundle's weights and can train all of them.

    Args:
        card: the bundle's description, bundle.json.
        image_size: (height, width) of the pictures to train on.

    Raises:
        BundleError: the encoder does not fit the size.

    Source: official MAE code, `models_vit.py`: fixed sin-cos positions become trained ones.
        Official BEiT code, `run_class_finetuning.py`: relative positions that all blocks share
        become those of each block.
    """
    encoder = for_size(card.encoder, card.image_size, image_size)
    changed = {}
    if isinstance(encoder, ViTConfig) and encoder.positions == "sincos":
        changed["positions"] = "learned"
    if _shares(encoder):
        changed["rel_pos_bias"] = "per_block"
    return encoder.model_copy(update=changed)


def _shares(encoder: EncoderConfig) -> bool:
    """True if one table of relative positions serves all blocks."""
    return isinstance(encoder, ViTConfig) and encoder.rel_pos_bias == "shared"


def _word(value: object) -> str:
    """A value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _held(recipe: Recipe, card: BundleCard) -> dict[str, Any]:
    """Check a recipe's encoder against that of the bundle it begins with.

    Raises:
        ConfigError: their channels or architectures differ.
    """
    method = recipe.method
    assert isinstance(method, FinetuneConfig)
    if card.channels != recipe.data.channels:
        raise ConfigError(
            f"method.bundle {method.bundle} reads {card.channels} channels, data.channels is "
            f"{recipe.data.channels}",
            hint=f"--set data.channels={card.channels}",
        )
    ours = recipe.encoder.model_dump(exclude=_FREE)
    theirs = trainable_encoder(card, recipe.data.image_size).model_dump(exclude=_FREE)
    if _shares(card.encoder) and _shares(recipe.encoder):
        theirs["rel_pos_bias"] = "shared"  # may stay so, too
    wrong = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if wrong:
        listed = ", ".join(f"encoder.{key} {ours.get(key)!r}" for key in wrong)
        wanted = " ".join(f"--set encoder.{key}={_word(theirs.get(key))}" for key in wrong)
        raise ConfigError(
            f"method.bundle {method.bundle} has another encoder than the recipe, which has "
            f"{listed}",
            hint=wanted
            if isinstance(recipe.encoder, type(card.encoder))
            else f"an encoder: section for {card.encoder.name}",
        )
    return {}
