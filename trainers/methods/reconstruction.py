"""Pictures of a trained method's predictions, for people."""

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
    """The panels of a reconstruction, and its masks.

    Attributes:
        panels: the columns of the sheet, each with one picture per row.
        mask: bool [B, N], True = hidden; None if the method hides nothing.
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
    """Mask pictures and draw the method's predictions.

    Args:
        method: a trained method in evaluation mode.
        pictures: RGB pictures of any size.
        mask_ratio: share of patches to hide; the recipe's own by default.
        seed: the seed of the masks, which depend on it, the ratio and a picture's position.
        oracle: True to use the statistics of hidden patches, see `Method.reconstruct`.

    Raises:
        ConfigError: the method draws no pictures, or takes no such mask ratio.
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
