"""DeepSpeed in every combination that a CPU runs, on two ranks: the losses of ZeRO 0 in fp32."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, resolve
from mimray.trainers.data.rng import sample_seeds
from mimray.trainers.engine.compiled import compile_blocks
from mimray.trainers.engine.deepspeed import initialize, prepare_process
from mimray.trainers.engine.optim import set_hyperparameters
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models.blocks import checkpoint_activations
from mimray.trainers.types import DatasetFacts

RANKS, BATCH, STEPS = 2, 8, 10
SMALL = (
    "encoder.name=vit", "encoder.width=16", "encoder.depth=3", "encoder.num_heads=2",
    "encoder.drop_path=0.3", "method.decoder_width=16", "method.decoder_num_heads=2",
    "method.decoder_depth=1", "data.image_size=16", f"optim.batch_size={BATCH}",
    "optim.base_lr=0.2", "optim.warmup_epochs=null", "optim.warmup_steps=2",
)  # fmt: skip
OFFLOAD = {0: ["none"], 1: ["none", "optimizer"], 2: ["none", "optimizer"],
           3: ["none", "optimizer", "all"]}  # fmt: skip
# Weights in 16 bits round each update; under autocast only products are rounded.
RTOL = {"fp32": 1e-6, "bf16": 1e-3, "bf16_weights": 2e-3}


class Case(NamedTuple):
    """One combination."""

    stage: int
    offload: str
    precision: str
    again: bool
    accumulation: int
    compiled: bool


CASES = [
    Case(stage, offload, precision, again, accumulation, compiled)
    for stage in OFFLOAD
    for offload, precision, again, accumulation, compiled in product(
        OFFLOAD[stage], RTOL, (False, True), (1, 2), (False, True)
    )
    if not (compiled and stage == 3 or precision == "bf16_weights" and stage == 0)
]
BRIEF = [
    Case(1, "optimizer", "bf16", again=True, accumulation=2, compiled=True),
    Case(2, "none", "fp32", again=True, accumulation=1, compiled=True),
    Case(3, "all", "fp32", again=True, accumulation=2, compiled=False),
]


def plan_of(case: Case) -> Plan:
    engine = {
        "zero_stage": case.stage, "offload": case.offload, "precision": case.precision,
        "activation_checkpointing": case.again, "compile": case.compiled,
        "micro_batch_size": BATCH // RANKS // case.accumulation,
    }  # fmt: skip
    overrides = [*SMALL, *(f"engine.{key}={json.dumps(value)}" for key, value in engine.items())]
    return resolve(load_recipe("mae-tiny", overrides, steps=100), DatasetFacts("x", 99, "f"), RANKS)


def losses(case: Case) -> list[float]:
    """Mean losses of some steps, over all ranks."""
    plan = plan_of(case)
    torch.manual_seed(0)
    method = build_method(plan.recipe).train()
    checkpoint_activations(method, case.again)
    if case.compiled:
        compile_blocks(method, torch.device("cpu"))
    engine = initialize(method, plan, case.precision)
    found = []
    for step in range(STEPS):
        set_hyperparameters(engine.optimizer, plan, step)
        engine.module.at_step(step, plan.steps)
        rng = torch.Generator().manual_seed(0)
        images = torch.randn(BATCH, 3, 16, 16, generator=rng)
        # As the loader deals them out: a range of the global batch for each rank.
        own = np.arange(BATCH).reshape(RANKS, case.accumulation, -1)[dist.get_rank()]
        total = torch.zeros(())
        for rows in own:
            engine.module.at_batch(sample_seeds(0, np.full(len(rows), step), rows))
            torch.manual_seed(step)
            output = engine(images=images[rows], mask=masks(step)[rows])
            engine.backward(output.loss)
            engine.step()
            total += output.loss.detach().float() / len(own) / RANKS
        engine.module.after_step(step + 1)
        dist.all_reduce(total)
        found.append(total.item())
    return found


def swin_losses(compiled: bool) -> list[float]:
    """Losses of SimMIM with Swin on pictures of noise, whose stages differ in width and grid."""
    sets = ["encoder={name: swin_tiny, window_size: 4, drop_path: 0.1}", "data.image_size=64",
            "method.mask_unit_px=32"]  # fmt: skip
    torch.manual_seed(0)
    method = build_method(load_recipe("simmim-tiny", sets, steps=4)).train()
    checkpoint_activations(method)
    if compiled:
        compile_blocks(method, torch.device("cpu"))
    found = []
    for step in range(3):
        method.at_batch(sample_seeds(0, np.full(4, step), np.arange(4)))
        torch.manual_seed(step)
        loss = method(images=torch.randn(4, 3, 64, 64)).loss
        loss.backward()
        found.append(loss.item())
    return found


def masks(step: int) -> torch.Tensor:
    """Masks of a global batch, which hide another number of patches at each step."""
    drawn = torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(step))
    return drawn.argsort(dim=1) < (2 if step % 3 else 3)


def work(out: Path, rank: str, brief: str) -> None:
    """The program of each rank."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.meeting", rank=int(rank), world_size=RANKS
    )
    plain = Case(0, "none", "fp32", again=False, accumulation=1, compiled=False)
    if brief == "swin":
        found = [swin_losses(compiled) for compiled in (False, True)]
    else:
        found = [losses(case) for case in (plain, *(BRIEF if brief == "brief" else CASES))]
    counted = torch._dynamo.utils.counters
    told = {
        "losses": found, "graph_breaks": len(counted["graph_break"]),
        "graphs": counted["stats"]["unique_graphs"],
    }  # fmt: skip
    Path(f"{out}.{rank}").write_text(json.dumps(told))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


