"""What a trained method makes of whole pictures, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.methods.inputs import whole_pictures
from mimray.trainers.types import Panel

if TYPE_CHECKING:
    from PIL import Image


class Reconstruction(NamedTuple):
    """Panels column by column, and what was hidden.

    Attributes:
        panels: each with a picture a row.
        mask: bool [B, N], True = hidden; None where the method hides nothing.
    """

    panels: list[Panel]
    mask: np.ndarray | None


def reconstruct(
    method: Method,
    pictures: Sequence[Image.Image],
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
    oracle: bool = False,
) -> Reconstruction:
    """Hide a part of pictures and draw what the method predicts.

    Args:
        method: trained, in evaluation mode.
        pictures: RGB, of any size.
        mask_ratio: share of patches to hide; the recipe's own by default.
        seed: of the masks; the same ones for the same seed, ratio and position.
        oracle: see `Method.panels`.

    Raises:
        ConfigError: the method draws no pictures, or has no such ratio.
    """
    from mimray.trainers.config.run import parse_recipe

    recipe = method.recipe
    if recipe.method.learns_classes:
        raise ConfigError(f"method {recipe.method.name} predicts classes, which draw no picture")
    if mask_ratio is not None:
        tree = recipe.model_dump(mode="json")
        if "mask_ratio" not in tree["method"]:
            raise ConfigError(f"method {recipe.method.name} hides nothing, so it has no mask ratio")
        tree["method"]["mask_ratio"] = mask_ratio
        recipe = parse_recipe(tree, "reconstruct")
    inputs = inputs_of(recipe)
    arguments = whole_pictures(pictures, inputs, recipe, seed=seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        output = method(**arguments)
        panels = method.panels(arguments["images"], output, oracle=oracle)
    mask = arguments.get("mask")
    return Reconstruction(panels, None if mask is None else mask.numpy())
