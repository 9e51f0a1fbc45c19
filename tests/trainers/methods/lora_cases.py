"""Every method with adapters, and one update of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.run import Plan, Recipe, parse_recipe, resolve
from mimray.trainers.engine.deepspeed import (
    Engine,
)
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.lora import adapt
from mimray.trainers.types import DatasetFacts
from tests.trainers.methods.cases import METHODS, SWIN, VIT

BATCH = 4
CASES: dict[str, dict[str, Any]] = {
    name: {"encoder": VIT, "method": method} for name, method in METHODS.items()
} | {
    "simmim": {"encoder": VIT | {"positions": "learned"}, "method": METHODS["simmim"]},
    "simmim-swin": {"encoder": SWIN, "method": METHODS["simmim"]},
    "beit": {"encoder": VIT | {"positions": "none", "rel_pos_bias": "shared", "layer_scale": 0.1,
                               "init": "beit"},
             "method": METHODS["beit"] | {"vocab_size": 16}},
    # DINOv3's blocks, whose projections have a forward pass of their own.
    "simmim-rope": {"encoder": VIT | {"positions": "none", "rope": "dinov3", "key_bias": False,
                                      "mlp": "swiglu"},
                    "method": METHODS["simmim"]},
    "distill": {"encoder": VIT, "method": METHODS["distill"] | {"teacher_width": 8}},
}  # fmt: skip


class Codes:
    """A tokenizer whose code is the brightness of the place."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def to(self, device: torch.device) -> Codes:
        return self

    def codes(self, images: Tensor) -> Tensor:
        bright = torch.nn.functional.adaptive_avg_pool2d(images.mean(1), self.recipe.grid)
        return (bright.sigmoid() * 16).long().clamp(0, 15)

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError


def teacher_card() -> BundleCard:
    """A teacher of another width and grid than the student's."""
    return BundleCard.model_validate(
        {
            "name": "t", "encoder": VIT | {"width": 8, "patch_size": 8}, "image_size": [16, 16],
            "channels": 3, "mean": [0.5] * 3, "std": [0.2] * 3,
        }
    )  # fmt: skip


def plan_of(case: str = "mae", *, stage: int = 0, world_size: int = 1, **lora: Any) -> Plan:
    tree = CASES[case] | {
        "data": {"image_size": 16},
        # Adam makes whole steps of the rounding of gradients that are zero, as of keys' biases.
        "optim": {"batch_size": BATCH, "steps": 10, "eps": 1e-5},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "lora": {"rank": 2, "alpha": 4, **lora},
    }
    return resolve(parse_recipe(tree), DatasetFacts("here", 100, "f1"), world_size)


def adapted(plan: Plan, seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = with_biases(build_method(plan.recipe)).train()
    if plan.recipe.method.name == "beit":
        method.attach(Codes(plan.recipe))
    if plan.recipe.method.name == "distill":
        method.expect("teacher", teacher_card())  # its random weights are the seed's
    adapt(method)
    return method


def with_biases(method: Method) -> Method:
    """A method whose encoder's biases are not zero, as those of weights to begin with."""
    rng = torch.Generator().manual_seed(3)
    for name, parameter in method.encoder.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1, generator=rng)
    return method


def moved(method: Method, seed: int = 1) -> Method:
    """A method whose adapters have learnt something."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in method.named_parameters():
        if name.endswith("lora_up"):
            parameter.data.normal_(std=0.02, generator=rng)
    return method


def update(engine: Engine, plan: Plan, step: int) -> float:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    recipe, rng = plan.recipe, torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 16, 16, generator=rng)[share]
    drawn = [engine.module.draw_mask(recipe, np.random.default_rng(i)) for i in range(BATCH)]
    mask = None if drawn[0] is None else torch.from_numpy(np.stack(drawn))[share]
    labels = {"labels": torch.arange(BATCH)[share] % 2} if recipe.method.learns_classes else {}
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-3
    torch.manual_seed(step + 100 * rank)
    engine.module.at_step(step, plan.steps)
    loss = engine(images=images, mask=mask, **labels).loss
    engine.backward(loss)
    engine.step()
    engine.module.after_step(step + 1)
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total) / world_size
