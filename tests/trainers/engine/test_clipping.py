"""Clipping of each parameter's gradient, on two ranks of every ZeRO stage, against plain torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.engine.clipping import clip_each
from mimray.trainers.engine.deepspeed import full_state, initialize, prepare_process
from mimray.trainers.engine.optim import build_optimizer
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.types import DatasetFacts

SMALL = (
    "encoder.name=vit", "encoder.width=12", "encoder.depth=1", "encoder.num_heads=1",
    "method.decoder_width=12", "method.decoder_num_heads=1", "data.image_size=16",
    "optim.batch_size=8", "optim.warmup_epochs=null", "optim.warmup_steps=2",
    "engine.micro_batch_size=2",
    # Adam's steps are then about as long as gradients, and show what has become of these.
    "optim.eps=1.0",
)  # fmt: skip
RATE, STEPS, RANKS = 0.1, 3, 2
CASES = [(stage, "fp32") for stage in (0, 1, 2, 3)] + [(stage, "bf16_weights") for stage in (1, 3)]


def plan_of(stage: int, *overrides: str) -> Plan:
    recipe = load_recipe("mae-tiny", [*SMALL, f"engine.zero_stage={stage}", *overrides], steps=9)
    return resolve(recipe, DatasetFacts("here", 100, "f"), RANKS)


def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Micro batches of two pictures, those of the first rank first."""
    rng = torch.Generator().manual_seed(step)
    for _ in range(4):
        mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
        yield 3 * torch.randn(2, 3, 16, 16, generator=rng), mask


def trained_plainly(limit: float | None) -> dict[str, Tensor]:
    """Weights after some steps of plain torch, over the whole batch."""
    torch.manual_seed(0)
    recipe = plan_of(0).recipe
    method = build_method(recipe).train()
    optimizer = build_optimizer(method, recipe.optim)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([method(*batch).loss for batch in batches(step)]).mean().backward()
        for parameter in method.parameters():
            if limit is not None and parameter.grad is not None:
                norm = parameter.grad.norm()
                if norm > limit:
                    parameter.grad *= limit / norm
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
    return {n: p.detach() for n, p in method.named_parameters() if p.requires_grad}


def trained(stage: int, precision: str, limit: float) -> dict[str, Any]:
    """Weights after the same steps of DeepSpeed, two micro batches a rank."""
    torch.manual_seed(0)
    plan = plan_of(stage)
    method = build_method(plan.recipe).train()
    engine = initialize(method, plan, precision)
    rank = dist.get_rank()
    for step in range(STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = RATE
        for images, mask in list(batches(step))[2 * rank : 2 * rank + 2]:
            output = engine(images.to(next(method.parameters()).dtype), mask)
            engine.backward(output.loss)
            if engine.is_gradient_accumulation_boundary():
                clip_each(engine, limit)
            engine.step()
    return full_state(engine, {n: p for n, p in method.named_parameters() if not p.requires_grad})


def work(out: Path, rank: str, limit: str) -> None:
    """The program of each rank."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.meeting", rank=int(rank), world_size=RANKS
    )
    torch.save([trained(*case, float(limit)) for case in CASES], f"{out}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


def test_update__clips_each_gradient_alike_at_every_stage(
    tmp_path: Path, run_ranks: Callable[..., None]
):
    limit = 0.01
    wanted, unclipped = trained_plainly(limit), trained_plainly(None)
    run_ranks(__file__, tmp_path / "out", str(limit))

    changed = [n for n in wanted if not torch.allclose(wanted[n], unclipped[n], atol=1e-4)]
    assert 0 < len(changed) < len(wanted), "the limit reaches some gradients and not all"
    for rank in range(RANKS):
        for (stage, precision), state in zip(
            CASES, torch.load(f"{tmp_path / 'out'}.{rank}"), strict=True
        ):
            for name, value in wanted.items():
                torch.testing.assert_close(
                    state[name],
                    value,
                    atol=1e-5 if precision == "fp32" else 4e-3,
                    rtol=0,
                    msg=f"{stage} {precision} {name}",
                )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine.precision=fp16"], "engine.precision fp16 holds"),
        (["engine.offload=optimizer"], "engine.offload optimizer moves"),
    ],
)
def test_plan__refuses_engines_in_which_it_cannot_be(overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        plan_of(1, "optim.clip_tensor_norm=3", *overrides)


def test_recipe__clips_in_one_way_and_keeps_its_digest_without():
    tree = plan_of(1).recipe.model_dump(mode="json")
    assert tree["optim"].pop("clip_tensor_norm") is None
    facts = DatasetFacts("here", 100, "f")
    assert resolve(parse_recipe(tree), facts, RANKS).hash == plan_of(1).hash
    assert plan_of(1, "optim.clip_tensor_norm=3").hash != plan_of(1).hash
    with pytest.raises(ConfigError, match="only one of 'clip_grad_norm'"):
        plan_of(1, "optim.clip_tensor_norm=3", "optim.clip_grad_norm=1")


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
