"""Masked autoencoder.

Source: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners".
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainers.config.run import Recipe
from trainers.data.masks import random_mask
from trainers.methods.base import Method
from trainers.models import build_encoder
from trainers.models.decoders import MAEDecoder
from trainers.models.patches import patchify, unpatchify
from trainers.types import MethodOutput

NORM_PIX_EPS = 1e-6


class MAE(Method):
    """Encode the visible patches, decode all, score the hidden ones in pixels."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.decoder = MAEDecoder(
            encoder_width=self.encoder.width,
            width=config.decoder_width,
            depth=config.decoder_depth,
            num_heads=config.decoder_num_heads,
            grid=recipe.grid,
            out_dim=self.encoder.patch_size**2 * data.channels,
        )
        self.norm_pix_loss = config.norm_pix_loss

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Mean squared error over hidden patches only (He et al. 2022, sec. 3)."""
        if mask is None:
            mask = self._draw_masks(images.shape[0]).to(images.device)
        visible = self.encoder(images, mask)
        prediction = self.decoder(visible.tokens, visible.prefix, mask)  # B N P
        target = patchify(images, self.encoder.patch_size)  # B N P
        if self.norm_pix_loss:
            target = normalise_patches(target)
        # The reduction stays in fp32 whatever the model computes in.
        error = (prediction.float() - target.float()).square().mean(dim=-1)  # B N
        loss = (error * mask).sum() / mask.sum()
        return MethodOutput(loss=loss, prediction=prediction, target=target, mask=mask)

    @staticmethod
    def draw_mask(recipe: Recipe, rng: np.random.Generator) -> Bool[np.ndarray, N]:
        """Uniformly random patches."""
        return random_mask(rng, recipe.grid, recipe.method.mask_ratio)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput
    ) -> Float[Tensor, "B C H W"]:
        """Predicted pixels.

        Normalised targets carry no mean and contrast of their own; those of the picture's
        *visible* patches are lent to them, since a hidden patch's own would leak the answer.
        """
        prediction = output.prediction.float()
        if self.norm_pix_loss:
            patches = patchify(images, self.encoder.patch_size).float()  # B N P
            seen = (~output.mask).unsqueeze(-1)  # B N 1
            count = seen.sum(dim=(1, 2), keepdim=True) * patches.shape[-1]
            mean = (patches * seen).sum(dim=(1, 2), keepdim=True) / count
            spread = patches.var(dim=-1, keepdim=True).sqrt()  # B N 1
            contrast = (spread * seen).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True)
            prediction = prediction * contrast + mean
        grid = (
            images.shape[2] // self.encoder.patch_size,
            images.shape[3] // self.encoder.patch_size,
        )
        return unpatchify(prediction, self.encoder.patch_size, grid)

    def _draw_masks(self, batch_size: int) -> Bool[Tensor, "B N"]:
        seed = int(torch.randint(2**62, ()))
        rng = np.random.default_rng(seed)
        return torch.from_numpy(
            np.stack([self.draw_mask(self.recipe, rng) for _ in range(batch_size)])
        )


def normalise_patches(patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
    """Zero mean and unit (unbiased) variance a patch.

    Source: He et al. 2022, sec. 3 "Reconstruction target"; eps 1e-6 as in the official code.
    """
    mean = patches.mean(dim=-1, keepdim=True)
    variance = patches.var(dim=-1, keepdim=True)
    return (patches - mean) / (variance + NORM_PIX_EPS).sqrt()
