"""Contents of a checkpoint under our names, whoever wrote it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mimray.trainers.convert.names import from_pixel_shuffle
from mimray.trainers.errors import BundleError

# Pixels to [-1, 1], as many libraries do and BEiT by default.
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
# CLIP's, which EVA-02 kept.
CLIP: dict[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
NO_ATTENTION_POOLING = (
    "the source pools by attention, which is left out; here the mean of the patches stands for a "
    "picture"
)
DINOV3_LICENCE = (
    "DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license)"
)


@dataclass
class ForeignWeights:
    """Weights of another library, with everything that their source tells of them.

    Attributes:
        encoder: parameters under our encoders' names; what has no place there keeps its own.
        method: the rest of the method's parameters, under the method's names.
        tree: sections `encoder`, `method` and `data` of a recipe, as far as the source tells.
            Weights of an encoder alone have no `method`.
        pooling: vector that stands for a whole picture.
        notes: sentences for people.
        license: the licence, as far as the source tells.
    """

    encoder: dict[str, Tensor]
    method: dict[str, Tensor] = field(default_factory=dict)
    tree: dict[str, dict[str, Any]] = field(default_factory=dict)
    pooling: Literal["mean", "cls"] = "mean"
    notes: list[str] = field(default_factory=list)
    license: str = ""

    @property
    def channels(self) -> int:
        """Channels of the pictures.

        Raises:
            BundleError: the weights are of no encoder of ours.
        """
        if "patch_embed.proj.weight" not in self.encoder:
            raise BundleError(
                "these are weights of neither a vit nor a swin: no patch_embed.proj.weight"
            )
        return self.encoder["patch_embed.proj.weight"].shape[1]


def take(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Move parameters out of a state; those that are not there stay missing.

    Args:
        state: parameters by their names, of which those are taken out.
        names: theirs to ours.
    """
    return {ours: state.pop(theirs) for theirs, ours in names.items() if theirs in state}


def take_pixel_head(state: dict[str, Tensor], patch_embed: str) -> dict[str, Tensor]:
    """Move SimMIM's `decoder.0`, a 1x1 convolution before a pixel shuffle, out as our `head`.

    Args:
        state: parameters by their names, of which the head is taken out.
        patch_embed: name of the convolution that shows the channels of the pictures.
    """
    head = take(state, {"decoder.0.weight": "head.weight", "decoder.0.bias": "head.bias"})
    channels = state[patch_embed].shape[1] if patch_embed in state else 0
    for key, value in head.items():
        rows = value.flatten(1) if value.ndim > 1 else value
        if channels and rows.shape[0] == channels * math.isqrt(rows.shape[0] // channels) ** 2:
            rows = from_pixel_shuffle(rows, channels)
        head[key] = rows
    return head


def norm_before_pooling(state: dict[str, Tensor], norm: str, notes: list[str]) -> dict[str, Tensor]:
    """Take the norm of pooled tokens for that of all tokens, where a model has no other.

    Args:
        state: parameters of an encoder.
        norm: name of the norm of pooled tokens.
        notes: sentences for people, to which one is added.
    """
    if "norm.weight" in state or f"{norm}.weight" not in state:
        return state
    notes.append(
        f"the source averages tokens before its last norm ({norm}); here the norm comes first, so "
        "pooled features differ from its own"
    )
    moved = take(state, {f"{norm}.weight": "norm.weight", f"{norm}.bias": "norm.bias"})
    return state | moved
