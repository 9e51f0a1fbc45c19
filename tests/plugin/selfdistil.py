"""Self-distillation as another distribution would bring it.

Between DINO and iBOT: students that see masked global and whole local views predict what a teacher,
their moving average, says of whole global views. Its scores are centred, or balanced by Sinkhorn
over an assignment group.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.distributed as dist
from selfdistil_config import SelfDistilConfig
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.masks import random_mask
from mimray.trainers.data.views import Inputs, Masks, training_view
from mimray.trainers.methods.assignment import grouped, own_rows
from mimray.trainers.methods.base import Method
from mimray.trainers.models import build_encoder
from mimray.trainers.models.averages import MovingAverages
from mimray.trainers.models.codebook import Fp32Buffers
from mimray.trainers.types import MethodOutput, Panel

STUDENT_TEMPERATURE = 0.1


class Head(nn.Sequential):
    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.add_module("first", nn.Linear(width, width))
        self.add_module("act", nn.GELU())
        self.add_module("last", nn.Linear(width, prototypes, bias=False))


class Centre(Fp32Buffers):
    """The moving mean of the teacher's scores, moved once a step by the scores of all workers."""

    value: Tensor
    sums: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(width))
        self.register_buffer("sums", torch.zeros(width + 1), persistent=False)

    def add(self, scores: Tensor) -> None:
        self.sums[:-1] += scores.float().flatten(0, -2).sum(dim=0)
        self.sums[-1] += scores[..., 0].numel()

    def settle(self, momentum: float) -> None:
        dist.all_reduce(self.sums)
        self.value.lerp_(self.sums[:-1] / self.sums[-1], 1 - momentum)
        self.sums.zero_()


class SelfDistil(Method):
    result: ClassVar[str] = "averages.encoder"

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        config, data = recipe.method, recipe.data
        assert isinstance(config, SelfDistilConfig)
        self.config = config
        self.encoder = build_encoder(recipe.encoder, data.image_size, data.channels)
        self.head = Head(self.encoder.width, config.prototypes)
        self.predictor = nn.Linear(config.prototypes, config.prototypes)
        self.centre = Centre(config.prototypes)
        self.averages = MovingAverages(
            {"encoder": self.encoder, "head": self.head}, config.momentum
        )
        self.temperature = config.temperature.start

    @classmethod
    def views(cls, recipe: Recipe) -> Inputs:
        config = recipe.method
        assert isinstance(config, SelfDistilConfig)
        draw = partial(random_mask, grid=recipe.grid, mask_ratio=config.mask_ratio)
        view = training_view(recipe, masks=Masks(draw, count=2))
        local = training_view(recipe, "local_images")
        size = (config.local_px, config.local_px)
        return (
            replace(view, count=2),
            replace(local, count=2, size=size, crop_scale=(0.1, 0.4)),
        )

    def at_step(self, step: int, num_steps: int) -> None:
        self.temperature = self.config.temperature.at(step, num_steps)

    def after_step(self, step: int) -> dict[str, float]:
        self.centre.settle(self.config.centre_momentum)
        assert self.averages is not None
        return {"temperature": self.temperature, "centre": float(self.centre.value.norm())}

    def forward(
        self,
        images: Tensor,  # B 2 C H W
        mask: Tensor | None = None,  # B 2 2 N
        local_images: Tensor | None = None,  # B 2 C h w
    ) -> MethodOutput:
        assert mask is not None
        assert local_images is not None
        b = len(images)
        targets = self._targets(images)  # B 2 K
        globals_ = images.flatten(0, 1)  # (B 2) C H W
        students = [
            self._student(globals_, mask[:, :, k].flatten(0, 1)).unflatten(0, (b, 2))
            for k in range(2)
        ]
        # Each global view is predicted from the masked other one.
        others = [student.flip(1) for student in students]  # B 2 K
        local = self._student(local_images.flatten(0, 1), None).unflatten(0, (b, 2))
        predictions = torch.stack([*others, local, local.flip(1)], dim=1)  # B 4 2 K
        scores = F.log_softmax(predictions.float() / STUDENT_TEMPERATURE, dim=-1)
        loss = -(targets.unsqueeze(1) * scores).sum(dim=-1).mean()
        return MethodOutput(loss, predictions, targets, mask[:, 0, 0])

    def panels(self, images: Tensor, output: MethodOutput, *, oracle: bool = False) -> list[Panel]:
        return [Panel("first view", self.pixels(images[:, 0]))]

    def _student(self, images: Tensor, mask: Tensor | None) -> Tensor:
        pooled = self.encoder(images, mask).pooled
        predicted: Tensor = self.predictor(self.head(pooled))
        return predicted

    def _targets(self, images: Tensor) -> Tensor:
        b = len(images)
        averages = self.averages
        assert averages is not None
        features = averages("encoder", images.flatten(0, 1))
        scores: Tensor = averages("head", features.pooled).float().unflatten(0, (b, 2))  # B 2 K
        if self.training:
            self.centre.add(scores)
        if self.config.assignment_group == 1:
            return ((scores - self.centre.value) / self.temperature).softmax(dim=-1)
        groups = grouped(scores, self.config.assignment_group)  # G P 2 K
        balanced = [sinkhorn(group.flatten(0, 1), self.temperature) for group in groups]
        return own_rows(torch.stack(balanced).unflatten(1, (-1, 2)), b)


def sinkhorn(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Assignments [M, K] that use all prototypes alike (Caron et al. 2020, sec. 3.1)."""
    q = ((scores - scores.max()) / temperature).double().exp()
    for _ in range(rounds):
        q = q / q.sum(dim=0, keepdim=True)
        q = q / q.sum(dim=1, keepdim=True)
    return q.float()
