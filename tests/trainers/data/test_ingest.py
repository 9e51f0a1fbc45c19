from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimray.trainers.data.decode import decode_rgb
from mimray.trainers.data.ingest import ingest
from mimray.trainers.data.manifest import unfinished_json
from mimray.trainers.data.reorder import ExternalSort
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError, EmptyDatasetError, StorageError, TooManyRejectedError

pytestmark = pytest.mark.usefixtures("ray_session")


def jpeg(seed: int, size: tuple[int, int] = (48, 32)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tree(root: Path, num_pictures: int = 90) -> None:
    for seed in range(num_pictures):
        path = root / ("dog" if seed % 3 else "cat") / f"{seed:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(seed))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_ingest__folder_tree(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    write_tree(src)
    (src / "cat/big.jpg").write_bytes(jpeg(1000, (400, 300)))
    (src / "cat/broken.jpg").write_bytes(jpeg(1001)[:-500])
    (src / "dog/text.jpg").write_text("not a picture at all")
    (src / "dog/notes.txt").write_text("ignored")
    (src / "dog/Thumbs.db").write_bytes(b"ignored")
    seen: list[tuple[int, int, int]] = []
    report = ingest(
        str(src), str(out), short_side_px=64, max_rejected=0.05, progress=lambda *p: seen.append(p)
    )
    manifest = report.manifest
    assert manifest.rejected == {"not_an_image": 1, "truncated": 1}
    assert (manifest.num_samples, report.num_rejected) == (91, 2)
    assert {entry["reason"]: entry["kinds"] for entry in manifest.account} == {
        "hidden": {"Thumbs.db": 1},
        "not_a_picture": {".txt": 1},
    }
    assert manifest.num_reencoded == 1
    assert seen[-1] == (93, 93, 2)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert sorted((line["source"], line["reason"]) for line in lines) == [
        ("cat/broken.jpg", "truncated"),
        ("dog/text.jpg", "not_an_image"),
    ]

    source = open_source(str(out))
    assert source.facts.class_names == ("cat", "dog")
    assert source.facts.fingerprint == manifest.fingerprint
    labels = source.labels()
    assert labels is not None
    assert np.bincount(labels).tolist() == [31, 60]
    assert (np.diff(labels) != 0).sum() > 20, "classes do not lie in stretches"

    table = pq.read_table(out / "shard-00000.parquet")
    assert table.column_names == ["image", "label", "width", "height", "source"]
    sources = table["source"].to_pylist()
    kept, shrunk = sources.index("cat/003.jpg"), sources.index("cat/big.jpg")
    assert source[kept] == ((src / "cat/003.jpg").read_bytes(), 0), "what fits stays as it is"
    assert decode_rgb(source[shrunk].image).size == (85, 64)
    assert (table["width"][shrunk].as_py(), table["height"][shrunk].as_py()) == (85, 64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_ingest__same_source_gives_the_same_bytes_and_survives_re_ingest(tmp_path: Path) -> None:
    write_tree(tmp_path / "src")
    write_tree(tmp_path / "moved" / "src")
    ingest(str(tmp_path / "src"), str(tmp_path / "one"), short_side_px=16)
    ingest(str(tmp_path / "moved" / "src"), str(tmp_path / "two"), short_side_px=16)
    ingest(str(tmp_path / "one"), str(tmp_path / "again"), short_side_px=16)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    one, again = (open_source(str(tmp_path / name)) for name in ("one", "again"))
    assert one.facts.fingerprint == again.facts.fingerprint
    assert (tmp_path / "one/shard-00000.parquet").read_bytes() == (
        tmp_path / "again/shard-00000.parquet"
    ).read_bytes()


def test_ingest__fingerprint_follows_pictures_and_labels(tmp_path: Path) -> None:
    write_tree(tmp_path / "a", 6)
    write_tree(tmp_path / "b", 6)
    (tmp_path / "b/cat/000.jpg").rename(tmp_path / "b/dog/000.jpg")
    write_tree(tmp_path / "c", 6)
    (tmp_path / "c/cat/000.jpg").write_bytes(jpeg(77))
    prints = {
        ingest(str(tmp_path / name), str(tmp_path / f"{name}-out")).manifest.fingerprint
        for name in "abc"
    }
    assert len(prints) == 3


def test_ingest__row_groups_and_shards_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for seed in range(12):
        (tmp_path / f"src/{seed:02d}.jpg").write_bytes(jpeg(seed, (900, 900)))
    report = ingest(str(tmp_path / "src"), str(tmp_path / "out"), short_side_px=None, shard_mib=1)
    assert len(report.manifest.shards) > 1
    for shard in report.manifest.shards:
        footer = pq.read_metadata(tmp_path / "out" / shard.file)
        assert footer.num_rows == shard.num_rows
        sizes = [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]
        assert max(sizes) <= 4 << 20
        assert footer.row_group(0).num_rows > 1
    source = open_source(str(tmp_path / "out"))
    found = {source[i].image for i in range(12)}
    assert found == {jpeg(i, (900, 900)) for i in range(12)}
    assert source.labels() is None


def test_ingest__text_list(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    for seed in range(3):
        (tmp_path / f"pics/{seed}.jpg").write_bytes(jpeg(seed))
    listed = ["pics/2.jpg", f"file://{tmp_path}/pics/0.jpg", "# a comment", "", "pics/gone.jpg"]
    (tmp_path / "list.txt").write_text("\n".join([*listed, str(tmp_path / "pics/1.jpg")]))
    report = ingest(str(tmp_path / "list.txt"), str(tmp_path / "out"), max_rejected=0.5)
    assert report.manifest.rejected == {"missing": 1}
    source = open_source(str(tmp_path / "out"))
    assert {source[i].image for i in range(3)} == {jpeg(2), jpeg(0), jpeg(1)}


def test_ingest__hugging_face_parquet(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    images = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(5)]
    images[3] = {"bytes": None, "path": "elsewhere.jpg"}
    table = pa.table({"image": images, "label": [0, 1, 1, 0, 1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet", row_group_size=2)
    report = ingest(str(tmp_path), f"{tmp_path}-out", max_rejected=0.5)
    assert report.manifest.rejected == {"empty": 1}
    source = open_source(f"{tmp_path}-out")
    assert source.facts.class_names == ("cat", "dog")
    place = next(i for i in range(4) if source.name(i).startswith("4.jpg in "))
    assert source[place] == (jpeg(4), 1)


def test_ingest__sorted_parquet_is_permuted_alike_whatever_its_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 240
    table = pa.table({"image": [jpeg(i) for i in range(rows)], "label": np.repeat(range(8), 30)})
    found = []
    cases = (("a", 7, 1 << 20), ("b", 240, 20_000), ("c", 240, 60_000))
    for name, group_rows, memory_bytes in cases:
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / f"{name}/x.parquet", row_group_size=group_rows)
        monkeypatch.setitem(ExternalSort.__init__.__kwdefaults__, "memory_bytes", memory_bytes)
        ingest(str(tmp_path / name), f"{tmp_path}/{name}-out")
        found.append(contents(tmp_path / f"{name}-out"))

    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == ["dataset.json", "rejected.jsonl", "shard-00000.parquet"]
    source = open_source(f"{tmp_path}/a-out")
    labels = source.labels()
    assert labels is not None
    assert np.bincount(labels).tolist() == [30] * 8
    assert (np.diff(labels) != 0).mean() > 0.8, "neighbours are strangers"
    pictures = {jpeg(i): i // 30 for i in range(rows)}
    assert all(pictures[source[i].image] == source[i].label for i in range(rows))


def test_ingest__a_dataset_of_an_earlier_version_is_permuted(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 60)
    ingest(str(tmp_path / "src"), str(tmp_path / "one"))
    manifest = json.loads((tmp_path / "one/dataset.json").read_text())
    assert manifest.pop("permuted")
    (tmp_path / "one/dataset.json").write_text(json.dumps(manifest))

    ingest(str(tmp_path / "one"), str(tmp_path / "two"))
    ingest(str(tmp_path / "two"), str(tmp_path / "three"))

    prints = [open_source(str(tmp_path / n)).facts.fingerprint for n in ("one", "two", "three")]
    assert prints[0] != prints[1] == prints[2]


def test_ingest__too_many_rejected_leaves_only_the_list(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 9)
    (tmp_path / "src/dog/bad.jpg").write_bytes(b"")
    with pytest.raises(TooManyRejectedError, match=r"1 of 10 .*10.0%.*1 empty"):
        ingest(str(tmp_path / "src"), str(tmp_path / "out"), max_rejected=0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.rejected.jsonl", "src"]
    assert json.loads((tmp_path / "out.rejected.jsonl").read_text())["source"] == "dog/bad.jpg"
    ingest(str(tmp_path / "src"), str(tmp_path / "out"), max_rejected=0.1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_ingest__no_picture_left(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with pytest.raises(EmptyDatasetError, match="no picture"):
        ingest(str(tmp_path / "src"), str(tmp_path / "out"))
    (tmp_path / "src/a.png").write_bytes(b"")
    with pytest.raises(EmptyDatasetError, match="none of the 1 pictures"):
        ingest(str(tmp_path / "src"), str(tmp_path / "out"), max_rejected=1.0)
    with pytest.raises(DataError, match="does not exist"):
        ingest(str(tmp_path / "gone"), str(tmp_path / "out"))


def test_ingest__refuses_a_taken_place(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 3)
    src, out = str(tmp_path / "src"), str(tmp_path / "out")
    ingest(src, out)
    with pytest.raises(DataError, match="--overwrite"):
        ingest(src, out)
    (tmp_path / "src/dog/new.jpg").write_bytes(jpeg(99))
    assert ingest(src, out, overwrite=True).manifest.num_samples == 4
    assert len(open_source(out)) == 4
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty"):
        ingest(src, str(tmp_path / "mine"), overwrite=True)
    with pytest.raises(DataError, match="lies in"):
        ingest(src, f"{src}/out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written"):
        ingest(src, str(tmp_path / "file/out"))


@pytest.mark.parametrize("scheme", ["", "fsspec+file://"])
def test_ingest__interrupted_leaves_nothing(tmp_path: Path, scheme: str) -> None:
    write_tree(tmp_path / "src")

    def interrupt(done: int, total: int, rejected: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(str(tmp_path / "src"), f"{scheme}{tmp_path}/out", progress=interrupt)
    assert not list(tmp_path.glob("out/*"))
    assert not list(tmp_path.glob("out.*"))


def test_ingest__killed_leaves_no_dataset_and_the_next_one_sweeps(
    tmp_path: Path, ray_session: str
) -> None:
    write_tree(tmp_path / "src")
    script = (
        "import os, ray, signal, sys\n"
        "from mimray.trainers.data.ingest import ingest\n"
        "ray.init(address=sys.argv[1], log_to_driver=False)\n"
        "kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ingest(sys.argv[2], sys.argv[3], progress=kill)\n"
    )
    paths = [str(tmp_path / "src"), str(tmp_path / "out")]
    killed = subprocess.run(
        [sys.executable, "-c", script, ray_session, *paths], capture_output=True, timeout=600
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob("out.partial-*"))
    ingest(*paths)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_ingest__object_store_counts_only_with_dataset_json(tmp_path: Path) -> None:
    write_tree(tmp_path / "src", 6)
    src, out = str(tmp_path / "src"), f"fsspec+file://{tmp_path}/out"
    ingest(src, out)
    source = open_source(out, cache_dir=str(tmp_path / "cache"))
    assert source[0].image in {jpeg(seed) for seed in range(6)}

    (tmp_path / "out/dataset.json").unlink()  # as if killed before the commit
    (tmp_path / "out/unfinished.json").write_text(unfinished_json(()))
    with pytest.raises(DataError, match="interrupted ingest"):
        open_source(out)
    with pytest.raises(DataError, match="interrupted ingest"):
        open_source(str(tmp_path / "out"))
    ingest(src, out)
    assert len(open_source(str(tmp_path / "out"))) == 6


def test_open_source__missing_shard_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for seed in range(12):
        (tmp_path / f"src/{seed}.jpg").write_bytes(jpeg(seed, (900, 900)))
    ingest(str(tmp_path / "src"), str(tmp_path / "out"), short_side_px=None, shard_mib=1)
    (tmp_path / "out/shard-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"dataset\.json lists"):
        open_source(str(tmp_path / "out"))


def test_ingest__leaves_the_data_context_as_it_was(tmp_path: Path) -> None:
    import ray.data

    before = ray.data.DataContext.get_current()
    write_tree(tmp_path / "src", 3)
    ingest(
        str(tmp_path / "src"),
        str(tmp_path / "out"),
        progress=lambda *_: _same(before, ray.data.DataContext.get_current()),
    )
    assert not before.execution_options.preserve_order


def _same(one: object, other: object) -> None:
    assert one is other
