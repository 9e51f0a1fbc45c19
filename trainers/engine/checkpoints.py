"""Atomic checkpoints: saving, verifying, loading and pruning.

Ranks write their files into `checkpoints/step-NNNNNNNN/`; when all are there, rank 0 writes
`manifest.json` with every file's size and SHA-256, atomically and last. A directory without a
manifest is no checkpoint and is removed. Before loading, the files are verified against the
manifest; a damaged checkpoint is skipped with a warning, and the one before it is tried. Where all
are damaged the run is not started over: that takes `--fresh`.

A checkpoint fits any number of workers: ZeRO's shards are cut anew for another number.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mimray.trainers.data.files import is_inside
from mimray.trainers.engine import reshard
from mimray.trainers.engine.deepspeed import Engine
from mimray.trainers.errors import CheckpointError, MimrayError, StorageError
from mimray.trainers.storage import RunDir, check_owner, storage_errors

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 2
# In format 1 the precision bf16 meant weights in bf16; it now means fp32 weights under autocast.
_PRECISIONS_OF_FORMAT = {1: {"bf16": "bf16_weights"}, 2: {}}
_TAG = "state"
_PRUNED_WITHIN_S = 1.0
# Torch's zip writer hides the errno.
_OF_TORCHS_WRITER = re.compile(r"PytorchStreamWriter|inline_container|iostream")


@dataclass(frozen=True)
class Identity:
    """The properties that a checkpoint must share with the run that loads it.

    Attributes:
        plan_hash: digest of the plan.
        zero_stage: ZeRO stage, 0 to 3; the layout of the files depends on it.
        precision: the run's precision, a result of `choose_precision`.
        earlier: digests of the plan at the lengths that the run had before.
    """

    plan_hash: str
    zero_stage: int
    precision: str
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its manifest describes it.

    Attributes:
        name: name of its directory.
        step: updates made when it was saved.
        samples: position in the data, pictures.
        world_size: number of ranks that wrote it.
        zero_stage: ZeRO stage, 0 to 3.
        precision: the precision of the run that wrote it.
        plan_hash: digest of its plan.
        files: size in bytes and SHA-256 of each file, by path within the directory.
    """

    name: str
    step: int
    samples: int
    world_size: int
    zero_stage: int
    precision: str
    plan_hash: str
    files: dict[str, dict[str, Any]]


def checkpoint_name(step: int) -> str:
    """Name of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


def save(
    run: RunDir,
    engine: Engine,
    identity: Identity,
    *,
    step: int,
    samples: int,
    keep: int,
    launch_id: str = "",
) -> None:
    """Write a checkpoint, wait until it is whole, and prune old ones; collective.

    Arguments and errors are those of `Saver`.
    """
    saver = Saver(run, engine, identity, keep=keep, launch_id=launch_id)
    saver.save(step=step, samples=samples)
    saver.finish()


@dataclass
class _Upload:
    """A rank's share of a checkpoint on its way to a store, from a scratch folder."""

    folder: RunDir
    manifest: dict[str, Any]
    source: Path
    written: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: Exception | None = None

    def run(self) -> None:
        try:
            with storage_errors(self.folder.uri):
                for name in _files(self.source):
                    self.folder.upload(self.source / name, name)
                    self.written[name] = _facts(self.source / name)
        except Exception as error:  # raised by `finish`, in the training's own thread
            self.error = error
        finally:
            shutil.rmtree(self.source, ignore_errors=True)


