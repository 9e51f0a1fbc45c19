"""SimMIM: mask tokens through the whole encoder, and a linear head to pixels.

Source: Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling".
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mimray.trainers.config.run import Recipe
from mimray.trainers.config.simmim import SimMIMConfig
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.draws import simmim_mask
from mimray.trainers.methods.losses import masked_mean
from mimray.trainers.models import build_encoder
from mimray.trainers.models.patches import patchify
from mimray.trainers.types import MethodOutput


class SimMIM(Method):
    """Scores the raw pixels of the hidden patches.

    `head` gives the pixels of one output token in the order of `patchify`: row, column, channel.
    The official 1x1 convolution and pixel shuffle are the same map in the order channel, row,
    column: its output `(c * stride + row) * stride + column` is ours
    `(row * stride + column) * channels + c`.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, SimMIMConfig)
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.encoder.embed_width))
        # Like the official convolution, the head starts at torch's default.
        self.head = nn.Linear(self.encoder.width, self.encoder.stride**2 * data.channels)
        self.squared = config.loss == "l2"
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self, images: Float[Tensor, "B C H W"], mask: Bool[Tensor, "B N"] | None = None
    ) -> MethodOutput:
        """Mean absolute or squared error over the pixels of hidden patches only.

        Source: Xie et al. 2022, sec. 3.4, for the absolute error; the squared one is a variant.
        """
        if mask is None:
            mask = self.draw_masks(images)
        prediction = self.head(self.encoder(images, mask, self.mask_token).tokens)  # B N P
        target = patchify(images, self.encoder.stride)  # B N P
        difference = prediction.float() - target.float()
        error = difference.square() if self.squared else difference.abs()
        return MethodOutput(masked_mean(error.mean(dim=-1), mask), prediction, target, mask)

    draw_mask = staticmethod(simmim_mask)
