from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from mimray.trainers.config.data import CACHE_MIB
from mimray.trainers.data import parquet, parts
from mimray.trainers.data.cache import DiskCache, MemoryCache
from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.sources import ParquetSource, available_splits, open_source
from mimray.trainers.errors import DataError, EmptyDatasetError

HF_LABELS = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}


def picture(seed: int, size_px: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size_px, size_px, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, names: list[str]) -> None:
    for seed, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed))


def write_hf(
    path: Path, images: list[bytes], labels: list[int | None], group_rows: int = 1000
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": [{"bytes": b, "path": f"p{i}.png"} for i, b in enumerate(images)],
            "label": pa.array(labels, pa.int64()),
        }
    ).replace_schema_metadata({"huggingface": json.dumps(HF_LABELS)})
    pq.write_table(table, path, row_group_size=group_rows)


class CountingFileSystem(LocalFileSystem):
    """A "remote" filesystem that notes how much of each file is read."""

    protocol = ("counting",)
    cachable = False
    num_bytes = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counting://"))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = super()._open(path, mode=mode, **options)
        read: Callable[..., bytes] = file.read

        def counted(*arguments: int) -> bytes:
            data = read(*arguments)
            CountingFileSystem.num_bytes += len(data)
            return data

        file.read = counted
        return file


@pytest.fixture
def counting() -> type[CountingFileSystem]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.num_bytes = 0
    return CountingFileSystem


def test_folder__class_folders_are_labels(tmp_path: Path) -> None:
    write_tree(tmp_path, ["dog/b.png", "cat/deep/a.JPG", "cat/c.png"])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cat/._c.png").write_text("finder's shadow")
    source = open_source(str(tmp_path))
    assert source.facts.class_names == ("cat", "dog")
    assert [source.name(i) for i in range(3)] == [
        f"{tmp_path}/cat/c.png",
        f"{tmp_path}/cat/deep/a.JPG",
        f"{tmp_path}/dog/b.png",
    ]
    labels = source.labels()
    assert labels is not None
    np.testing.assert_array_equal(labels, [0, 0, 1])
    assert source[2] == (picture(0), 1)
    np.testing.assert_array_equal(source.group_rows, [1, 1, 1])


@pytest.mark.parametrize(
    "names", [["a.png", "b.png"], ["cat/a.png", "dog/b.png", "c.png"], ["JPEGImages/a.png"]]
)
def test_folder__without_class_folders_is_unlabelled(tmp_path: Path, names: list[str]) -> None:
    write_tree(tmp_path, names)
    source = open_source(str(tmp_path))
    assert len(source) == len(names)
    assert source.labels() is None
    assert source[0].label is None
    assert source.facts.class_names == ()


def test_folder__split_folders_are_not_classes(tmp_path: Path) -> None:
    write_tree(tmp_path, ["train/cat/a.png", "train/dog/b.png", "val/cat/c.png", "val/dog/d.png"])
    assert available_splits(str(tmp_path)) == ("train", "val")
    assert open_source(str(tmp_path)).name(0).endswith("train/cat/a.png")
    source = open_source(str(tmp_path), split="val")
    assert source.facts.class_names == ("cat", "dog")
    assert source[1] == (picture(3), 1)


def test_folder__fingerprint_follows_paths_and_sizes_not_the_place(tmp_path: Path) -> None:
    names = ["cat/a.png", "dog/b.png"]
    prints = []
    for place, renamed in (("one", names), ("two", names), ("three", ["cat/a.png", "dog/z.png"])):
        write_tree(tmp_path / place, renamed)
        prints.append(open_source(str(tmp_path / place)).facts.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_parquet__hugging_face_layout(tmp_path: Path) -> None:
    images = [picture(i) for i in range(5)]
    write_hf(tmp_path / "data.parquet", images, [0, 1, 1, None, 0], group_rows=2)
    source = open_source(str(tmp_path))
    assert source.facts.class_names == ("cat", "dog")
    np.testing.assert_array_equal(source.group_rows, [2, 2, 1])
    labels = source.labels()
    assert labels is not None
    np.testing.assert_array_equal(labels, [0, 1, 1, -1, 0])
    assert [source[i].image for i in range(5)] == images
    assert [source[i].label for i in range(5)] == [0, 1, 1, None, 0]
    assert source.name(3) == f"p3.png in {tmp_path}/data.parquet row group 1 row 1"
    with pytest.raises(IndexError):
        source[5]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_parquet__lone_binary_column_without_labels(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"id": [1, 2], "jpg": pa.array([picture(1), picture(2)], kind)})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    assert source.labels() is None
    assert source[1] == (picture(2), None)