class Saver:
    """Writes the checkpoints of a run: to a local disk at once, to a store in the background.

    In a store a checkpoint is whole, and older ones are pruned, once all ranks have brought their
    files there: by `settle`, when no rank is at it any more, or by `finish`, which waits for it.

    Args:
        run: the run's directory.
        engine: the DeepSpeed engine.
        identity: the plan, ZeRO stage and precision of the run.
        keep: number of checkpoints kept, the newest included.
        launch_id: identifier of the launch that writes; see `storage.check_owner`.

    Raises:
        RunConflictError: a later launch has taken the run over.
        StorageError: this rank could not write. The others may be waiting for it inside
            DeepSpeed, so the whole group must be ended. Earlier checkpoints are untouched.
    """

    def __init__(
        self, run: RunDir, engine: Engine, identity: Identity, *, keep: int, launch_id: str = ""
    ) -> None:
        self._run, self._engine, self._identity = run, engine, identity
        self._keep, self._launch_id = keep, launch_id
        self._upload: _Upload | None = None
        self._thread = threading.Thread()

    @property
    def busy(self) -> bool:
        """True while this rank brings files to a store."""
        return self._upload is not None and self._thread.is_alive()

    def save(self, *, step: int, samples: int) -> None:
        """Write a checkpoint, after the one before it is whole; collective.

        Args:
            step: updates made so far.
            samples: position in the data, pictures.
        """
        self.finish()
        rank = dist.get_rank()
        folder = self._run / f"checkpoints/{checkpoint_name(step)}"

        def begin() -> None:
            if rank == 0:
                check_owner(self._run, self._launch_id)
                folder.delete()  # a crash may have left a part of it
                folder.create()

        together(begin)
        manifest = {
            "format": FORMAT,
            "step": step,
            "samples": samples,
            "world_size": dist.get_world_size(),
            "plan_hash": self._identity.plan_hash,
            "zero_stage": self._identity.zero_stage,
            "precision": self._identity.precision,
        }
        if folder.local is not None:
            self._write(folder.local)
            with storage_errors(folder.uri):
                mine = [name for name in _files(folder.local) if _is_mine(name, rank)]
                written = {name: _facts(folder.local / name) for name in mine}
            self._commit(folder, manifest, written)
            return
        with storage_errors(tempfile.gettempdir()):
            scratch = Path(tempfile.mkdtemp(prefix="mimray-"))
        try:
            self._write(scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        self._upload = _Upload(folder, manifest, scratch)
        self._thread = threading.Thread(target=self._upload.run, name="upload", daemon=True)
        self._thread.start()

    def settle(self, *, any_busy: bool) -> None:
        """Make a checkpoint whole once no rank is at it; collective.

        Args:
            any_busy: True if `busy` was true on any rank, the same on all.
        """
        if not any_busy:
            self.finish()

    def finish(self) -> None:
        """Wait until the newest checkpoint is whole; collective."""
        upload, self._upload = self._upload, None
        if upload is None:
            return
        self._thread.join()

        def check() -> None:
            if upload.error is not None:
                raise upload.error

        together(check)
        self._commit(upload.folder, upload.manifest, upload.written)

    def _write(self, target: Path) -> None:
        with storage_errors(str(target)):
            (target / _TAG).mkdir(parents=True, exist_ok=True)
            try:
                self._engine.save_checkpoint(str(target), tag=_TAG, save_latest=False)
            except RuntimeError as error:
                if not _OF_TORCHS_WRITER.search(str(error)):
                    raise  # such as the loss of another worker
                raise StorageError(
                    f"{target}: {str(error).splitlines()[0]}",
                    hint="is the disk full? the same command continues "
                    "from the last whole checkpoint",
                ) from error

    def _commit(
        self, folder: RunDir, manifest: dict[str, Any], written: dict[str, dict[str, Any]]
    ) -> None:
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, written)

        def commit() -> None:
            if dist.get_rank():
                return
            files = {name: facts for share in shares for name, facts in share.items()}
            folder.write(MANIFEST, json.dumps({**manifest, "files": files}, indent=1).encode())
            _prune(self._run, self._keep)

        together(commit)


def find(run: RunDir, *, sweep: bool = False) -> list[Checkpoint]:
    """Find the checkpoints of a run that have a readable manifest, newest first.

    Args:
        run: the run's directory.
        sweep: True to remove directories without a manifest, which interrupted saves leave.
    """
    return _found(run, sweep=sweep)[0]


