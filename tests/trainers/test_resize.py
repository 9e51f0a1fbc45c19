"""Growing and shrinking a run: two ranks go on where one stopped, and one where two did.

Each number of ranks needs processes of its own; this file is also what they run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pyarrow import fs as pafs

from trainers.config.run import Plan, parse_recipe, resolve
from trainers.engine import checkpoints
from trainers.engine.deepspeed import DTYPES, full_state, initialize, prepare_process
from trainers.methods import build_method
from trainers.storage import RunDir
from trainers.types import DatasetFacts

GLOBAL_BATCH, SAVED, STEPS = 4, 4, 8


@dataclass(frozen=True)
class Job:
    """Train from `start` (a run's directory, or the beginning) to the end; save at `SAVED`."""

    out: str
    zero_stage: int
    precision: str = "fp32"
    start: str | None = None
    remote: bool = False
    forget: bool = False


class Remote(RunDir):
    """A directory that is reached through pyarrow alone, as one in an object store is."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.filesystem = pafs.SubTreeFileSystem("/", pafs.LocalFileSystem())
        self.root = self.uri.lstrip("/")

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.uri}/{name}")


def plan_of(job: Job, world_size: int) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 24, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {
                "name": "mae",
                "decoder_width": 16,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            },
            "data": {"image_size": 16},
            # Strong enough that a lost moment or a decayed bias shows in the loss.
            "optim": {
                "batch_size": GLOBAL_BATCH, "steps": 20, "base_lr": 0.02, "weight_decay": 0.5,
            },
            "engine": {"zero_stage": job.zero_stage, "precision": job.precision},
        }
    )  # fmt: skip
    return resolve(recipe, DatasetFacts("here", 100, "f1"), world_size)


def train(job: Job) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = plan_of(job, world_size)
    torch.manual_seed(0 if job.start is None else 1)  # other weights, which loading must replace
    method = build_method(plan.recipe)
    method.register_buffer("updates", torch.zeros(1))
    frozen = {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}
    engine = initialize(method, plan, job.precision)
    identity = checkpoints.Identity(plan.hash, job.zero_stage, job.precision)
    step = 0
    if job.start is not None:
        loaded = checkpoints.load_newest(
            (Remote if job.remote else RunDir)(job.start), engine, identity
        )
        assert loaded is not None
        step = loaded.step
        if job.forget:
            for state in engine.optimizer.optimizer.state.values():
                state["exp_avg"].zero_()
    losses = {}
    for step in range(step, STEPS):
        rng = torch.Generator().manual_seed(step)
        images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=rng).chunk(world_size)[rank]
        mask = torch.tensor([[True, False, True, True]] * len(images))
        loss = engine(images.to(DTYPES[job.precision]), mask).loss
        engine.backward(loss)
        engine.step()
        engine.module.updates += 1
        total = loss.detach().float()
        dist.all_reduce(total)
        losses[step + 1] = float(total) / world_size
        if step + 1 == SAVED:
            checkpoints.save(
                RunDir(job.out), engine, identity, step=SAVED, samples=SAVED * 4, keep=1
            )
    state = full_state(engine, frozen)
    if rank == 0:
        torch.save({"losses": losses, "state": state}, Path(job.out + ".pt"))


def work(jobs: Path, rank: str, world_size: str) -> None:
    """What the subprocesses do."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{jobs}.meeting", rank=int(rank), world_size=int(world_size)
    )
    for job in json.loads(jobs.read_text()):
        train(Job(**job))
    dist.destroy_process_group()


def run(folder: Path, world_size: int, *jobs: Job) -> None:
    todo = folder / f"{time.monotonic_ns()}.json"
    todo.write_text(json.dumps([asdict(job) for job in jobs]))
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(todo), str(rank), str(world_size)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0, out[-4000:]
    finally:
        for process in processes:
            process.kill()


def result(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{name}.pt")
    return found


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
