"""A sweep small enough for tests: pictures that are drawn here, trials of a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import Engine, event

from mimray.tuning.config import SweepConfig
from mimray.tuning.plan import SweepPlan, load_sweep, make_plan

SMALL = [
    "base.set.encoder.depth=1", "base.set.encoder.width=32", "base.set.encoder.num_heads=2",
    "base.set.data.image_size=32", "base.set.method.decoder_width=16",
    "base.set.optim.batch_size=8", "base.set.logging.num_pictures=2",
    "base.set.logging.every_steps=1", "base.set.checkpoint.every_steps=2", "budget.steps=8",
]  # fmt: skip
GRID = [
    "space.method.mask_ratio={grid: [0.5, 0.75]}",
    "space.method.decoder_depth={grid: [1, 2]}",
]


@pytest.fixture(scope="session", autouse=True)
def hasty() -> Iterator[None]:
    """SQLite that does not wait for the disk; a study here outlives no power cut."""

    def hurry(connection: Any, record: object) -> None:
        if type(connection).__module__.startswith("sqlite3"):
            connection.execute("PRAGMA synchronous=OFF")

    event.listen(Engine, "connect", hurry)
    yield
    event.remove(Engine, "connect", hurry)


@pytest.fixture(scope="session")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures without labels."""
    folder = tmp_path_factory.mktemp("flat")
    rng = np.random.default_rng(1)
    for i in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(
            folder / f"{i:02d}.png"
        )
    return folder


@pytest.fixture
def small(labelled: Path, tmp_path: Path) -> Callable[..., SweepPlan]:
    """A plan of the shipped sweep, made small; further `a.b=c` after that."""

    def make(*overrides: str, data: Path | None = None, name: str = "sweep") -> SweepPlan:
        config = load_sweep("mae-mask-depth", [*SMALL, *GRID, *overrides])
        return make_plan(
            config, data=str(data or labelled), name=name, storage=str(tmp_path), command="test"
        )

    return make


@pytest.fixture
def configured() -> Callable[..., SweepConfig]:
    """The shipped sweep with `a.b=c` applied."""

    def make(*overrides: str, **_: Any) -> SweepConfig:
        return load_sweep("mae-mask-depth", overrides)

    return make