def _found(run: RunDir, *, sweep: bool) -> tuple[list[Checkpoint], list[CheckpointError]]:
    """The checkpoints of a run, newest first, and the errors of the manifests not read."""
    root = run / "checkpoints"
    found, unreadable = [], []
    for name in root.folders():
        if not name.startswith("step-"):
            continue
        folder = root / name
        if not folder.exists(MANIFEST):
            if sweep:
                logger.warning("%s was never finished; removed", folder)
                folder.delete()
            continue
        try:
            found.append(_read_manifest(folder, name))
        except CheckpointError as error:
            logger.warning("%s", error)
            unreadable.append(error)
    return sorted(found, key=lambda c: c.step, reverse=True), unreadable


def steps_made(run: RunDir) -> int:
    """Updates made by a run up to its newest checkpoint; 0 without one."""
    return max((checkpoint.step for checkpoint in find(run)), default=0)


def damages(run: RunDir) -> dict[str, str]:
    """The damage of each checkpoint of a run, newest first; empty for one that is whole.

    All files are read. Nothing is changed, and the run may go on meanwhile.

    Args:
        run: the run's directory.
    """
    root, found = run / "checkpoints", dict[str, str]()
    for name in reversed(root.folders()):
        folder = root / name
        if not name.startswith("step-") or not folder.exists(MANIFEST):
            continue
        try:
            damage = _damage(folder, _read_manifest(folder, name)) or ""
        except (CheckpointError, StorageError) as error:
            damage = str(error.args[0])
        if damage:
            time.sleep(_PRUNED_WITHIN_S)  # a training that goes on may be at removing it
        if folder.exists(MANIFEST):
            found[name] = damage
    return found


def load_newest(run: RunDir, engine: Engine, identity: Identity) -> Checkpoint | None:
    """Load the newest undamaged checkpoint, written by any number of workers; collective.

    Rank 0 verifies and all ranks load the one it chooses.

    Args:
        run: the run's directory.
        engine: the DeepSpeed engine, which gets the state.
        identity: the plan, ZeRO stage and precision of the run.

    Returns:
        The loaded checkpoint, or None if the run has none yet.

    Raises:
        CheckpointError: there are checkpoints and none can be loaded, or the newest that can be
            has another plan, ZeRO stage or precision.
    """
    choice: list[Any] = [None]

    def choose() -> None:
        if dist.get_rank() == 0:
            choice[0] = newest_whole(run, sweep=True)

    together(choose)
    dist.broadcast_object_list(choice, src=0)
    checkpoint: Checkpoint | None = choice[0]
    if checkpoint is None:
        return None
    _check_fits(checkpoint, identity)
    folder = run / f"checkpoints/{checkpoint.name}"
    with ExitStack() as stack:
        source = folder.local or stack.enter_context(_once_a_node(folder.download))
        # Without ZeRO nothing is sharded, and the file fits as it is.
        if identity.zero_stage and checkpoint.world_size != dist.get_world_size():
            logger.info(
                "%s was written by %d workers; cut anew", checkpoint.name, checkpoint.world_size
            )
            whole = stack.enter_context(
                _once_a_node(lambda scratch: reshard.convert(source / _TAG, scratch / _TAG))
            )
            reshard.load(engine, whole, _TAG)
        else:
            engine.load_checkpoint(str(source), tag=_TAG)
    return checkpoint


@contextmanager
def _once_a_node(fill: Callable[[Path], None]) -> Iterator[Path]:
    """A scratch directory that one rank of each node fills and all of them read; collective."""
    node = os.environ.get("NODE_RANK", "0")  # set by Ray; without Ray there is one node
    nodes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, node)
    first = nodes.index(node)
    with ExitStack() as stack:
        mine: list[Path] = []

        def prepare() -> None:
            if dist.get_rank() == first:
                with storage_errors(tempfile.gettempdir()):
                    scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="mimray-"))
                mine.append(Path(scratch))
                fill(mine[0])

        together(prepare)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        yield everyone[first][0]
        dist.barrier()  # every rank has read it before it is removed