@pytest.mark.parametrize(
    ("brief", "cases"), [("brief", BRIEF), pytest.param("all", CASES, marks=pytest.mark.slow)]
)
def test_matrix__losses_are_those_of_stage_0_in_fp32(
    tmp_path: Path, run_ranks: Callable[..., None], brief: str, cases: list[Case]
) -> None:
    run_ranks(__file__, tmp_path / "out", brief, timeout_s=1500)

    told = [json.loads(Path(f"{tmp_path / 'out'}.{rank}").read_text()) for rank in range(RANKS)]
    assert told[0] == told[1]
    assert told[0]["graph_breaks"] == 0
    plain, *found = told[0]["losses"]
    assert len(found) == len(cases)
    assert plain[-1] < 0.9 * plain[0]  # it learns, or there is nothing to compare
    for case, losses in zip(cases, found, strict=True):
        np.testing.assert_allclose(losses, plain, rtol=RTOL[case.precision], err_msg=str(case))


@pytest.mark.slow
def test_compile__a_stage_of_swin_is_a_graph_and_no_step_compiles_again(
    tmp_path: Path, run_ranks: Callable[..., None]
) -> None:
    run_ranks(__file__, tmp_path / "out", "swin")

    told = json.loads(Path(f"{tmp_path / 'out'}.0").read_text())
    plain, compiled = told["losses"]
    np.testing.assert_allclose(compiled, plain, rtol=RTOL["fp32"])
    # Two stages with plain and shifted windows, and two whose grid is one window.
    assert (told["graph_breaks"], told["graphs"]) == (0, 6)


def test_compile__goes_with_stages_that_keep_their_weights_whole() -> None:
    with pytest.raises(ConfigError, match=r"engine.compile goes with engine.zero_stage 0 to 2"):
        load_recipe("mae-tiny", ["engine.compile=true", "engine.zero_stage=3"], steps=4)


def test_compile__without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="torch needs no-such-compiler") as caught:
        compile_blocks(torch.nn.Linear(1, 1), torch.device("cpu"))
    assert caught.value.on_every_rank


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
