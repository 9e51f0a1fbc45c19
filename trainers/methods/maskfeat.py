"""MaskFeat: prediction of the histograms of oriented gradients (HOG) of hidden patches.

Source: Wei et al. 2022, "Masked Feature Prediction for Self-Supervised Visual Pre-Training".
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.maskfeat import MaskFeatConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Masks, training_view
from mimray.trainers.glyphs import draw_glyphs
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.draws import maskfeat_mask
from mimray.trainers.methods.losses import masked_mean
from mimray.trainers.models import build_encoder
from mimray.trainers.models.decoders import MAEDecoder
from mimray.trainers.models.hog import HOG
from mimray.trainers.pictures import hide_patches
from mimray.trainers.types import MethodOutput, Panel


class MaskFeat(Method):
    """Scores predicted histograms of oriented gradients on the hidden patches.

    Without a decoder (the paper) mask tokens go through the encoder and a linear head predicts;
    with one the encoder sees the visible patches alone, as in MAE.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, MaskFeatConfig)
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.hog = HOG(data.channels, config.hog_bins, config.hog_cell_px, self.encoder.stride)
        self.decoder: MAEDecoder | None = None
        if config.decoder_depth:
            assert isinstance(recipe.encoder, ViTConfig)
            self.decoder = MAEDecoder(
                encoder_width=self.encoder.width,
                width=config.decoder_width,
                depth=config.decoder_depth,
                num_heads=config.decoder_num_heads,
                grid=recipe.grid,
                out_dim=self.hog.out_dim,
                num_prefix=recipe.encoder.num_prefix_tokens,
            )
        else:
            self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.embed_width))
            self.head = nn.Linear(self.encoder.width, self.hog.out_dim)
            nn.init.trunc_normal_(self.mask_token, std=0.02)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """One masked view; blocks hide another number of patches in each picture."""
        config = recipe.method
        assert isinstance(config, MaskFeatConfig)
        mean_name = "hidden_mean" if config.masking == "block" else ""
        masks = Masks(partial(cls.draw_mask, recipe), mean_name=mean_name)
        return (training_view(recipe, masks=masks),)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        hidden_mean: Float[Tensor, ""] | None = None,
    ) -> MethodOutput:
        """Mean squared error over hidden patches only.

        The mean is over the values of a patch too, as in the official code. Targets are cut from
        the HOG of the whole picture, so that cells at a patch's border see its neighbours.

        Args:
            images: normalised pictures.
            mask: True = hidden; drawn from torch's generator by default.
            hidden_mean: as for `masked_mean`.

        Source: Wei et al. 2022, sec. 3.
        """
        if mask is None:
            mask = self.draw_masks(images)
        prediction = self._predict(images, mask)  # B N P
        target = self.hog(images)  # B N P
        error = (prediction.float() - target).square().mean(dim=-1)  # B N
        loss = masked_mean(error, mask, hidden_mean)
        return MethodOutput(loss, prediction, target, mask)

    draw_mask = staticmethod(maskfeat_mask)

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Raise NotImplementedError: histograms give no pixels."""
        raise NotImplementedError("MaskFeat predicts no pixels")

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """Draw histograms as strokes along edges; visible patches show their true ones."""
        original = self.pixels(images)
        mask, stride = output.mask, self.encoder.stride
        grid = images.shape[2] // stride, images.shape[3] // stride
        predicted = output.prediction.detach().float()
        filled = torch.where(mask.unsqueeze(-1), predicted, output.target)  # B N P
        return [
            Panel("original", original),
            Panel("masked", hide_patches(original, mask.cpu().numpy(), stride)),
            Panel("HOG of the original", self._glyphs(output.target, grid)),
            Panel("predicted HOG", self._glyphs(filled, grid)),
        ]

    def _predict(self, images: Tensor, mask: Tensor) -> Tensor:
        if self.decoder is None:
            encoded = self.encoder(images, mask, self.mask_token)
            prediction: Tensor = self.head(encoded.tokens)
        else:
            encoded = self.encoder(images, mask)
            prediction = self.decoder(encoded.tokens, encoded.prefix, mask)
        return prediction

    def _glyphs(self, patches: Float[Tensor, "B N P"], grid: tuple[int, int]) -> np.ndarray:
        """Histograms averaged over channels, drawn as uint8 [B, _, _, 1]."""
        cells = self.hog.to_cells(patches, grid).mean(dim=1)  # B K R S
        return draw_glyphs(cells.permute(0, 2, 3, 1).cpu().numpy())
