"""An ingest removes nothing but what an ingest wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mimray.trainers.data.ingest import ingest
from mimray.trainers.data.manifest import splits_json, unfinished_json
from mimray.trainers.data.staging import staged
from mimray.trainers.errors import DataError

# A local disk, and a filesystem that is written in place as an object store is.
SCHEMES = pytest.mark.parametrize("scheme", ["", "fsspec+file://"])

_MANIFEST = (
    '{"format": "mimray-dataset", "version": 1, "num_samples": 0, "labelled": false, '
    '"class_names": [], "fingerprint": "", "image_bytes": 0, "short_side_px": null, '
    '"num_reencoded": 0, "rejected": {}, "shards": []}'
)


def write_dataset(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "dataset.json").write_text(_MANIFEST)
    for name in ("rejected.jsonl", "shard-00000.parquet"):
        (folder / name).write_text("{}")


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def replace_with_new(out: str, *, overwrite: bool, parts: tuple[str, ...] = ()) -> None:
    with staged(out, overwrite=overwrite, parts=parts) as staging:
        staging.write("dataset.json", "{}")


@SCHEMES
@pytest.mark.parametrize("overwrite", [False, True])
def test_staged__a_folder_of_datasets_is_no_interrupted_ingest(
    tmp_path: Path, scheme: str, overwrite: bool
) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / "datasets" / name)
    before = files(tmp_path)
    with pytest.raises(DataError, match="not empty: it holds a"):
        replace_with_new(f"{scheme}{tmp_path}/datasets", overwrite=overwrite)
    assert files(tmp_path) == before


@SCHEMES
@pytest.mark.parametrize("name", ["shard-00000.parquet", "rejected.jsonl", "a/dataset.json"])
def test_staged__a_file_is_not_ours_by_its_name(tmp_path: Path, scheme: str, name: str) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    with pytest.raises(DataError, match="not empty"):
        replace_with_new(f"{scheme}{tmp_path}/out", overwrite=False)
    assert file.exists()


@SCHEMES
@pytest.mark.parametrize("foreign", ["notes/my.txt", "train/my.txt", "train/a/shard-00000.parquet"])
def test_staged__overwrite_refuses_what_no_ingest_wrote(
    tmp_path: Path, scheme: str, foreign: str
) -> None:
    out = tmp_path / "out"
    write_dataset(out / "train")
    (out / "splits.json").write_text(splits_json(["train"]))
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("years of work")
    before = files(out)
    with pytest.raises(DataError, match=foreign.rpartition("/")[0]):
        replace_with_new(f"{scheme}{out}", overwrite=True)
    assert files(out) == before
    (out / foreign).unlink()
    if (out / foreign).parent.name != "train":
        (out / foreign).parent.rmdir()
    replace_with_new(f"{scheme}{out}", overwrite=True)
    assert files(out) == {"dataset.json"}


def test_staged__splits_json_names_no_folder_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_dataset(out)
    write_dataset(tmp_path / "other")
    (out / "splits.json").write_text(splits_json(["../other", "..", ""]))
    replace_with_new(f"fsspec+file://{out}", overwrite=True)
    assert files(tmp_path) >= {"other/dataset.json", "other/shard-00000.parquet"}


def test_staged__what_a_killed_ingest_left_is_swept(tmp_path: Path) -> None:
    out, killed = tmp_path / "out", tmp_path / "killed"
    with staged(f"fsspec+file://{out}", overwrite=False, parts=("train", "val")) as staging:
        staging.part("train").write("shard-00000.parquet", "")
        staging.write("rows-00000.arrow", "")
        shutil.copytree(out, killed)  # as a process that is killed here leaves it
    assert "unfinished.json" in files(killed)
    assert "unfinished.json" not in files(out)
    write_dataset(killed / "mine")
    with pytest.raises(DataError, match="holds mine"):
        replace_with_new(f"fsspec+file://{killed}", overwrite=False)
    shutil.move(killed / "mine", tmp_path / "mine")
    replace_with_new(f"fsspec+file://{killed}", overwrite=False)
    assert files(killed) == {"dataset.json"}
    assert not (killed / "train").exists()


def test_staged__killed_while_the_old_dataset_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_dataset(out / "old")
    (out / "old/dataset.json").unlink()
    (out / "unfinished.json").write_text(unfinished_json(["old", "train"]))
    replace_with_new(f"fsspec+file://{out}", overwrite=False, parts=("train",))
    assert files(out) == {"dataset.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_staged__what_came_meanwhile_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    if overwrite:
        write_dataset(out)

    def ingest_for_hours() -> None:
        with staged(str(out), overwrite=overwrite) as staging:
            staging.write("dataset.json", "{}")
            if overwrite:
                (out / "my.txt").write_text("years of work")
            else:
                write_dataset(out)

    with pytest.raises(DataError, match=r"holds a dataset already|holds my\.txt"):
        ingest_for_hours()
    assert files(out) >= {"dataset.json", "shard-00000.parquet"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("link", [False, True])
def test_ingest__source_and_place_lie_apart(tmp_path: Path, link: bool) -> None:
    write_dataset(tmp_path / "datasets/a")
    src = tmp_path / "datasets/a"
    if link:
        (tmp_path / "link").symlink_to(src)
        src = tmp_path / "link"
    for out in (tmp_path / "datasets", tmp_path / "datasets/a/b", tmp_path / "datasets/a"):
        with pytest.raises(DataError, match="lies in"):
            ingest(str(src), str(out), overwrite=True)
        with pytest.raises(DataError, match="lies in"):
            ingest(f"file://{src}", str(out), overwrite=True)
