from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
from pyarrow import fs as pafs

from mimray.trainers import storage
from mimray.trainers.errors import StorageError
from mimray.trainers.storage import RunDir, storage_errors
from tests.trainers.runs import Remote


@pytest.fixture(params=[RunDir, Remote], ids=["local", "remote"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    directory: RunDir = request.param(str(tmp_path / "runs/first"))
    assert (directory.local is None) == (request.param is Remote)
    return directory


def test_run_dir__files(run: RunDir):
    assert not run.exists()
    assert run.folders() == []

    run.create()
    run.write("plan.json", b"one")
    run.write("plan.json", b"two!")
    run.append("metrics.jsonl", b"a\n")
    run.append("metrics.jsonl", b"b\n")

    assert run.exists()
    assert (run.read("plan.json"), run.size("plan.json")) == (b"two!", 4)
    assert run.read("metrics.jsonl") == b"a\nb\n"
    assert (run.exists("none"), run.size("none")) == (False, None)
    assert sorted(p.name for p in Path(run.uri).iterdir()) == ["metrics.jsonl", "plan.json"]


def test_run_dir__folders_and_deletion(run: RunDir):
    for name in ("checkpoints/b", "checkpoints/a"):
        (run / name).create()
        (run / name).write("x", b"x")
    (run / "checkpoints").write("file", b"x")

    assert (run / "checkpoints").folders() == ["a", "b"]
    assert run.size("checkpoints") is None
    (run / "checkpoints").delete("a")
    (run / "checkpoints/none").delete()
    assert (run / "checkpoints").folders() == ["b"]
    run.delete()
    assert not run.exists()


def test_run_dir__copies_to_and_from_this_machine(run: RunDir, tmp_path: Path):
    run.create()
    (tmp_path / "file").write_bytes(b"content")
    (run / "deep").create()

    run.upload(tmp_path / "file", "deep/copy")
    run.download(tmp_path / "back")

    assert (tmp_path / "back/deep/copy").read_bytes() == b"content"


def test_run_dir__names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert RunDir("runs").local == tmp_path / "runs"
    assert RunDir("~/runs").uri == "/home/somebody/runs"
    assert RunDir(f"file://{tmp_path}/").local == tmp_path
    assert str(RunDir(f"file://{tmp_path}") / "a") == f"file://{tmp_path}/a"
    assert RunDir("/runs").path("a") == "/runs/a"
    with pytest.raises(StorageError, match=r"nowhere://x.*s3://"):
        RunDir("nowhere://x")


def test_run_dir__write_is_never_seen_in_part(tmp_path: Path):
    run, texts = RunDir(str(tmp_path)), [bytes([c]) * 400_000 for c in b"ab"]
    run.write("file", texts[0])
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            for text in texts:
                run.write("file", text)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        seen = {run.read("file") for _ in range(60)}
    finally:
        stop.set()
        writer.join()

    assert seen <= set(texts)


def test_run_dir__a_failed_write_leaves_the_old_file(tmp_path: Path):
    run = RunDir(str(tmp_path / "folder"))
    run.create()
    (tmp_path / "folder/taken").mkdir()

    with pytest.raises(StorageError, match="folder: "):
        run.write("taken", b"x")

    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["taken"]


def test_run_dir__what_is_missing_is_a_storage_error(run: RunDir):
    with pytest.raises(StorageError) as caught:
        run.read("none")

    assert run.uri in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_storage_errors__a_full_disk_says_how_to_go_on(number: int):
    with (
        pytest.raises(StorageError, match=r"no space left in s3://b.*the same command"),
        storage_errors("s3://b"),
    ):
        raise OSError(number, os.strerror(number))


def test_storage_errors__other_errors_pass():
    with pytest.raises(ValueError, match="mine"), storage_errors("s3://b"):
        raise ValueError("mine")


class Away(Remote):
    """A store that does not answer for some calls."""

    def __init__(self, uri: str, patience_s: float, failures: list[OSError]) -> None:
        super().__init__(uri)
        self.patience_s, self.failures = patience_s, failures

    def __truediv__(self, name: str) -> RunDir:
        return RunDir.__truediv__(self, name)

    def exists(self, name: str = "") -> bool:
        return _exists(self, name)


@storage._patient
def _exists(run: Away, name: str) -> bool:
    with storage_errors(run.uri):
        if run.failures:
            raise run.failures.pop()
    return Path(run.uri, name).exists()


GONE = OSError(
    "When getting information for key 'x' in bucket 'y': AWS Error NETWORK_CONNECTION during "
    "HeadObject operation: curlCode: 7, Could not connect to server"
)


def test_patience__waits_for_a_store_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    run = Away(str(tmp_path), 120, [GONE, OSError("AWS Error SLOW_DOWN"), GONE])

    assert (run / "").exists()

    assert [0.5 * least <= wait <= least for wait, least in zip(waits, (1, 2, 4), strict=True)]
    assert "NETWORK_CONNECTION" in caplog.text
    assert "trying again for 120 s" in caplog.text


@pytest.mark.parametrize(
    ("patience_s", "failure"),
    [(0.0, GONE), (120.0, OSError("AWS Error ACCESS_DENIED")), (120.0, FileNotFoundError("x"))],
)
def test_patience__ends_at_once_where_waiting_is_no_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float, failure: OSError
):
    monkeypatch.setattr(storage.time, "sleep", lambda wait_s: pytest.fail("waited"))

    with pytest.raises(StorageError):
        Away(str(tmp_path), patience_s, [failure]).exists()


def test_patience__is_that_of_every_call(tmp_path: Path):
    calls = ["create", "size", "exists", "folders", "read", "write", "upload", "download", "delete"]

    assert all(hasattr(getattr(RunDir, name), "__wrapped__") for name in calls)
    assert (RunDir(str(tmp_path), 7.0) / "below").patience_s == 7.0


def test_run_dir__a_store_cannot_write_beside_the_folder(tmp_path: Path):
    store = fsspec.filesystem("memory")
    for name in ("bundle.json", "../../outside"):
        store.pipe_file(f"/bucket/bundle/{name}", b"x")
    bundle = RunDir(str(tmp_path))
    bundle.filesystem, bundle.root = pafs.PyFileSystem(pafs.FSSpecHandler(store)), "/bucket/bundle"
    into = tmp_path / "a/b/into"
    into.mkdir(parents=True)

    with pytest.raises(StorageError, match="which leads out of it"):
        bundle.download(into)

    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b", "into"]
