"""Masked autoencoder (MAE).

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners".
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.masks import random_mask
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.losses import masked_mean
from mimray.trainers.models import build_encoder
from mimray.trainers.models.decoders import MAEDecoder
from mimray.trainers.models.patches import patchify, unpatchify
from mimray.trainers.types import MethodOutput

NORM_PIX_EPS = 1e-6


class MAE(Method):
    """Encodes the visible patches, decodes all, and scores the pixels of the hidden ones."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, MAEConfig)
        assert isinstance(recipe.encoder, ViTConfig)
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.decoder = MAEDecoder(
            encoder_width=self.encoder.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            grid=recipe.grid,
            out_dim=self.encoder.stride**2 * data.channels,
            norm_eps=recipe.encoder.norm_eps,
            num_prefix=recipe.encoder.num_prefix_tokens,
        )
        self.norm_pix_loss = config.norm_pix_loss

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Mean squared error over hidden patches only (He et al. 2022, sec. 3)."""
        if mask is None:
            mask = self.draw_masks(images)
        visible = self.encoder(images, mask)
        prediction = self.decoder(visible.tokens, visible.prefix, mask)  # B N P
        target = patchify(images, self.encoder.stride)  # B N P
        if self.norm_pix_loss:
            target = normalise_patches(target)
        error = (prediction.float() - target.float()).square().mean(dim=-1)  # B N
        return MethodOutput(masked_mean(error, mask), prediction, target, mask)

    @staticmethod
    def draw_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
        """Draw a mask of uniformly random patches."""
        assert isinstance(recipe.method, MAEConfig)
        return random_mask(rng, recipe.grid, recipe.method.mask_ratio)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Turn predictions into normalised pictures.

        Normalised targets lack a patch's mean and contrast. They are interpolated from the visible
        patches around, since a hidden patch's own, the oracle's, leak the answer.
        """
        patch = self.encoder.stride
        grid = images.shape[2] // patch, images.shape[3] // patch
        prediction = output.prediction.float()  # B N P
        if self.norm_pix_loss:
            patches = patchify(images, patch).float()  # B N P
            variance, mean = torch.var_mean(patches, dim=-1)  # B N
            if oracle:
                prediction = prediction * variance.sqrt().unsqueeze(-1) + mean.unsqueeze(-1)
                return unpatchify(prediction, patch, grid)
            weights = _nearness(grid, images.device) * (~output.mask).unsqueeze(1)  # B N N
            weights = weights / weights.sum(dim=-1, keepdim=True)
            borrowed = weights @ torch.stack([variance.sqrt(), mean], dim=-1)  # B N 2
            prediction = prediction * borrowed[..., :1] + borrowed[..., 1:]
        return unpatchify(prediction, patch, grid)


def normalise_patches(patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
    """Normalise each patch to zero mean and unit (unbiased) variance.

    Source: He et al. 2022, sec. 3 "Reconstruction target"; eps 1e-6 as in the official code.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + NORM_PIX_EPS).sqrt()


def _nearness(grid: tuple[int, int], device: torch.device) -> Float[Tensor, "N N"]:
    """Interpolation weights between patches: the inverse cube of their distance."""
    rows, columns = torch.meshgrid(
        torch.arange(grid[0], device=device), torch.arange(grid[1], device=device), indexing="ij"
    )
    places = torch.stack([rows.flatten(), columns.flatten()], dim=-1).float()  # N 2
    return torch.cdist(places, places).clamp(min=0.5) ** -3
