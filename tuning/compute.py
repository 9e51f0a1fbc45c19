"""Compute of a trial, by which trials may be compared in place of pictures seen."""

from __future__ import annotations

import functools

from mimray.trainers.config.run import Plan


def training_flops(plan: Plan) -> float:
    """FLOPs of forward and backward pass for one picture, counted on shapes alone.

    Args:
        plan: the plan of a trial; its length does not matter.
    """
    return _training_flops(plan.recipe.model_dump_json(exclude={"about"}), plan.micro_batch_size)


@functools.lru_cache(maxsize=1024)
def _training_flops(recipe_json: str, micro_batch_size: int) -> float:
    import torch

    from mimray.trainers.config.run import Recipe
    from mimray.trainers.cost.step import shape_of, trace
    from mimray.trainers.methods.needs import foresee

    recipe, networks, _ = foresee(Recipe.model_validate_json(recipe_json))
    method = shape_of(recipe, torch.float32, networks)
    return trace(method, micro_batch_size, checkpointing=False, on_gpu=False).training_flops
