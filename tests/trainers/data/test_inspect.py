from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimray.trainers.data.inspect import Range, inspect
from mimray.trainers.errors import EmptyDatasetError


def write_pictures(root: Path) -> None:
    for label, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (root / label).mkdir(parents=True)
        for number in range(3):
            size = (20 + 10 * number, 40)
            Image.new("RGB", size, color).save(root / label / f"{number}.png")


def test_inspect__folder(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    found = inspect(str(tmp_path / "data"), contact_sheet=tmp_path / "sheet.png")
    assert found.facts.num_samples == 6
    assert found.label_counts == {"blue": 3, "red": 3}
    assert found.width == Range(20, 30, 40)
    assert found.height == Range(40, 40, 40)
    assert (found.num_measured, found.num_broken, found.num_groups) == (6, 0, 6)
    assert found.num_bytes == sum(p.stat().st_size for p in tmp_path.glob("data/*/*"))

    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    blue, red = ((sheet == color).all(-1) for color in ((0, 0, 255), (255, 0, 0)))
    assert blue.sum() == red.sum() == 3 * 144 * 144
    assert blue.any(0).argmax() < red.any(0).argmax(), "in the order of the dataset"


def test_inspect__broken_pictures_are_counted_and_shown(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    (tmp_path / "data/red/9.png").write_bytes(b"")
    found = inspect(str(tmp_path / "data"), contact_sheet=tmp_path / "sheet.png")
    assert (found.num_measured, found.num_broken) == (6, 1)
    assert (tmp_path / "sheet.png").stat().st_size > 0


def test_inspect__sizes_come_from_columns_without_reading_pictures(tmp_path: Path) -> None:
    columns = {"image": [b"no picture"] * 100, "width": list(range(100)), "height": [7] * 100}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    found = inspect(str(tmp_path))
    assert found.width == Range(0, 49, 99)
    assert (found.num_measured, found.label_counts) == (100, None)


def test_inspect__empty(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError):
        inspect(str(tmp_path))
