from __future__ import annotations

from pathlib import Path

import pytest

from mimray.trainers.data import arena
from mimray.trainers.data.sources import Source
from mimray.trainers.types import Record


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node of this test's own; gives its shared memory."""
    monkeypatch.setattr(arena, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


class TapedSource:
    """A source that notes what is read of it."""

    def __init__(self, source: Source) -> None:
        self.source, self.read = source, list[int]()
        self.facts, self.group_rows = source.facts, source.group_rows
        self.open_groups, self.num_bytes = source.open_groups, source.num_bytes
        self.reads_per_epoch = source.reads_per_epoch
        self.enough_cache_mib = source.enough_cache_mib

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        self.read.append(index)
        return self.source[index]

    def labels(self) -> None:
        return None

    def name(self, index: int) -> str:
        return self.source.name(index)


@pytest.fixture
def taped(source: Source) -> TapedSource:
    """The test's `source`, which notes what is read of it."""
    return TapedSource(source)
