from __future__ import annotations

import json
import logging
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mimray.trainers.config.run import parse_recipe, resolve
from mimray.trainers.engine import checkpoints
from mimray.trainers.engine.checkpoints import (
    MANIFEST,
    Checkpoint,
    Identity,
    Saver,
    damages,
    find,
    load_newest,
)
from mimray.trainers.engine.deepspeed import initialize
from mimray.trainers.engine.export import read_checkpoint
from mimray.trainers.errors import CheckpointError, StorageError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts
from tests.trainers.runs import Remote

pytestmark = pytest.mark.usefixtures("process_group")


def plan_of(zero_stage: int) -> Any:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {
                "name": "mae",
                "decoder_width": 8,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            },
            "data": {"image_size": 16},
            "optim": {"batch_size": 2, "steps": 10, "base_lr": 0.1},
            "engine": {"zero_stage": zero_stage, "precision": "fp32"},
        }
    )
    return resolve(recipe, DatasetFacts("here", 100, "f1"), world_size=1)


def engine_of(zero_stage: int = 1, seed: int = 0) -> Any:
    plan = plan_of(zero_stage)
    torch.manual_seed(seed)
    return initialize(build_method(plan.recipe), plan, "fp32")


def advance(engine: Any, step: int) -> None:
    rng = torch.Generator().manual_seed(step)
    images = torch.randn(2, 3, 16, 16, generator=rng)
    engine.backward(engine(images, torch.tensor([[True, True, True, False]] * 2)).loss)
    engine.step()


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in engine.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def identity_of(zero_stage: int = 1) -> Identity:
    return Identity(plan_of(zero_stage).hash, zero_stage, "fp32")


def save(run: RunDir, engine: Any, step: int, keep: int = 3, zero_stage: int = 1) -> None:
    identity = identity_of(zero_stage)
    checkpoints.save(run, engine, identity, step=step, samples=2 * step, keep=keep)


@pytest.fixture(scope="module")
def engine() -> Any:
    return engine_of()


@pytest.fixture
def run(tmp_path: Path, engine: Any) -> RunDir:
    """A run with checkpoints of steps 1 and 2."""
    directory = RunDir(str(tmp_path / "run"))
    for step in (1, 2):
        save(directory, engine, step)
    return directory


@pytest.mark.parametrize("zero_stage", [0, 1])
@pytest.mark.parametrize("kind", [RunDir, Remote], ids=["local", "remote"])
def test_checkpoint__training_goes_on_as_if_never_stopped(
    tmp_path: Path, zero_stage: int, kind: type[RunDir]
):
    run, first = kind(str(tmp_path / "run")), engine_of(zero_stage)
    for step in range(2):
        advance(first, step)
    save(run, first, 2, zero_stage=zero_stage)
    saved = weights(first)
    advance(first, 2)

    second = engine_of(zero_stage, seed=1)
    loaded = load_newest(run, second, identity_of(zero_stage))

    assert loaded is not None
    assert (loaded.step, loaded.samples, loaded.world_size) == (2, 4, 1)
    assert same(weights(second), saved)
    advance(second, 2)
    assert same(weights(second), weights(first))  # moments and all
    assert not same(weights(second), saved)
    if kind is RunDir:
        folder = tmp_path / "run/checkpoints" / loaded.name
        assert same(read_checkpoint(run, folder, loaded, plan_of(zero_stage)), saved)


def test_load_newest__nothing_there(tmp_path: Path, engine: Any):
    assert load_newest(RunDir(str(tmp_path / "new")), engine, identity_of()) is None


def test_save__lists_every_file(run: RunDir):
    (newest, before) = find(run)

    assert (newest.name, before.name) == ("step-00000002", "step-00000001")
    folder = Path(run.uri) / "checkpoints" / newest.name
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {*newest.files, MANIFEST}
    for name, facts in newest.files.items():
        assert facts["bytes"] == (folder / name).stat().st_size


def test_save__keeps_the_newest(tmp_path: Path, engine: Any):
    run = RunDir(str(tmp_path / "run"))

    for step in (9, 10, 11, 100):
        save(run, engine, step, keep=2)

    assert [c.step for c in find(run)] == [100, 11]
    assert (run / "checkpoints").folders() == ["step-00000011", "step-00000100"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def shards(run: RunDir, step: int) -> list[Path]:
    folder = Path(run.uri) / "checkpoints" / checkpoints.checkpoint_name(step)
    return sorted(folder.glob("state/*.pt"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip, "does not match its checksum"),
        (truncate, r"has \d+ bytes, wanted"),
        (Path.unlink, "is missing"),
    ],
)
@pytest.mark.parametrize("which", [0, -1])
def test_load_newest__passes_over_a_damaged_one(
    run: RunDir,
    engine: Any,
    caplog: pytest.LogCaptureFixture,
    damage: Any,
    reason: str,
    which: int,
):
    damage(shards(run, 2)[which])

    with caplog.at_level(logging.WARNING):
        loaded = load_newest(run, engine, identity_of())

    assert loaded is not None
    assert loaded.step == 1
    (record,) = [r for r in caplog.records if r.name == "mimray.trainers.engine.checkpoints"]
    assert record.getMessage().startswith("checkpoint step-00000002 is damaged")
    assert re.search(reason, record.getMessage())


