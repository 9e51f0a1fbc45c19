"""Short trainings in a test's own process, with pictures of noise, and two processes of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pyarrow import fs as pafs

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.deepspeed import prepare_process
from mimray.trainers.engine.loop import Trained, train
from mimray.trainers.lifeline import Lifeline
from mimray.trainers.methods.needs import keep_needs
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts, Panel

CPU = torch.device("cpu")


def small_plan() -> Plan:
    """A plan that nobody trains."""
    tree = {
        "encoder": {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4},
        "method": {"name": "simmim", "mask_unit_px": None},
        "data": {"image_size": 8},
        "optim": {"batch_size": 2, "steps": 9},
    }
    return resolve(parse_recipe(tree), DatasetFacts("x", 100, "x"), 1)


class Observer:
    """Keeps what a training tells, and ends it with an error at a step, as a lost worker would.

    Args:
        cut_at: the step after which the training ends; None to let it go on.

    Attributes:
        began: the steps at which it began and went on.
        losses: the loss of each logged step.
        titles: headings of the pictures that it drew.
    """

    def __init__(self, cut_at: int | None = None) -> None:
        self.cut_at = cut_at
        self.began: list[int] = []
        self.losses: dict[int, float] = {}
        self.titles: set[str] = set()

    def resumed(self, step: int) -> None:
        self.began.append(step)

    def metrics(self, row: dict[str, Any]) -> None:
        self.losses[row["step"]] = row["loss"]
        if row["step"] == self.cut_at:
            raise KeyboardInterrupt

    def pictures(self, step: int, panels: list[Panel]) -> None:
        self.titles |= {panel.title for panel in panels}


class Remote(RunDir):
    """A directory that is reached through pyarrow alone, as one in an object store is."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.filesystem = pafs.SubTreeFileSystem("/", pafs.LocalFileSystem())
        self.root = self.uri.lstrip("/")

    def __truediv__(self, name: str) -> RunDir:
        return Remote(f"{self.uri}/{name}")

    def upload(self, file: Path, name: str) -> None:
        self.filesystem.create_dir(self.path(name).rpartition("/")[0])  # buckets need none
        super().upload(file, name)


def run_of(
    plan: Plan,
    place: Path | str,
    observer: Observer | None = None,
    probe: Any = None,
    lifeline: Lifeline | None = None,
) -> Trained:
    """Train a plan in the process group there is, or go on with it, as every worker of a run does.

    Args:
        plan: the plan, which `place` may already hold checkpoints of.
        place: the run's directory.
        observer: gets what the training tells.
        probe: the running probe, if there is one.
        lifeline: what this process is asked for from outside.
    """
    run = RunDir(str(place))
    run.create()
    if dist.get_rank() == 0:
        keep_needs(plan.recipe, run)
    dist.barrier()
    source = open_training(plan.data.uri, plan.recipe)
    return train(
        plan, run, source, device=CPU, observer=observer or Observer(), probe=probe,
        lifeline=lifeline or Lifeline(),
    )  # fmt: skip


def write_noise(
    folder: Path, count: int, classes: Sequence[str] = ("",), side_px: int = 20
) -> Path:
    """Write pictures of noise, `count` into a folder of each class; returns `folder`."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@contextmanager
def group_of_two(place: Path, rank: int) -> Iterator[None]:
    """Be one of two processes that meet at a file in `place`; the process ends with the block."""
    os.environ["LOCAL_RANK"] = str(rank)
    prepare_process(CPU)
    dist.init_process_group("gloo", f"file://{place}/meeting", rank=rank, world_size=2)
    yield
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end
