"""Arguments of a method's `forward`: from a batch, from whole pictures, or without values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.erasing import erase
from mimray.trainers.data.views import (
    Inputs,
    Labels,
    Numbers,
    draw_masks,
    numbered,
    whole_picture,
)
from mimray.trainers.models.normalise import normalise
from mimray.trainers.types import Batch

if TYPE_CHECKING:
    from PIL import Image

Arguments = dict[str, Tensor]


def arguments_of(batch: Batch, inputs: Inputs, recipe: Recipe, device: torch.device) -> Arguments:
    """Move a batch to a device, and normalise and erase its pictures as the views declare.

    Args:
        batch: a batch of the loader.
        inputs: the method's declared inputs, by which the batch was made.
        recipe: the recipe, with its normalisation and seed.
        device: the target device.
    """
    arguments = {
        name: tensor.to(device, non_blocking=True) for name, tensor in batch.inputs.items()
    }
    for view, first in numbered(inputs):
        if not view.normalised:
            continue
        # In fp32, as targets are; encoders cast their input themselves.
        images = _normalised(arguments[view.name], recipe)
        if view.erasing:
            crops = images.unsqueeze(1) if view.count == 1 else images
            for k in range(view.count):
                erase(
                    crops[:, k],
                    view.erasing,
                    seed=recipe.seed,
                    epochs=batch.epoch,
                    indices=batch.indices,
                    view=first + k,
                )
        arguments[view.name] = images
    return arguments


def whole_pictures(
    pictures: Sequence[Image.Image], inputs: Inputs, recipe: Recipe, *, seed: int
) -> Arguments:
    """Make arguments of whole, unflipped pictures, masked but not augmented.

    Args:
        pictures: RGB pictures of any size.
        inputs: the method's declared inputs.
        recipe: the recipe, with its channels and normalisation.
        seed: the seed of the masks, which depend on it and on a picture's position.
    """
    made: dict[str, list[np.ndarray]] = {}
    for number, picture in enumerate(pictures):
        image = picture.convert("L") if recipe.data.channels == 1 else picture
        for view, first in numbered(inputs):
            made.setdefault(view.name, []).append(whole_picture(view, image))
            if view.masks is not None:
                masks = draw_masks(view, first, seed=seed, epoch=number)
                made.setdefault(view.masks.name, []).append(masks)
    arguments = {name: torch.from_numpy(np.stack(found)) for name, found in made.items()}
    for view, _ in numbered(inputs):
        if view.normalised:
            arguments[view.name] = _normalised(arguments[view.name], recipe)
    return arguments


def placeholders(inputs: Inputs, recipe: Recipe, batch: int, dtype: torch.dtype) -> Arguments:
    """Make arguments on torch's meta device; masks have values, since shapes depend on them.

    Random numbers are left out, as they are outside training: they cost nothing.

    Args:
        inputs: the method's declared inputs.
        recipe: the recipe, with its number of channels.
        batch: the batch size B.
        dtype: the data type of normalised pictures.
    """
    arguments: Arguments = {}
    rng = np.random.default_rng(0)
    for wanted in inputs:
        if isinstance(wanted, Numbers):
            continue
        if isinstance(wanted, Labels):
            arguments[wanted.name] = torch.empty(batch, dtype=torch.int64, device="meta")
            continue
        views = () if wanted.count == 1 else (wanted.count,)
        arguments[wanted.name] = torch.empty(
            (batch, *views, recipe.data.channels, *wanted.size),
            dtype=dtype if wanted.normalised else torch.uint8,
            device="meta",
        )
        if wanted.masks is not None:
            masks = () if wanted.masks.count == 1 else (wanted.masks.count,)
            count = batch * wanted.count * wanted.masks.count
            drawn = np.stack([wanted.masks.draw(rng) for _ in range(count)])
            arguments[wanted.masks.name] = torch.from_numpy(drawn).reshape(
                batch, *views, *masks, -1
            )
    return arguments


def _normalised(pixels: Tensor, recipe: Recipe) -> Tensor:
    """Normalised pictures, in fp32, of uint8 [B, C, H, W] or [B, V, C, H, W]."""
    flat = pixels.flatten(0, -4)  # (B V) C H W
    return normalise(flat, recipe.data.mean, recipe.data.std).reshape(pixels.shape)