def test_load_newest__refuses_to_start_over_when_all_are_damaged(run: RunDir, engine: Any):
    for step in (1, 2):
        flip(shards(run, step)[0])

    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints.*--fresh") as caught:
        load_newest(run, engine, identity_of())

    assert caught.value.on_every_rank


def test_damages__names_those_of_each_checkpoint_and_changes_nothing(run: RunDir):
    assert damages(run) == {"step-00000002": "", "step-00000001": ""}
    before = (run / "checkpoints/step-00000002").folders()
    flip(shards(run, 2)[0])
    (Path(run.uri) / "checkpoints/step-00000001" / MANIFEST).write_text("{")
    (Path(run.uri) / "checkpoints/step-00000003").mkdir()  # one that is being written

    found = damages(run)

    assert list(found) == ["step-00000002", "step-00000001"]
    assert "does not match its checksum" in found["step-00000002"]
    assert "cannot be read" in found["step-00000001"]
    assert (run / "checkpoints/step-00000002").folders() == before
    assert run.exists("checkpoints/step-00000003")


def test_damages__one_that_is_removed_meanwhile_is_none(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
):
    shards(run, 1)[0].unlink()
    monkeypatch.setattr(
        checkpoints.time, "sleep", lambda _: (run / "checkpoints").delete("step-00000001")
    )

    assert damages(run) == {"step-00000002": ""}


def test_find__sweeps_what_was_never_finished(run: RunDir, caplog: pytest.LogCaptureFixture):
    (Path(run.uri) / "checkpoints/step-00000002" / MANIFEST).unlink()
    (Path(run.uri) / "checkpoints/notes").mkdir()

    assert [c.step for c in find(run)] == [1]
    assert run.exists("checkpoints/step-00000002")
    assert [c.step for c in find(run, sweep=True)] == [1]

    assert (run / "checkpoints").folders() == ["notes", "step-00000001"]
    assert "never finished" in caplog.text


def test_find__takes_no_manifest_that_lists_files_outside(
    run: RunDir, caplog: pytest.LogCaptureFixture
):
    file = Path(run.uri) / "checkpoints/step-00000002" / MANIFEST
    tree = json.loads(file.read_text())
    tree["files"]["../../plan.json"] = {"bytes": 1, "sha256": ""}
    file.write_text(json.dumps(tree))

    assert [c.step for c in find(run)] == [1]
    assert "lists '../../plan.json', which leads out of it" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_load_newest__passes_over_an_unreadable_manifest(run: RunDir, engine: Any, text: str):
    (Path(run.uri) / "checkpoints/step-00000002" / MANIFEST).write_text(text)

    loaded = load_newest(run, engine, identity_of())

    assert loaded is not None
    assert loaded.step == 1


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}'])
def test_load_newest__refuses_to_start_over_where_no_manifest_can_be_read(
    run: RunDir, engine: Any, text: str
):
    manifests = [run / f"checkpoints/{checkpoint.name}" for checkpoint in find(run)]
    for folder in manifests:
        folder.write(MANIFEST, text.encode())

    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints.*--fresh"):
        load_newest(run, engine, identity_of())

    assert all(folder.read(MANIFEST) == text.encode() for folder in manifests)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Identity("another", 1, "fp32"), "plan_hash .*, wanted another"),
        (Identity(plan_of(1).hash, 0, "fp32"), "zero_stage 1, wanted 0"),
        (Identity(plan_of(1).hash, 1, "bf16"), "precision fp32, wanted bf16"),
    ],
)
def test_load_newest__refuses_what_does_not_fit(
    run: RunDir, engine: Any, other: Identity, message: str
):
    with pytest.raises(CheckpointError, match=message):
        load_newest(run, engine, other)


def test_load_newest__shards_of_another_number_of_workers_are_cut_anew(tmp_path: Path):
    run, first = RunDir(str(tmp_path / "run")), engine_of()
    advance(first, 0)
    save(run, first, 1)
    # Told that others wrote it, a single worker goes the way of a changed cluster.
    manifest = tmp_path / "run/checkpoints/step-00000001" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "world_size": 4}))

    second = engine_of(seed=1)
    loaded = load_newest(run, second, identity_of())

    assert loaded is not None
    assert loaded.world_size == 4
    assert same(weights(second), weights(first))
    for engine in (first, second):
        advance(engine, 1)
    assert same(weights(second), weights(first))  # moments and step count too


@contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No file grows beyond this; writing more fails as on a full disk, for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def newest_of(run: RunDir, engine: Any) -> Checkpoint:
    loaded = load_newest(run, engine, identity_of())
    assert loaded is not None
    return loaded


def test_save__a_failure_costs_only_the_new_one(run: RunDir, engine: Any):
    size = max(file.stat().st_size for file in shards(run, 2))

    with (
        files_of_at_most(size // 2),
        pytest.raises(StorageError, match="the same command continues|File too large"),
    ):
        save(run, engine, 3, keep=1)

    assert [c.step for c in find(run)] == [2, 1]
    assert newest_of(run, engine).step == 2
    assert (run / "checkpoints").folders() == ["step-00000001", "step-00000002"]


def test_save__the_loss_of_another_worker_is_no_fault_of_the_disk(
    run: RunDir, engine: Any, monkeypatch: pytest.MonkeyPatch
):
    # It may be tried again, which a full disk may not.
    def lose(*args: Any, **options: Any) -> None:
        raise RuntimeError("gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer")

    monkeypatch.setattr(engine, "save_checkpoint", lose)

    with pytest.raises(RuntimeError, match="reset by peer"):
        save(run, engine, 3)

    assert [c.step for c in find(run)] == [2, 1]


def test_save__a_full_disk_costs_only_the_new_one(tmp_path: Path, engine: Any):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    try:
        run = RunDir(str(disk / "run"))
        save(run, engine, 1)
        free = shutil.disk_usage(disk).free
        used = sum(f.stat().st_size for f in disk.rglob("*") if f.is_file())
        (disk / "ballast").write_bytes(bytes(free - used // 2))

        with pytest.raises(StorageError, match=r"disk full|no space left"):
            save(run, engine, 2, keep=1)

        assert newest_of(run, engine).step == 1
        (disk / "ballast").unlink()
        save(run, engine, 2, keep=1)
        assert newest_of(run, engine).step == 2
    finally:
        # Lazily: the writer that failed may still hold its file open.
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


class Slow(Remote):
    """A store that takes no upload until it may, and perhaps refuses it then."""

    may = threading.Event()
    refuses = False

    def __truediv__(self, name: str) -> Slow:
        return Slow(f"{self.uri}/{name}")

    def upload(self, file: Path, name: str) -> None:
        assert Slow.may.wait(60)
        if Slow.refuses:
            raise StorageError("no room in the bucket")
        super().upload(file, name)


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slow]:
    monkeypatch.setattr(Slow, "may", threading.Event())
    yield Slow(str(tmp_path / "run"))
    Slow.may.set()


def saver_of(run: RunDir, engine: Any) -> Saver:
    return Saver(run, engine, identity_of(), keep=1)


def test_store__training_goes_on_while_a_checkpoint_is_brought_there(slow: Slow, engine: Any):
    saver = saver_of(slow, engine)

    saver.save(step=1, samples=2)
    assert saver.busy
    saver.settle(any_busy=True)
    assert find(slow) == []  # it is not whole yet

    Slow.may.set()
    while saver.busy:
        pass
    saver.settle(any_busy=False)

    assert [c.step for c in find(slow)] == [1]
    assert load_newest(slow, engine, identity_of()) is not None


def test_store__the_next_checkpoint_waits_for_the_one_before(slow: Slow, engine: Any):
    saver = saver_of(slow, engine)
    saver.save(step=1, samples=2)
    Slow.may.set()

    saver.save(step=2, samples=4)
    assert [c.step for c in find(slow)] == [1]
    saver.finish()

    assert [c.step for c in find(slow)] == [2]  # pruned once the newer one is whole


def test_store__a_failed_upload_costs_only_the_new_one(
    slow: Slow, engine: Any, monkeypatch: pytest.MonkeyPatch
):
    saver = saver_of(slow, engine)
    Slow.may.set()
    saver.save(step=1, samples=2)
    saver.finish()
    monkeypatch.setattr(Slow, "refuses", True)

    saver.save(step=2, samples=4)

    with pytest.raises(StorageError, match="no room in the bucket"):
        saver.finish()
    assert [c.step for c in find(slow)] == [1]
    assert not saver.busy


def test_store__an_error_of_any_kind_leaves_the_checkpoint_unfinished(
    slow: Slow, engine: Any, monkeypatch: pytest.MonkeyPatch
):
    saver = saver_of(slow, engine)
    Slow.may.set()
    monkeypatch.setattr(Slow, "upload", lambda self, file, name: 1 / 0)

    saver.save(step=1, samples=2)

    with pytest.raises(ZeroDivisionError):
        saver.finish()
    assert find(slow) == []
