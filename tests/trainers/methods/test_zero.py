"""Every method under every ZeRO stage: two ranks, sharded or not, learn the same."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, Recipe, resolve
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.engine.deepspeed import full_state, initialize, prepare_process
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models.blocks import checkpoint_activations
from mimray.trainers.types import DatasetFacts

# All of them in one pair of processes, some minutes on two cores.
pytestmark = pytest.mark.slow

RECIPES = (
    "ae-tiny", "vae-tiny", "dvae-tiny", "beit-tiny", "mae-tiny", "mae-cross-tiny", "simmim-tiny",
    "simmim-swin-tiny", "maskfeat-tiny", "distill-tiny", "ibot-tiny", "capi-tiny",
)  # fmt: skip
BATCH, STEPS = 8, 3
SMALL = {
    "dvae-tiny": ["method.codebook_size=32"],
    "beit-tiny": ["method.vocab_size=16"],
    "ibot-tiny": ["method.num_prototypes=32", "method.assignment_group=8"],
    "distill-tiny": ["method.teacher_width=32", "method.pooled_weight=1"],
    "capi-tiny": ["method.num_clusters=16", "method.assignment_group=8"],
}


def teacher_card() -> BundleCard:
    """A teacher of another grid than the student's."""
    encoder = {"name": "vit", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 16}
    half = [0.5] * 3
    tree = {"name": "t", "encoder": encoder, "image_size": [64, 64], "channels": 3}
    return BundleCard.model_validate({**tree, "mean": half, "std": half})


class Codes:
    """A tokenizer whose code is the brightness of the place."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def to(self, device: torch.device) -> Codes:
        return self

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        bright = torch.nn.functional.adaptive_avg_pool2d(images.mean(1), self.recipe.grid)
        return (bright.sigmoid() * 16).long().clamp(0, 15)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def plan_of(name: str, stage: int, world_size: int, checkpointing: bool) -> Plan:
    overrides = [
        f"optim.batch_size={BATCH}", f"engine.zero_stage={stage}",
        f"engine.activation_checkpointing={checkpointing}", *SMALL.get(name, []),
    ]  # fmt: skip
    recipe = load_recipe(name, overrides, steps=20)
    return resolve(recipe, DatasetFacts("here", 100, "f1"), world_size)


def train(name: str, stage: int, precision: str) -> dict[str, Any]:
    """Losses of a few steps, and the weights after them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = plan_of(name, stage, world_size, checkpointing=stage == 2)
    recipe = plan.recipe
    torch.manual_seed(0)
    method = build_method(recipe).train()
    checkpoint_activations(method, recipe.engine.activation_checkpointing)
    if name == "beit-tiny":
        method.attach(Codes(recipe))
    if name == "distill-tiny":
        method.expect("teacher", teacher_card())  # its random weights are the seed's
    frozen = {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}
    engine = initialize(method, plan, precision)
    losses = []
    for step in range(STEPS):
        rng = torch.Generator().manual_seed(step)
        images = torch.randn(BATCH, 3, *recipe.data.image_size, generator=rng)
        drawn = [method.draw_mask(recipe, generator(0, Stream.MASK, step, i)) for i in range(BATCH)]
        mask = None if drawn[0] is None else torch.from_numpy(np.stack(drawn))
        share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        for group in engine.optimizer.param_groups:
            group["lr"] = 1e-3
        torch.manual_seed(step + 100 * rank)
        method.at_step(step, plan.steps)
        output = engine(images[share], None if mask is None else mask[share])
        engine.backward(output.loss)
        engine.step()
        method.after_step(step + 1)
        total = output.loss.detach().float()
        dist.all_reduce(total)
        losses.append(float(total) / world_size)
    return {"losses": losses, "state": full_state(engine, frozen)}


def work(out: Path, rank: str, world_size: str, *cases: str) -> None:
    """The program of each subprocess."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.meeting", rank=int(rank), world_size=int(world_size)
    )
    found = {case: train(*json.loads(case)) for case in cases}
    torch.save(found, f"{out}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> list[dict[str, Any]]:
    """By rank and case; all cases in one pair of processes."""
    out = tmp_path_factory.mktemp("zero") / "out"
    stages = [(name, stage, "fp32") for name in RECIPES for stage in (0, 1, 2, 3)]
    cases = [json.dumps(c) for c in (*stages, *((name, 3, "bf16") for name in RECIPES))]
    run_ranks(__file__, out, "2", *cases, timeout_s=800)
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("name", RECIPES)
def test_method__learns_the_same_however_it_is_sharded(
    name: str, results: list[dict[str, Any]]
) -> None:
    plain = results[0][json.dumps((name, 0, "fp32"))]
    assert all(math.isfinite(loss) for loss in plain["losses"])
    assert len(set(plain["losses"])) == STEPS
    for stage in (1, 2, 3):
        case = json.dumps((name, stage, "fp32"))
        sharded = results[0][case]
        np.testing.assert_allclose(sharded["losses"], plain["losses"], rtol=1e-4)
        for key, value in plain["state"].items():
            torch.testing.assert_close(
                sharded["state"][key], value, rtol=1e-2, atol=2e-3, msg=f"{stage} {key}"
            )
            assert torch.equal(results[1][case]["state"][key], sharded["state"][key]), key


@pytest.mark.parametrize("name", RECIPES)
def test_method__computes_in_bf16_and_keeps_fp32_masters(
    name: str, results: list[dict[str, Any]]
) -> None:
    plain = results[0][json.dumps((name, 0, "fp32"))]
    half = results[0][json.dumps((name, 3, "bf16"))]
    # A code is the nearest one or another: a dVAE's loss moves in jumps.
    rtol = 0.02 if name == "dvae-tiny" else 0.01
    np.testing.assert_allclose(half["losses"], plain["losses"], rtol=rtol)
    assert all(value.dtype == torch.float32 for value in half["state"].values())


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
