"""Scores of raw pixels: what patches of a picture are worth without any encoder.

    python benchmarks/pixels.py knn|linear|segmentation|dense-knn|detection DATA [KEY=VALUE…]

An encoder whose tokens are the pixels of its patches goes through the same tasks as others. Whole
pictures are one patch of 32 x 32 pixels, feature maps are of patches of 8 x 8.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimray.trainers.bundles import BundleCard, FrozenEncoder
from mimray.trainers.config.data import IMAGENET_MEAN, IMAGENET_STD
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.measure import measure
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.evaluation.tasks import TASKS, task_config
from mimray.trainers.types import Features

WHOLE_PX, PATCH_PX = 32, 8


class Pixels(nn.Module):
    """An encoder without weights: tokens are the values of a patch.

    Args:
        patch_px: the side of a patch, pixels.
    """

    def __init__(self, patch_px: int) -> None:
        super().__init__()
        self.depth, self.stride = 1, patch_px
        self.strides, self.widths = (patch_px,), (3 * patch_px**2,)

    def forward(self, images: Tensor) -> Features:
        """Features of pictures, float [B, 3, H, W]; there is no token without a place."""
        maps = nn.functional.pixel_unshuffle(images, self.stride)  # B D h w
        tokens = maps.flatten(2).transpose(1, 2)
        return Features(tokens, tokens[:, :0], tokens.mean(dim=1), (maps.shape[2], maps.shape[3]))

    def features(
        self, images: Tensor, layers: Sequence[int], norm: bool = True
    ) -> tuple[Tensor, ...]:
        """One map for each layer asked for, all alike."""
        return tuple(nn.functional.pixel_unshuffle(images, self.stride) for _ in layers)


@dataclass(frozen=True)
class PixelsRef(EncoderRef):
    """Raw pixels by reference.

    Attributes:
        side_px: the side of the pictures, pixels.
        patch_px: the side of a patch, pixels.
    """

    side_px: int = 64
    patch_px: int = PATCH_PX

    def card(self) -> BundleCard:
        """A card with the width of a patch's values; no network has its shape."""
        shape = {"width": 3 * self.patch_px**2, "depth": 1, "num_heads": 1}
        encoder = ViTConfig.model_validate(
            {"name": "vit", "patch_size": self.patch_px, "class_token": False, **shape}
        )
        return BundleCard(
            name=self.text,
            encoder=encoder,
            image_size=(self.side_px, self.side_px),
            channels=3,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            layers=(0,),
            weights_sha256=f"{self.text} {self.side_px} {self.patch_px}",
        )

    def load(self) -> FrozenEncoder:
        """The encoder, on the CPU."""
        return FrozenEncoder(Pixels(self.patch_px), self.card())  # type: ignore[arg-type]


def pixels_scored(
    task: str,
    data: Path,
    options: Sequence[str] = (),
    *,
    epochs: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The result of raw pixels in a task, as `mimray evaluate --json` has it, in short.

    Args:
        task: the task's name.
        data: the labelled pictures.
        options: `key=value` each.
        epochs: the length of what is trained; the task's own by default.
        limit: the most pictures of each part; None for all.
    """
    side, patch = (64, PATCH_PX) if TASKS[task].dense else (WHOLE_PX, WHOLE_PX)
    ref = PixelsRef("raw pixels", side_px=side, patch_px=patch)
    with tempfile.TemporaryDirectory(prefix="mimray-") as scratch:
        setting = Setting(
            data=str(data),
            val=None,
            limit=limit,
            seed=0,
            skip_invalid=True,
            device="cpu",
            folder=Path(scratch) / "state",
            progress=lambda phase, done, total: None,
            keep_features=False,
        )
        score = measure(task, ref, setting, task_config(TASKS[task], options, epochs))
    return {
        "metric": score.metric,
        "headline": score.headline,
        "standard_error": score.standard_error,
        "num_val": score.num_val,
        "metrics": dict(score.metrics),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=[name for name in TASKS if name != "rankme"])
    parser.add_argument("data", type=Path)
    parser.add_argument("options", nargs="*")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = pixels_scored(
        arguments.task,
        arguments.data,
        arguments.options,
        epochs=arguments.epochs,
        limit=arguments.limit,
    )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
