"""What only a GPU shows: nccl, bf16 and fp16 engines, activation checkpointing on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import resolve
from mimray.trainers.data.sources import open_source
from mimray.trainers.engine.loop import train
from mimray.trainers.storage import RunDir

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One group for all tests: DeepSpeed keeps the groups that it makes within the first."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Watch:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def resumed(self, step: int) -> None:
        pass

    def metrics(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def pictures(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("precision", "zero_stage"),
    [
        *((precision, stage) for precision in ("auto", "fp32") for stage in range(4)),
        *((precision, stage) for precision in ("fp16", "bf16_weights") for stage in (1, 2, 3)),
    ],
)
def test_train__on_a_gpu(tmp_path: Path, precision: str, zero_stage: int) -> None:
    train_on_gpu(
        tmp_path, "mae-tiny", f"engine.precision={precision}", f"engine.zero_stage={zero_stage}"
    )


@pytest.mark.parametrize(
    "name",
    ["ae-tiny", "vae-tiny", "dvae-tiny", "simmim-tiny", "simmim-swin-tiny", "maskfeat-tiny"],
)
def test_method__on_a_gpu(tmp_path: Path, name: str) -> None:
    train_on_gpu(tmp_path, name, "engine.precision=auto", "engine.zero_stage=3")


def train_on_gpu(tmp_path: Path, name: str, *settings: str) -> None:
    """A few steps on random pictures; the loss stays finite and the weights come back in fp32."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(32):
        pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    source = open_source(str(tmp_path / "pictures"))
    overrides = [
        *settings, "data.num_workers=0", "engine.activation_checkpointing=true",
        "optim.batch_size=16", "logging.every_steps=1",
    ]  # fmt: skip
    plan = resolve(load_recipe(name, overrides, steps=6), source.facts, 1)
    run, watch = RunDir(str(tmp_path / "run")), Watch()
    run.create()
    trained = train(plan, run, source, device=torch.device("cuda", 0), observer=watch)
    assert all(math.isfinite(row["loss"]) for row in watch.rows)
    assert all(value.dtype == torch.float32 for value in trained.state.values())
