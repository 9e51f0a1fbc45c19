"""A run that is made longer than planned: its rates, and that it repeats itself to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mimray.service.commands.pretrain import longer_lines
from mimray.trainers.config.run import Plan, parse_plan, parse_recipe
from mimray.trainers.engine.loop import Trained
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.engine.schedule import learning_rate
from mimray.trainers.errors import RunConflictError
from mimray.trainers.launch import Job, prepare
from mimray.trainers.storage import RunDir
from tests.trainers.runs import Observer, run_of, write_noise


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_noise(tmp_path / "pictures", 8, side_px=16)


def job_of(pictures: Path, name: str, steps: int, **optim: Any) -> Job:
    """A run of another length, with the warm-up that `--steps` would give it."""
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {"name": "simmim", "mask_unit_px": 8},
            "data": {"image_size": 16, "num_workers": 0},
            "optim": {
                "batch_size": 4, "base_lr": 0.1, "steps": steps, "warmup_steps": steps // 4,
                "weight_decay": {"start": 0.0, "end": 0.5}, **optim,
            },
            "engine": {"zero_stage": 1, "precision": "fp32"},
            "checkpoint": {"every_steps": 2, "keep": 9}, "logging": {"every_steps": 1},
        }
    )  # fmt: skip
    return Job(recipe, str(pictures), name, str(pictures.parent / "runs"))


def learn(job: Job, cut_at: int | None = None) -> tuple[Plan, Trained | None]:
    """Prepare and train as the command does, in this process."""
    plan = prepare(job)
    job.run.create()
    job.run.write("plan.json", plan.model_dump_json().encode())
    plan = parse_plan(job.run.read("plan.json"), "plan.json", "")
    try:
        return plan, run_of(plan, job.run.uri, Observer(cut_at))
    except KeyboardInterrupt:
        return plan, None


def rates(run: RunDir) -> list[float]:
    return [row["lr"] for row in read_metrics(run)]


@pytest.mark.usefixtures("process_group")
def test_longer__a_finished_run_goes_on_by_the_schedule_of_the_new_length(pictures: Path):
    first, _ = learn(job_of(pictures, "run", 4))
    plan, whole = learn(job_of(pictures, "run", 8))
    again, _ = learn(job_of(pictures, "run", 8))

    peak = 0.1 * 4 / 256
    short = [0.0, peak, *(peak * 0.5 * (1 + math.cos(math.pi * k / 3)) for k in (1, 2))]
    long = [peak * 0.5 * (1 + math.cos(math.pi * k / 7)) for k in (3, 4, 5, 6)]
    assert rates(job_of(pictures, "run", 8).run) == pytest.approx([*short, *long])
    assert [(one.steps, one.until, one.hash) for one in plan.lengths] == [(4, 4, first.hash)]
    assert (plan.steps, plan.warmup_steps, plan.recipe.optim.warmup_steps) == (8, 1, 1)
    assert plan.hash != first.hash
    assert again == plan
    assert whole is not None
    assert whole.step == 8
    assert longer_lines(first) == []
    assert longer_lines(plan) == [
        "planned for 4 steps before; from step 4 on the schedule is that of 8 steps: lr "
        f"{long[0]:.3g} at step 4, {long[-1]:.3g} at step 7; the warm-up stays 1 steps"
    ]


@pytest.mark.usefixtures("process_group")
def test_longer__killed_and_continued_it_repeats_itself(pictures: Path):
    for name in ("whole", "cut"):
        learn(job_of(pictures, name, 6), cut_at=5)  # unfinished, with a checkpoint at 4
    _, wanted = learn(job_of(pictures, "whole", 12))
    learn(job_of(pictures, "cut", 12), cut_at=9)
    plan, found = learn(job_of(pictures, "cut", 12))

    assert plan.lengths[0].until == 4
    assert wanted is not None
    assert found is not None
    for name, value in wanted.state.items():
        assert torch.equal(found.state[name], value), name
    runs = [job_of(pictures, name, 12).run for name in ("whole", "cut")]
    assert [row["loss"] for row in read_metrics(runs[0])] == [
        row["loss"] for row in read_metrics(runs[1])
    ]


@pytest.mark.usefixtures("process_group")
def test_longer__a_damaged_checkpoint_goes_back_to_the_length_before(pictures: Path):
    learn(job_of(pictures, "run", 4))
    whole, _ = learn(job_of(pictures, "run", 8))
    wanted = rates(job_of(pictures, "run", 8).run)
    run = job_of(pictures, "run", 8).run
    for step in (8, 6, 4):
        assert run.local is not None
        for file in (run.local / f"checkpoints/step-{step:08d}/state").iterdir():
            file.write_bytes(b"")

    plan, _ = learn(job_of(pictures, "run", 8))

    assert plan == whole
    assert rates(run) == wanted


@pytest.mark.usefixtures("process_group")
def test_longer__shorter_or_another_recipe_is_refused(pictures: Path):
    learn(job_of(pictures, "run", 4))
    learn(job_of(pictures, "run", 8))

    with pytest.raises(RunConflictError, match=r"optim\.steps: 8 -> 4.*--steps 8 goes on with it"):
        prepare(job_of(pictures, "run", 4))
    with pytest.raises(RunConflictError, match=r"optim\.base_lr: 0\.1 -> 0\.2"):
        prepare(job_of(pictures, "run", 16, base_lr=0.2))
    twice = prepare(job_of(pictures, "run", 16))
    assert [(one.steps, one.until) for one in twice.lengths] == [(4, 4), (8, 8)]
    assert [twice.length_at(step) for step in (3, 4, 7, 8)] == [4, 8, 8, 16]
    assert learning_rate(twice, 15) > 0
