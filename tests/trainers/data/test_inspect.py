from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimray.service.commands.data import inspection_text, run_inspect
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


def test_inspect__gives_an_account_of_files_and_of_the_pictures_looked_at(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    dark = np.random.default_rng(1).integers(0, 4096, (8, 8), dtype=np.uint16)
    Image.fromarray(dark).save(tmp_path / "red/dark.png")
    (tmp_path / "red/IMG.HEIC").write_bytes(b"x")
    (tmp_path / "red/9.png").write_bytes(b"")
    found = inspect(str(tmp_path))
    assert [entry["kinds"] for entry in found.account.to_json()] == [{".heic": 1}]
    assert {entry["reason"] for entry in found.looked_at.to_json()} == {"to_8_bits", "dark"}
    assert found.broken == {"empty": 1}


def test_inspect__sizes_come_from_columns_without_reading_pictures(tmp_path: Path) -> None:
    columns = {"image": [b"no picture"] * 100, "width": list(range(100)), "height": [7] * 100}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    found = inspect(str(tmp_path))
    assert found.width == Range(0, 49, 99)
    assert (found.num_measured, found.label_counts) == (100, None)


def write_labels(path: Path, labels: np.ndarray) -> None:
    pq.write_table(pa.table({"image": [b""] * len(labels), "label": labels}), path)


SORTED = {
    "by class": np.repeat(np.arange(1000), 20),
    "a few classes": np.repeat(np.arange(4), 25),
    "by class, backwards": np.repeat(np.arange(9, -1, -1), 500),
    # No two neighbours are alike, and yet no batch of neighbours is mixed.
    "shuffled within shards of ten classes": np.concatenate(
        [np.tile(np.arange(10) + 10 * shard, 200) for shard in range(10)]
    ),
    "shuffled in pairs": np.repeat(np.random.default_rng(0).permutation(10_000) % 1000, 2),
}
MIXED = {
    "shuffled": np.random.default_rng(0).permutation(SORTED["by class"]),
    "in turn": np.tile(np.arange(10), 30),
    "one class": np.zeros(500, dtype=int),
    "one class rules": (np.random.default_rng(0).random(5000) < 0.01).astype(int),
}


@pytest.mark.parametrize("order", [*SORTED, *MIXED])
def test_inspect__labels_in_runs_are_told(tmp_path: Path, order: str) -> None:
    write_labels(tmp_path / "x.parquet", {**SORTED, **MIXED}[order])

    result = run_inspect(str(tmp_path), None)

    assert result["label_mixing"]["in_runs"] == (order in SORTED)
    assert ("mimray data ingest" in inspection_text(result)) == (order in SORTED)


def test_inspect__labels_in_runs_are_told_in_figures(tmp_path: Path) -> None:
    write_labels(tmp_path / "x.parquet", np.repeat(np.arange(100), 1024))

    result = run_inspect(str(tmp_path), None)

    mixing = result["label_mixing"]
    assert (mixing["stretch_rows"], mixing["classes"]) == (1024, 1)
    assert mixing["shuffled_classes"] == pytest.approx(100, abs=0.1)
    assert "1024 rows in turn have 1.0 classes on average, 100.0 if shuffled" in inspection_text(
        result
    )


def test_inspect__order_of_files_and_of_unlabelled_rows_is_not_judged(tmp_path: Path) -> None:
    write_pictures(tmp_path / "folder")
    pq.write_table(pa.table({"image": [b""] * 100}), tmp_path / "x.parquet")
    for place in ("folder", "x.parquet"):
        assert inspect(str(tmp_path / place)).label_mixing is None


def test_inspect__empty(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError):
        inspect(str(tmp_path))
