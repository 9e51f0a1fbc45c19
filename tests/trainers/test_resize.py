"""Growing and shrinking a run: another number of ranks goes on where one stopped, and back.

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

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.engine import checkpoints
from mimray.trainers.engine.average import with_average
from mimray.trainers.engine.deepspeed import (
    DTYPES,
    follow,
    full_state,
    initialize,
    prepare_process,
)
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

GLOBAL_BATCH = 4


@dataclass(frozen=True)
class Journey:
    """Numbers of ranks, each with the step at which it stops.

    The first makes all the steps, too, to compare with.
    """

    ranks: tuple[int, int, int] = (1, 2, 1)
    stops: tuple[int, int, int] = (3, 6, 9)


@dataclass(frozen=True)
class Job:
    """Train to `stop` from the run in `start`, or from the beginning; save as `out` on the way.

    Attributes:
        remote: reach the run as if it were in an object store.
        forget: lose the moments, to see that it shows.
    """

    out: str
    zero_stage: int
    precision: str
    save: int
    stop: int
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
                "ema": 0.9,
            },
            "engine": {"zero_stage": job.zero_stage, "precision": job.precision},
        }
    )  # fmt: skip
    return resolve(recipe, DatasetFacts("here", 100, "f1"), world_size)


def train(job: Job) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    plan = plan_of(job, world_size)
    torch.manual_seed(0 if job.start is None else 1)  # other weights, which loading must replace
    method = with_average(build_method(plan.recipe))
    method.register_buffer("updates", torch.zeros(1))
    frozen = {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}
    engine = initialize(method, plan, job.precision)
    identity = checkpoints.Identity(plan.hash, job.zero_stage, job.precision)
    first = 0
    if job.start is not None:
        loaded = checkpoints.load_newest(
            (Remote if job.remote else RunDir)(job.start), engine, identity
        )
        assert loaded is not None
        first = loaded.step
        if job.forget:
            for state in engine.optimizer.optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
    losses = {}
    for step in range(first, job.stop):
        rng = torch.Generator().manual_seed(step)
        images = torch.randn(GLOBAL_BATCH, 3, 16, 16, generator=rng).chunk(world_size)[rank]
        mask = torch.tensor([[True, False, True, True]] * len(images))
        loss = engine(images.to(DTYPES[job.precision]), mask).loss
        engine.backward(loss)
        engine.step()
        follow(engine, engine.module.ema, engine.module.ema.momentum.at(step, job.stop))
        engine.module.updates += 1
        total = loss.detach().float()
        dist.all_reduce(total)
        losses[step + 1] = float(total) / world_size
        if step + 1 == job.save:
            samples = job.save * GLOBAL_BATCH
            checkpoints.save(
                RunDir(job.out), engine, identity, step=job.save, samples=samples, keep=1
            )
    state = full_state(engine, frozen)
    if rank == 0:
        torch.save({"losses": losses, "state": state}, Path(job.out + ".pt"))


def work(jobs: Path, rank: str, world_size: str) -> None:
    """The program of each subprocess."""
    os.environ["LOCAL_RANK"] = rank
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{jobs}.meeting", rank=int(rank), world_size=int(world_size)
    )
    for job in json.loads(jobs.read_text()):
        train(Job(**job))
    dist.barrier()
    # All is written. Torn down in order, gloo's threads now and then abort the interpreter's end
    # ("terminate called without an active exception"), which says nothing about resizing.
    sys.stdout.flush()
    os._exit(0)


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
            out, _ = process.communicate(timeout=800)
            assert process.returncode == 0, out[-4000:]
    finally:
        for process in processes:
            process.kill()


def travel(folder: Path, kinds: list[tuple[int, str]], remote: bool, journey: Journey) -> None:
    """The first number of ranks all the way; the second from its first stop; the third from its."""
    names = {kind: str(folder / "{}-{}-".format(*kind)) for kind in kinds}
    (first, second, third), (grown, shrunk, end) = journey.ranks, journey.stops
    run(folder, first, *[Job(n + "whole", *k, save=grown, stop=end) for k, n in names.items()])
    changed = [
        Job(n + "grown", *kind, save=shrunk, stop=shrunk, start=n + "whole", remote=remote)
        for kind, n in names.items()
    ]
    run(folder, second, *changed)
    back = [
        Job(n + name, *kind, save=end, stop=end, start=n + "grown", forget=name == "forgot")
        for kind, n in names.items()
        for name in ("shrunk", "forgot")
        if kind[0] or name == "shrunk"  # without ZeRO nothing is converted
    ]
    run(folder, third, *back)


def deviation(found: dict[int, float], wanted: dict[int, float]) -> float:
    return max(abs(loss / wanted[step] - 1) for step, loss in found.items())


def followed(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """All averages in one vector, without the biases of keys: they have no gradient, but noise."""
    names = [n for n in state if n.startswith("ema.") and not n.endswith("qkv.bias")]
    return torch.cat([state[name].flatten() for name in names])


@pytest.mark.parametrize(
    ("kinds", "remote", "journey"),
    [
        ([(3, "fp32")], True, Journey()),
        pytest.param([(1, "fp32"), (3, "fp32")], True, Journey(), marks=pytest.mark.slow),
        pytest.param([(z, "fp32") for z in range(4)], False, Journey(), marks=pytest.mark.slow),
        pytest.param(
            [(0, "bf16"), (1, "bf16_weights"), (2, "bf16"), (3, "bf16_weights")],
            False,
            Journey(),
            marks=pytest.mark.slow,
        ),
        *(
            pytest.param(
                [(z, "fp32") for z in range(4)],
                False,
                Journey(ranks, (6, 13, 20)),
                marks=pytest.mark.slow,
            )
            for ranks in ((4, 2, 4), (2, 4, 2), (2, 1, 2))
        ),
    ],
    ids=["fp32-3-remote", "fp32-remote", "fp32", "bf16", "4-2-4", "2-4-2", "2-1-2"],
)
def test_resize__goes_on_as_if_it_had_never_been(
    tmp_path: Path, kinds: list[tuple[int, str]], remote: bool, journey: Journey
) -> None:
    travel(tmp_path, kinds, remote, journey)
    first, _, end = journey.stops

    for stage, precision in kinds:

        def result(name: str, kind: str = f"{stage}-{precision}") -> Any:
            return torch.load(tmp_path / f"{kind}-{name}.pt")

        whole, grown, shrunk = result("whole"), result("grown"), result("shrunk")
        assert [*grown["losses"], *shrunk["losses"]] == list(range(first + 1, end + 1))
        # fp32 differs in the order of sums; lost moments cost a hundred times the tolerance.
        rtol = 1e-5 if precision == "fp32" else 1e-3
        assert deviation({**grown["losses"], **shrunk["losses"]}, whole["losses"]) < rtol, stage
        if stage:
            assert deviation(result("forgot")["losses"], whole["losses"]) > 3 * rtol, stage
        assert shrunk["state"]["updates"] == end
        averages = [followed(one["state"]) for one in (shrunk, whole)]
        apart = float((averages[0] - averages[1]).norm() / averages[1].norm())
        assert apart < rtol, stage
        for name in ("encoder.pos_embed", "updates"):
            assert torch.equal(shrunk["state"][name], whole["state"][name]), name


if __name__ == "__main__":
    work(Path(sys.argv[1]), *sys.argv[2:])
