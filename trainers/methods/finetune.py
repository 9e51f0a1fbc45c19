"""Fine-tuning: classification of labelled pictures, the whole encoder trained end to end.

Source: He et al. 2022 (MAE), A.1 and Table 9; github.com/facebookresearch/mae `main_finetune.py`,
`models_vit.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.finetune import FinetuneConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.views import Inputs, Labels, Numbers
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.mixing import draw_mixing, mix, smoothed_targets
from mimray.trainers.models import build_encoder
from mimray.trainers.types import MethodOutput, Panel

HEAD_STD = 2e-5
_FRAMES = {True: (40, 160, 70), False: (205, 50, 45)}


class Finetune(Method):
    """A linear head on the encoder's pooled features; cross-entropy against soft targets.

    A vit's patches are averaged before the final norm, which thus serves as MAE's `fc_norm`. Other
    encoders' patches are averaged after it, as in the official SimMIM code; a class token is
    normalised too.

    Attributes:
        config: the recipe's `method` section.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, FinetuneConfig)
        assert config.num_classes, "filled in before a method is built"
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.pools_first = config.pooling == "mean" and isinstance(recipe.encoder, ViTConfig)
        self.head = nn.Linear(self.encoder.width, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        """An unmasked view, its class, and the numbers it is mixed by."""
        config = recipe.method
        assert isinstance(config, FinetuneConfig)
        inputs = (*super().views(recipe), Labels())
        if not config.pairs:
            return inputs
        draw = partial(draw_mixing, config=config, size=recipe.data.image_size)
        return (*inputs, Numbers(draw, "mixing"))

    def begin_with(self, encoder: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> None:
        """Load an encoder's weights to begin with.

        A norm after the pooling starts afresh, since it was trained on single patches.

        Args:
            encoder: the encoder's state, of this one's architecture and size.
            rest: nothing.
        """
        super().begin_with(encoder, rest)
        if self.pools_first:
            norm = self.encoder.get_submodule("norm")
            assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
            norm.reset_parameters()

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        mask: Bool[Tensor, "B N"] | None = None,
        labels: Int64[Tensor, " B"] | None = None,
        mixing: Float[Tensor, "B 5"] | None = None,
        partners: Int64[Tensor, " M"] | None = None,
    ) -> MethodOutput:
        """Mean cross-entropy, in training with mixed pictures and smoothed labels.

        Args:
            images: normalised pictures.
            mask: None; fine-tuning hides nothing.
            labels: the pictures' classes.
            mixing: the result of `draw_mixing` for each picture; None to mix nothing.
            partners: rows of the pictures that the first M ones are mixed with; the loss is that of
                these M.

        Returns:
            Logits, target probabilities, and the term `accuracy`, which counts the class of the
            largest target probability as the right one.
        """
        assert mask is None, "fine-tuning hides nothing"
        assert labels is not None, "a loss needs labels; `logits` needs none"
        smoothing = self.config.label_smoothing if self.training else 0.0
        targets = smoothed_targets(labels, self.config.num_classes, smoothing)  # B K
        if self.training and mixing is not None:
            assert partners is not None
            images, targets = mix(images, targets, mixing, partners)
        logits = self.logits(images)
        loss = F.cross_entropy(logits.float(), targets)
        accuracy = (logits.argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        num_tokens = self.recipe.grid[0] * self.recipe.grid[1]
        all_seen = torch.ones(len(images), num_tokens, dtype=torch.bool, device=images.device)
        return MethodOutput(loss, logits, targets, all_seen, {"accuracy": accuracy})

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Scores of the classes before the softmax.

        Args:
            images: normalised pictures.
        """
        features = self.encoder(images, norm=not self.pools_first)
        if self.config.pooling == "cls":
            pooled = features.prefix[:, 0]  # B D
        elif self.pools_first:
            pooled = self.encoder.get_submodule("norm")(features.pooled)
        else:
            pooled = features.pooled
        scores: Tensor = self.head(pooled)
        return scores

    def reconstruct(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> Float[Tensor, "B C H W"]:
        """Raise NotImplementedError: classes give no pixels."""
        raise NotImplementedError("fine-tuning predicts no pixels")

    def panels(
        self, images: Float[Tensor, "B C H W"], output: MethodOutput, *, oracle: bool = False
    ) -> list[Panel]:
        """The augmented pictures, framed in green if the predicted class is right, else in red."""
        right = output.prediction.argmax(dim=1) == output.target.argmax(dim=1)
        framed = self.pixels(images).copy()  # B H W C
        width_px = max(1, min(framed.shape[1:3]) // 24)
        inside = np.zeros(framed.shape[1:3], dtype=bool)
        inside[width_px:-width_px, width_px:-width_px] = True
        for picture, hit in zip(framed, right.tolist(), strict=True):
            picture[~inside] = _FRAMES[hit][: picture.shape[-1]]
        return [Panel("class right (green) or wrong (red)", framed)]
