from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import fs as pafs

from mimray.trainers.data.reorder import ExternalSort

SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int64())])


def sort_of(folder: Path, num_places: int, num_bytes: int, memory_bytes: int) -> ExternalSort:
    return ExternalSort(
        pafs.LocalFileSystem(),
        str(folder),
        num_places=num_places,
        num_bytes=num_bytes,
        memory_bytes=memory_bytes,
    )


@pytest.mark.parametrize("memory_bytes", [3000, 20_000, 1 << 20])
def test_sort__rows_come_back_in_the_order_of_their_places(tmp_path: Path, memory_bytes: int):
    rng = np.random.default_rng(0)
    places = rng.permutation(1000)[:900]  # some places stay empty, as those of rejected pictures
    sort = sort_of(tmp_path, 1000, 100 * 900, memory_bytes)
    for start in range(0, 900, 60):
        part = places[start : start + 60]
        rows = [{"image": b"x" * 100, "label": int(place)} for place in part]
        sort.add(pa.Table.from_pylist(rows, schema=SCHEMA), part)

    spilled = list(tmp_path.iterdir())
    found = pa.concat_tables(sort.rows())

    assert bool(spilled) == (memory_bytes < 1 << 20)
    # What is sorted at once may be more than the 2 GiB of an array of binary.
    assert found.schema == pa.schema([("image", pa.large_binary()), ("label", pa.int64())])
    assert found["label"].to_pylist() == sorted(places.tolist())
    assert not list(tmp_path.iterdir()), "what lay beside is gone"


def test_sort__nothing_gives_nothing(tmp_path: Path):
    assert not list(sort_of(tmp_path, 5, 0, 10).rows())


def test_sort__files_hold_what_memory_may_not(tmp_path: Path):
    sort = sort_of(tmp_path, 400, 40_000, 4000)
    rows = pa.Table.from_pylist([{"image": b"x" * 100, "label": 0}] * 20, schema=SCHEMA)
    for start in range(0, 400, 20):
        sort.add(rows, np.arange(start, start + 20))
        assert sort._held_bytes < 4000
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) >= 10
    assert sum(sizes) > 40_000
