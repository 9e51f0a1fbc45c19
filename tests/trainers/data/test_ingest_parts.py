"""Splits and pages in an ingest whose workers run in this process: what they do is not Ray's."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimray.trainers.data import ingest as ingest_module
from mimray.trainers.data.decode import Reading, decode_rgb
from mimray.trainers.data.ingest import Preparation, ingest
from mimray.trainers.data.ingest_plan import IngestPlan
from mimray.trainers.data.sources import available_splits, open_source
from mimray.trainers.errors import DataError


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(plan: IngestPlan, prepare: Preparation) -> Iterator[pa.Table]:
        for start in range(0, len(plan.units), 3):
            units = plan.units.slice(start, 3)
            yield from ingest_module._process_units(units, layout=plan.layout, prepare=prepare)

    monkeypatch.setattr(ingest_module, "_process", process)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def test_ingest__every_split_is_written_where_it_is_found_again(tmp_path: Path) -> None:
    for seed in range(12):
        split = ("Training", "val", "unlabeled")[seed % 3]
        path = tmp_path / f"src/{split}/{'ab'[seed % 2]}/{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))
    (tmp_path / "src/IMG.HEIC").write_bytes(b"a phone's")
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    seen: list[tuple[int, int, int]] = []
    report = ingest(src, out, progress=lambda *p: seen.append(p))
    assert {name: m.num_samples for name, m in report.manifests.items()} == {
        "training": 4,
        "unlabeled": 4,
        "val": 4,
    }
    assert seen[-1] == (12, 12, 0)
    assert report.account.total("unreadable_format") == 1, "once, not for each split"
    assert available_splits(out) == ("training", "unlabeled", "val")
    for split, manifest in report.manifests.items():
        source = open_source(out, split=split)
        assert source.facts.fingerprint == manifest.fingerprint
        assert source.facts.class_names == ("a", "b")
    assert open_source(out).facts == open_source(out, split="train").facts
    with pytest.raises(DataError, match="holds a dataset already"):
        ingest(src, out)
    alone = ingest(src, out, split="val", overwrite=True)
    assert alone.manifest.num_samples == 4
    assert alone.account.total("other_split") == 8
    assert available_splits(out) == ()


def test_ingest__splits_on_an_object_store_replace_each_other(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "src" / split).mkdir(parents=True)
        (tmp_path / "src" / split / "0.jpg").write_bytes(jpeg(1))
    src, out = str(tmp_path / "src"), f"fsspec+file://{tmp_path}/out"
    ingest(src, out)
    assert available_splits(out) == ("test", "train")
    with pytest.raises(DataError, match="holds a dataset already"):
        ingest(src, out, split="test")
    ingest(src, out, split="test", overwrite=True)
    names = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"dataset.json", "rejected.jsonl", "shard-00000.parquet"}
    assert available_splits(out) == ()


def test_ingest__pages_range_and_bands(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    values = np.random.default_rng(1).integers(0, 4096, (3, 20, 24), dtype=np.uint16)
    frames = [Image.fromarray(page) for page in values]
    frames[0].save(src / "stack.tif", save_all=True, append_images=frames[1:])
    frames[0].save(src / "one.tif")
    first = ingest(str(src), str(out))
    assert first.manifest.num_samples == 2
    counts = {entry["reason"]: entry["kinds"] for entry in first.account.to_json()}
    assert counts["first_page"] == {"3 pages": 1}
    assert counts["dark"] == {"values 0:4095": 2}

    reading = Reading(value_range=(0, 4095))
    report = ingest(str(src), str(out), reading=reading, every_page=True, overwrite=True)
    assert report.manifest.num_samples == 4
    assert {e["reason"] for e in report.account.to_json()} == {"to_8_bits"}
    table = pq.read_table(out / "shard-00000.parquet")
    stored = {row["source"]: row["image"]["bytes"] for row in table.to_pylist()}
    assert set(stored) == {"one.tif", *(f"stack.tif#page={n}" for n in (1, 2, 3))}
    pixels = np.asarray(decode_rgb(stored["stack.tif#page=3"]))[..., 0]
    np.testing.assert_array_equal(pixels, np.floor(values[2] * (255 / 4095) + 0.5))


def test_ingest__pages_of_parquet_follow_their_row(tmp_path: Path) -> None:
    rows = []
    for row in range(6):
        buffer = io.BytesIO()
        pages = [Image.new("L", (8, 8), 10 * row + page) for page in range(row % 3 + 1)]
        pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
        rows.append(buffer.getvalue())
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    report = ingest(str(tmp_path / "x.parquet"), str(tmp_path / "out"), every_page=True)
    assert report.manifest.num_samples == 12
    table = pq.read_table(tmp_path / "out/shard-00000.parquet")
    images = (decode_rgb(image["bytes"]) for image in table["image"].to_pylist())
    grays = [int(np.asarray(image)[0, 0, 0]) for image in images]
    assert sorted(grays) == sorted(10 * row + p for row in range(6) for p in range(row % 3 + 1))
    for row in range(6):
        places = [grays.index(10 * row + page) for page in range(row % 3 + 1)]
        assert places == list(range(places[0], places[0] + len(places)))
