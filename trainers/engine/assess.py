"""Examination of a trained method by pictures that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from mimray.trainers.config.run import Plan, Recipe
from mimray.trainers.data.decoded import Pictures
from mimray.trainers.data.hold_out import validation_split
from mimray.trainers.data.resample import to_image
from mimray.trainers.data.selection import evenly_spread, open_training
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.errors import ImageError, MimrayError
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.inputs import whole_pictures

BATCH = 32


def assess_method(
    plan: Plan, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Let a method examine itself by pictures that it was not trained on.

    These are the dataset's validation or test split. Where it has none they are training pictures,
    whole and without augmentation, and the figures say so.

    Args:
        plan: the run's plan.
        state: whole fp32 weights of the method, by name.

    Returns:
        The method's figures, with the number and the place of the pictures; empty if it examines
        nothing or no picture can be read. And warnings.
    """
    method = build_method(plan.recipe)
    if not method.pictures_to_assess:
        return {}, ()
    method.load_state_dict(dict(state))
    try:
        source, split = _pictures(plan)
        chosen = evenly_spread(len(source), method.pictures_to_assess)
        batches = list(_batches(source, plan.recipe, chosen.tolist()))
    except MimrayError as error:
        return {}, (f"not examined by held-out pictures: {error}",)
    if not batches:
        where = f"the {len(chosen)} pictures of split {split} of {plan.data.uri}"
        return {}, (f"not examined by held-out pictures: none of {where} can be decoded",)
    figures, warnings = method.eval().assess(batches)
    count = sum(len(batch) for batch in batches)
    said = tuple(f"{count} pictures of split {split}: {warning}" for warning in warnings)
    seen = {"pictures": count, "undecodable": len(chosen) - count, "split": split}
    return {**figures, **seen, "data": plan.data.uri}, said


def _pictures(plan: Plan) -> tuple[Source, str]:
    """Pictures to examine by, and the name of their split."""
    uri = plan.data.uri
    split = validation_split(uri)
    if split is None:
        return open_training(uri, plan.recipe), "train"
    return open_source(uri, split=split, cache_mib=plan.recipe.data.cache_mib), split


def _batches(source: Source, recipe: Recipe, chosen: list[int]) -> Iterator[Tensor]:
    """Normalised whole pictures; those that cannot be decoded are left out."""
    inputs = inputs_of(recipe)
    pictures = Pictures(source, cache_mib=0, labels=False)
    found: list[Image.Image] = []
    for position, index in enumerate(chosen):
        try:
            picture = pictures[index]
            found.append(to_image(picture.decoded(recipe.data.image_size[::-1])))
        except ImageError:
            pass
        if found and (len(found) == BATCH or position == len(chosen) - 1):
            yield whole_pictures(found, inputs, recipe, seed=recipe.seed)["images"]
            found = []
