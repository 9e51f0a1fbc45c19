"""One rank of a training by the method of `tests/plugin`, as the tests start it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.deepspeed import prepare_process
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.engine.loop import stages
from mimray.trainers.storage import RunDir

RECIPE = Path(__file__).parents[2] / "plugin" / "selfdistil-tiny.yaml"


class Watching:
    """Ends the process as a lost node would, after a step's row was written."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at

    def resumed(self, step: int) -> None:
        pass

    def metrics(self, row: dict[str, Any]) -> None:
        if row["step"] == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def pictures(self, step: int, panels: list[Any]) -> None:
        pass


def train(job: dict[str, Any], world_size: int, device: torch.device) -> None:
    recipe = load_recipe(str(RECIPE), job["overrides"])
    source = open_training(job["pictures"], recipe)
    plan = resolve(recipe, source.facts, world_size)
    run = RunDir(job["run"])
    training = stages(
        plan,
        run,
        source,
        device=device,
        observer=Watching(job["kill_at"]),
        pauses=(1, job["stop"]),
    )
    for trained in training:
        if dist.get_rank() == 0:
            torch.save(trained.state, Path(job["run"]) / f"state-{trained.step}.pt")
        if trained.step == job["stop"]:
            break
    if dist.get_rank() == 0:
        write_bundle(run, plan, trained.state, step=trained.step, name="s", command="test")
    dist.barrier()


def main(
    jobs: list[dict[str, Any]], meeting: str, rank: int, world_size: int, device: torch.device
) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    prepare_process(device)
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
    )
    for job in jobs:
        train(job, world_size, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(
        json.loads(sys.argv[1]),
        sys.argv[2],
        int(sys.argv[3]),
        int(sys.argv[4]),
        torch.device(sys.argv[5]),
    )
