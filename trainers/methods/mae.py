"""Masked autoencoder (MAE), and CrossMAE.

Sources: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"; Fu et al. 2024,
"Rethinking Patch Dependence for Masked Autoencoders".
"""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Numbers
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.draws import draw_order, mae_mask
from mimray.trainers.methods.losses import masked_mean
from mimray.trainers.models import build_encoder
from mimray.trainers.models.decoders import CrossDecoder, MAEDecoder, mae_decoder
from mimray.trainers.models.patches import patchify, take_tokens, unpatchify, visible_indices
from mimray.trainers.pictures import hide_patches
from mimray.trainers.types import MethodOutput, Panel

NORM_PIX_EPS = 1e-6


class MAE(Method):
    """Encodes the visible patches, decodes the hidden ones, and scores their pixels.

    Attributes:
        config: the recipe's `method` section.
        decoder: a decoder of all patches at once, or of hidden ones each by itself.
    """

    decoder: MAEDecoder | CrossDecoder

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, MAEConfig)
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.decoder = mae_decoder(recipe)

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """One masked view; and the order in which hidden patches are decoded, if not all are."""
        assert isinstance(recipe.method, MAEConfig)
        inputs = super().views(recipe)
        if recipe.method.decode_ratio == 1:
            return inputs
        return (*inputs, Numbers(partial(draw_order, num_patches=math.prod(recipe.grid)), "order"))

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        order: Float[Tensor, "B N"] | None = None,
    ) -> MethodOutput:
        """Mean squared error over hidden patches only (He et al. 2022, sec. 3).

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator by default.
            order: a number for each patch; those hidden patches are decoded whose numbers are the
                least. Drawn from torch's generator by default, and without effect where all hidden
                patches are decoded: outside training, and with `decode_ratio` 1.

        Returns:
            Predictions and targets of all patches; in training with the cross decoder, of the
            decoded ones alone, float [B, M, P].
        """
        if mask is None:
            mask = self.draw_masks(images)
        if isinstance(self.decoder, CrossDecoder):
            return self._cross(self.decoder, images, mask, order)
        visible = self.encoder(images, mask)
        prediction = self.decoder(visible.tokens, visible.prefix, mask)  # B N P
        target = self._targets(patchify(images, self.encoder.stride))  # B N P
        error = (prediction.float() - target.float()).square().mean(dim=-1)  # B N
        return MethodOutput(masked_mean(error, mask), prediction, target, mask)

    def _cross(
        self, decoder: CrossDecoder, images: Tensor, mask: Tensor, order: Tensor | None
    ) -> MethodOutput:
        """The loss of the patches that are decoded, each from the visible ones alone."""
        places = self.decoded(mask, order)  # B M
        layers = self.config.chosen_layers(self.encoder.depth) or (self.encoder.depth - 1,)
        visible = self.encoder(images, mask, layers=layers)
        prediction = decoder(visible.layers, places)  # B M P
        patches = patchify(images, self.encoder.stride)  # B N P
        target = self._targets(take_tokens(patches, places))  # B M P
        loss = (prediction.float() - target.float()).square().mean()
        if not self.training:
            spread = places.unsqueeze(-1).expand_as(prediction)
            prediction = prediction.new_zeros(patches.shape).scatter(1, spread, prediction)
            target = self._targets(patches)
        return MethodOutput(loss, prediction, target, mask)

    def decoded(self, mask: Bool[Tensor, "B N"], order: Float[Tensor, "B N"] | None) -> Tensor:
        """Indices of the hidden patches that the cross decoder decodes, int64 [B, M].

        Args:
            mask: True = hidden, as many in each row.
            order: as for `forward`.
        """
        if not self.training or self.config.decode_ratio == 1:
            return visible_indices(~mask)  # those that the inverse mask shows
        num_decoded = self.config.num_decoded(int(mask[0].sum()))
        if order is None:
            order = torch.rand(mask.shape, device=mask.device)
        order = order.masked_fill(~mask, torch.inf)
        return order.argsort(dim=1, stable=True)[:, :num_decoded]

    def _targets(self, patches: Float[Tensor, "B N P"]) -> Float[Tensor, "B N P"]:
        return normalise_patches(patches) if self.config.norm_pix_loss else patches

    draw_mask = staticmethod(mae_mask)

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
        if self.config.norm_pix_loss:
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

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Draw predictions beside the originals; grey where the cross decoder predicts nothing."""
        panels = super().panels(images, output, oracle=oracle)
        if isinstance(self.decoder, CrossDecoder):
            *others, (title, drawn) = panels
            visible = ~output.mask.cpu().numpy()
            panels = [*others, Panel(title, hide_patches(drawn, visible, self.encoder.stride))]
        return panels


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