def test_parquet__labels_all_null_are_no_labels(tmp_path: Path) -> None:
    write_hf(tmp_path / "x.parquet", [picture(1)] * 3, [None] * 3)
    source = open_source(str(tmp_path))
    assert source.labels() is None
    assert source.facts.class_names == ()


def test_parquet__splits(tmp_path: Path) -> None:
    for number, name in enumerate(
        ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"]
    ):
        write_hf(
            tmp_path / f"data/{name}.parquet", [picture(number)] * (number + 1), [0] * (number + 1)
        )
    assert available_splits(str(tmp_path)) == ("test", "train")
    assert len(open_source(str(tmp_path))) == 3
    assert len(open_source(str(tmp_path), split="test")) == 3
    assert open_source(str(tmp_path), split="test")[0].image == picture(2)
    with pytest.raises(DataError, match="splits found: test, train"):
        open_source(str(tmp_path), split="dev")


def test_parquet__one_picture_costs_one_row_group(
    tmp_path: Path, counting: type[CountingFileSystem]
) -> None:
    images = [picture(i, 64) for i in range(60)]
    path = tmp_path / "x.parquet"
    write_hf(path, images, [0] * 60, group_rows=6)
    group_bytes = path.stat().st_size / 10
    source = open_source(f"fsspec+counting://{tmp_path}", cache_dir=str(tmp_path / "cache"))

    counting.num_bytes = 0
    assert source[31].image == images[31]
    assert 0 < counting.num_bytes < 1.3 * group_bytes
    counting.num_bytes = 0
    assert source[35].image == images[35]
    assert counting.num_bytes == 0, "the same row group is at hand"
    again = pickle.loads(pickle.dumps(source))
    assert again[33].image == images[33]
    assert counting.num_bytes == 0, "another process finds it on the local disk"
    labels = source.labels()
    assert labels is not None
    assert counting.num_bytes < group_bytes, "labels are read without pictures"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds so small that row groups of some pictures are kept on disk, in parts."""
    monkeypatch.setattr(parts, "OPEN_BYTES", 500_000)
    monkeypatch.setattr(parts, "MIN_OPEN_PARTS", 16)
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 16_000)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scheme", ["", "fsspec+counting://"])
@pytest.mark.parametrize("cache_mib", [1, 4])
def test_parquet__large_row_groups_are_read_once_a_part_or_once(
    tmp_path: Path, counting: type[CountingFileSystem], scheme: str, cache_mib: int
) -> None:
    # 1.5 MiB of noise, so that a cache of 1 MiB does not hold them and one of 4 MiB does.
    images = [picture(i, 66) for i in range(120)]
    write_hf(tmp_path / "data/a.parquet", images[:70], [0] * 70, group_rows=20)
    write_hf(tmp_path / "data/b.parquet", images[70:], [1] * 50, group_rows=50)
    uri, cache = f"{scheme}{tmp_path}/data", tmp_path / "cache"
    plain = open_source(uri, cache_dir=str(cache))
    source = open_source(uri, cache_dir=str(cache), cache_mib=cache_mib, shuffled=True)
    assert source.facts == plain.facts
    assert plain.group_rows.tolist() == [20, 20, 20, 10, 50]
    assert source.group_rows.sum() == 120
    assert len(source.group_rows) > 4 * len(plain.group_rows)
    assert isinstance(source, ParquetSource)
    num_reads = 5 if cache_mib == 4 else len(source.group_rows)
    assert source.reads_per_epoch == num_reads / 5
    assert 16 <= source.open_groups < len(source.group_rows)

    read: list[tuple[str, int]] = []
    whole = ParquetSource._read

    def counted(self: Any, shard: Any, group: int, columns: list[str]) -> pa.Table:
        read.append((shard.path, group))
        return whole(self, shard, group, columns)

    order = SampleOrder(source.group_rows, 0, 8192, source.open_groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParquetSource, "_read", counted)
        for index in order.take(0, 120)[1].tolist():
            assert source[index] == (images[index], int(index >= 70))
        assert len(read) == num_reads
        again = pickle.loads(pickle.dumps(source))
        assert again[index].image == images[index]
        assert len(read) == num_reads, "another process finds it on disk"
    assert [source.name(i) for i in (69, 70, 119)] == [plain.name(i) for i in (69, 70, 119)]
    assert (source.labels() == plain.labels()).all()  # type: ignore[union-attr]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("scheme", ["", "fsspec+file://"])
def test_parquet__a_cache_that_holds_less_than_is_in_use_is_said(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [picture(i, 66) for i in range(120)]  # 1.5 MiB
    write_hf(tmp_path / "data/a.parquet", images, [0] * 120, group_rows=20)
    source = open_source(f"{scheme}{tmp_path}/data", cache_mib=1, shuffled=True)
    assert source.enough_cache_mib == 2, "all of it"
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1 << 20)
    source = open_source(f"{scheme}{tmp_path}/data", cache_mib=1, shuffled=True)
    assert source.enough_cache_mib == 1, "what is in use at a time"
    assert open_source(f"{scheme}{tmp_path}/data").enough_cache_mib == 0


def test_parquet__the_default_cache_holds_what_is_in_use() -> None:
    assert CACHE_MIB << 20 == parts.CACHE_BYTES


@pytest.mark.usefixtures("small")
def test_parquet__a_local_file_of_the_same_sizes_is_read_again(tmp_path: Path) -> None:
    found, prints = [], set()
    for number in range(2):
        images = [np.random.default_rng([number, i]).bytes(800) for i in range(30)]
        write_hf(tmp_path / "data/a.parquet", images, [0] * 30, group_rows=10)
        os.utime(tmp_path / "data/a.parquet", ns=(0, number))
        source = open_source(
            str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"), shuffled=True
        )
        found.append([source[i].image for i in range(30)] == images)
        prints.add(source.facts.fingerprint)
    assert list((tmp_path / "cache").glob("*.arrow")), "it was kept"
    assert found == [True, True]
    assert len(prints) == 1, "the fingerprint is the same wherever the file lies"


def test_copied_stretch__of_more_than_2_gib_is_no_single_array() -> None:
    small = np.frombuffer(b"0123456789", np.uint8)
    data = pa.py_buffer(np.zeros(1_100_000_000, np.uint8))  # pages that are never touched
    ends = pa.py_buffer(np.array([0, len(data) - len(small), len(data)], np.int32))
    large = pa.Array.from_buffers(pa.binary(), 2, [None, ends, data])
    table = pa.table({"image": pa.chunked_array([large, large, [bytes(small)] * 3])})
    part = parquet.copied_stretch(table, 3, 2)
    assert part["image"].to_pylist() == [bytes(10), bytes(small)]
    assert part.get_total_buffer_size() < 1000, "what is not in it is let go"


@pytest.mark.usefixtures("small")
def test_parquet__what_ingest_permuted_is_read_by_whole_row_groups(tmp_path: Path) -> None:
    manifest = {
        "format": "mimray-dataset",
        "version": 1,
        "num_samples": 60,
        "labelled": True,
        "class_names": [],
        "fingerprint": "0" * 64,
        "image_bytes": 1,
        "short_side_px": None,
        "num_reencoded": 0,
        "num_ignored": 0,
        "rejected": {},
        "shards": [{"file": "shard-00000.parquet", "num_rows": 60, "num_bytes": 1}],
    }
    write_hf(tmp_path / "shard-00000.parquet", [picture(i, 66) for i in range(60)], [0] * 60, 20)
    found = []
    for permuted in (True, False):
        (tmp_path / "dataset.json").write_text(json.dumps(manifest | {"permuted": permuted}))
        source = open_source(str(tmp_path), shuffled=True, cache_dir=str(tmp_path / "cache"))
        found.append((len(source.group_rows) == 3, source[59].image == picture(59, 66)))
        assert (tmp_path / "cache").exists() != permuted
    assert found == [(True, True), (False, True)]


def test_disk_cache__of_several_that_miss_a_file_one_loads_it(tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> pa.Table:
        loads.append(1)
        time.sleep(0.2)
        return pa.table({"x": [1]})

    with ThreadPoolExecutor(4) as pool:  # locks are of open files, as if these were processes
        found = list(pool.map(lambda _: DiskCache(str(tmp_path), 1).get("a", load), range(4)))

    assert len(loads) == 1
    assert all(table.equals(pa.table({"x": [1]})) for table in found)


def test_disk_cache__that_cannot_be_written_costs_no_picture(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache, table = DiskCache(str(tmp_path / "file/cache"), 1), pa.table({"x": [1]})
    assert cache.get("a", lambda: table).equals(table)


def test_disk_cache__is_bounded_and_evicts_the_longest_unread(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), max_mib=1)
    table = pa.table({"x": np.zeros(50_000)})  # 0.4 MB
    for seconds, key in enumerate("ab"):
        cache.get(key, lambda: table)
        os.utime(tmp_path / f"{key}.arrow", (seconds, seconds))
    cache.get("a", lambda: pytest.fail("it is there"))  # makes `b` the longest unread
    cache.get("c", lambda: table)
    assert sorted(p.name for p in tmp_path.glob("*.arrow")) == ["a.arrow", "c.arrow"]


def test_disk_cache__reads_again_what_is_damaged(tmp_path: Path) -> None:
    cache = DiskCache(str(tmp_path), max_mib=1)
    table = pa.table({"x": [1, 2]})
    (tmp_path / "a.arrow").write_bytes(b"half a file")
    assert cache.get("a", lambda: table).equals(table)
    assert cache.get("a", lambda: pytest.fail("it was kept")).equals(table)


def test_memory_cache__keeps_to_its_bound() -> None:
    table = pa.table({"x": np.zeros(1000)})
    cache = MemoryCache(max_bytes=2 * table.nbytes)
    loads: list[str] = []
    for key in "abacab":
        cache.get(key, lambda key=key: (loads.append(key), table)[1])  # type: ignore[misc]
    assert loads == ["a", "b", "c", "b"]


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_source__survives_fork_and_pickling_after_use(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        write_tree(tmp_path, ["a.png", "b.png"])
    else:
        write_hf(tmp_path / "x.parquet", [picture(0), picture(1)], [0, 1])
    source = open_source(str(tmp_path))
    assert source[0].image == picture(0)
    assert pickle.loads(pickle.dumps(source))[1].image == picture(1)
    fork = multiprocessing.get_context("fork")
    queue = fork.SimpleQueue()
    worker = fork.Process(target=lambda: queue.put(source[1].image))
    worker.start()
    assert queue.get() == picture(1)
    worker.join(10)
    assert worker.exitcode == 0


def test_open_source__relative_path_outlives_a_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "pics", ["a.png"])
    monkeypatch.chdir(tmp_path)
    source = open_source("pics")
    monkeypatch.chdir("/")
    assert source[0].image == picture(0)


def test_open_source__nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_source(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="s3://"):
        open_source("nope://bucket/folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyDatasetError, match="no picture"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "empty/readme.txt").write_text("hello")
    with pytest.raises(EmptyDatasetError, match="no picture"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="not Parquet"):
        open_source(str(tmp_path / "empty/readme.txt"))


def test_open_source__unusable_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match="no column that may hold pictures"):
        open_source(str(tmp_path / "text.parquet"))
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    with pytest.raises(DataError, match="several columns"):
        open_source(str(tmp_path / "two.parquet"))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "two.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="not a whole Parquet file"):
        open_source(str(tmp_path / "cut.parquet"))
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "none.parquet")
    with pytest.raises(EmptyDatasetError, match="without a row"):
        open_source(str(tmp_path / "none.parquet"))
    write_hf(tmp_path / "mixed/a.parquet", [picture(0)], [0])
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "mixed/b.parquet")
    with pytest.raises(DataError, match="differ in columns"):
        open_source(str(tmp_path / "mixed"))


def test_parquet__a_shard_that_vanishes_is_a_data_error(tmp_path: Path) -> None:
    write_hf(tmp_path / "x.parquet", [picture(0)], [0])
    source = open_source(str(tmp_path))
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(DataError, match=r"x\.parquet cannot be read"):
        source[0]


def test_parquet__a_shard_written_again_is_a_data_error(tmp_path: Path) -> None:
    write_hf(tmp_path / "x.parquet", [picture(0)], [0])
    source = open_source(str(tmp_path))
    again = tmp_path / "x.parquet"
    os.utime(again, ns=(0, again.stat().st_mtime_ns + 1))  # as other pictures of the same sizes
    with pytest.raises(DataError, match=r"x\.parquet has changed since the data was opened"):
        source[0]


def test_folder__a_picture_cut_short_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture(0))
    source = open_source(str(tmp_path))
    (tmp_path / "x.png").write_bytes(picture(0)[:-9])
    with pytest.raises(DataError, match=r"x\.png has changed since the data was opened"):
        source[0]