def together(action: Callable[[], None]) -> None:
    """Run an action on every rank; if it fails on any, every rank raises that error.

    Without this, one rank's full disk would leave the others waiting in a collective.
    """
    error: MimrayError | None = None
    try:
        action()
    except MimrayError as caught:
        error = caught
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        first.on_every_rank = True
        raise first


def newest_whole(run: RunDir, *, sweep: bool = False) -> Checkpoint | None:
    """The newest checkpoint that matches its manifest; None if the run has no checkpoint.

    Args:
        run: the run's directory.
        sweep: True to remove directories that interrupted saves left.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged or of another version.
    """
    found, unreadable = _found(run, sweep=sweep)
    for checkpoint in found:
        damage = _damage(run / f"checkpoints/{checkpoint.name}", checkpoint)
        if damage is None:
            return checkpoint
        logger.warning(
            "checkpoint %s is damaged (%s); trying the one before", checkpoint.name, damage
        )
    count = len(found) + len(unreadable)
    if count:
        reason = f": {unreadable[-1].args[0]}" if unreadable else ""
        raise CheckpointError(
            f"none of the {count} checkpoints of {run} can be loaded{reason}",
            hint="restore one from a backup, continue with the version of mimray that wrote them, "
            "or start over with --fresh",
        )
    return None


def _damage(folder: RunDir, checkpoint: Checkpoint) -> str | None:
    for name, facts in checkpoint.files.items():
        size = folder.size(name)
        if size is None:
            return f"{name} is missing"
        if size != facts["bytes"]:
            return f"{name} has {size} bytes, wanted {facts['bytes']}"
        digest = hashlib.sha256()
        with (
            storage_errors(folder.uri),
            folder.filesystem.open_input_stream(folder.path(name)) as stream,
        ):
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        if digest.hexdigest() != facts["sha256"]:
            return f"{name} does not match its checksum"
    return None


def _check_fits(checkpoint: Checkpoint, identity: Identity) -> None:
    theirs, ours = asdict(checkpoint), asdict(identity)
    earlier = ours.pop("earlier")
    different = [
        f"{key} {theirs[key]}, wanted {ours[key]}"
        for key in ours
        if theirs[key] != ours[key] and not (key == "plan_hash" and theirs[key] in earlier)
    ]
    if different:
        raise CheckpointError(
            f"checkpoint {checkpoint.name} does not fit the run: {'; '.join(different)}",
            hint="start over with --fresh or choose another --name",
        )


def _read_manifest(folder: RunDir, name: str) -> Checkpoint:
    try:
        tree = json.loads(folder.read(MANIFEST))
        renamed = _PRECISIONS_OF_FORMAT.get(tree.pop("format"))
        if renamed is None:
            raise CheckpointError(f"{folder} was written by another version")
        tree["precision"] = renamed.get(tree["precision"], tree["precision"])
        checkpoint = Checkpoint(name=name, **tree)
        outside = [file for file in checkpoint.files if not is_inside(file)]
        if outside:
            raise CheckpointError(f"{folder} lists {outside[0]!r}, which leads out of it")
        return checkpoint
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/{MANIFEST} cannot be read: {error}") from None


def _prune(run: RunDir, keep: int) -> None:
    for checkpoint in find(run)[keep:]:
        (run / f"checkpoints/{checkpoint.name}").delete()


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _is_mine(name: str, rank: int) -> bool:
    """True if a rank lists the file: on a shared disk its own shards, rank 0 all else."""
    marker = "zero_pp_rank_"
    if marker in name:
        return int(name.split(marker)[1].split("_")[0]) == rank
    return rank == 0


def _facts(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
        os.fsync(stream.fileno())  # a manifest must not outlive the files it lists
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
