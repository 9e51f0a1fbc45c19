"""Masks, True = hidden, and random numbers of a picture, as each method draws them.

The decode processes call these functions, which stand apart from the methods so that no decode
process imports a network.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.capi import CAPIConfig
from mimray.trainers.config.distill import DistillConfig
from mimray.trainers.config.ibot import IBOTConfig
from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.maskfeat import MaskFeatConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.config.simmim import SimMIMConfig
from mimray.trainers.data.masks import block_mask, inverse_block_mask, random_mask, unit_mask


def mae_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
    """Draw a mask of uniformly random patches."""
    assert isinstance(recipe.method, MAEConfig)
    return random_mask(rng, recipe.grid, recipe.method.mask_ratio)


def draw_order(rng: np.random.Generator, num_patches: int) -> Float[np.ndarray, N]:
    """Draw the order in which patches are decoded: each one's place in it, from 0."""
    return rng.permutation(num_patches)


def simmim_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
    """Draw a mask of uniformly random units of tokens, or of single tokens."""
    config, stride = recipe.method, recipe.encoder.stride
    assert isinstance(config, SimMIMConfig)
    unit_px = config.mask_unit_px or stride
    return unit_mask(rng, recipe.grid, unit_px // stride, config.mask_ratio)


def maskfeat_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
    """Draw a block-wise mask as in BEiT, or one of uniformly random patches."""
    config = recipe.method
    assert isinstance(config, MaskFeatConfig)
    if config.masking == "random":
        return random_mask(rng, recipe.grid, config.mask_ratio)
    return _blocks(config, recipe.grid, rng)


def beit_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
    """Draw a block-wise mask; the number of hidden patches varies."""
    config = recipe.method
    assert isinstance(config, BEiTConfig)
    return _blocks(config, recipe.grid, rng)


def distill_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N] | None:
    """Draw blocks, whose number of patches varies, or random patches."""
    config = recipe.method
    assert isinstance(config, DistillConfig)
    if not config.mask_ratio:
        return None
    if config.masking == "random":
        return random_mask(rng, recipe.grid, config.mask_ratio)
    return _blocks(config, recipe.grid, rng)


def ibot_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N] | None:
    """Hide nothing, or a share of the patches that is itself drawn.

    Views without a mask keep the class token of whole pictures in the student's experience.
    """
    config, (rows, columns) = recipe.method, recipe.grid
    assert isinstance(config, IBOTConfig)
    if rng.random() >= config.masked_share:
        return np.zeros(rows * columns, dtype=bool)
    ratio = float(rng.uniform(*config.mask_ratio))
    if config.masking == "random":
        return random_mask(rng, recipe.grid, ratio)
    return block_mask(
        rng,
        recipe.grid,
        max_hidden=int(rows * columns * ratio),
        min_block_patches=max(1, (min(rows, columns) // 3) ** 2),
        min_block_aspect=config.min_block_aspect,
    )


def capi_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
    """Draw a mask that leaves one rectangle visible."""
    config = recipe.method
    assert isinstance(config, CAPIConfig)
    return inverse_block_mask(
        rng,
        recipe.grid,
        num_hidden=config.num_hidden(recipe.grid[0] * recipe.grid[1]),
        min_block_aspect=config.min_block_aspect,
    )


def draw_priority(rng: np.random.Generator, num_places: int) -> Float[np.ndarray, N]:
    """Random numbers that rank the places of a picture."""
    return rng.random(num_places)


def _blocks(
    config: BEiTConfig | DistillConfig | MaskFeatConfig,
    grid: tuple[int, int],
    rng: np.random.Generator,
) -> Bool[np.ndarray, N]:
    """Draw blocks that hide at most the config's share of the patches."""
    return block_mask(
        rng,
        grid,
        max_hidden=int(grid[0] * grid[1] * config.mask_ratio),
        min_block_patches=config.min_block_patches,
        min_block_aspect=config.min_block_aspect,
    )
