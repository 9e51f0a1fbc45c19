"""A dataset is whole or it is not there: written aside or uncommitted, made visible last."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from mimray.trainers.data.files import is_local, join, locate
from mimray.trainers.data.manifest import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS_NAME,
    is_run_name,
    is_shard_name,
    read_manifest,
    read_splits,
)
from mimray.trainers.errors import DataError, StorageError


@dataclass(frozen=True)
class Staging:
    """Place of a dataset that is being written.

    Attributes:
        filesystem: filesystem of the destination.
        folder: the folder to write into, on that filesystem.
        out: the dataset's final folder, on that filesystem.
    """

    filesystem: pafs.FileSystem
    folder: str
    out: str

    def part(self, name: str) -> Staging:
        """The place of a part in a folder of its own, which is made; itself without a name."""
        if not name:
            return self
        self.filesystem.create_dir(join(self.folder, name))
        return Staging(self.filesystem, join(self.folder, name), join(self.out, name))

    def write(self, name: str, text: str) -> None:
        """Write a small file."""
        with self.filesystem.open_output_stream(join(self.folder, name)) as file:
            file.write(text.encode())


@contextlib.contextmanager
def staged(out: str, *, overwrite: bool) -> Iterator[Staging]:
    """Give a folder to write a dataset into; it becomes `out` only if the block succeeds.

    On a local disk the folder lies beside `out` and is renamed. An object store has no rename:
    there the shards are written in place, and `dataset.json`, which the block must write last,
    is what makes them a dataset; `overwrite` removes the old one first.

    Args:
        out: URI of the dataset to make.
        overwrite: True allows a complete dataset there to be replaced.

    Raises:
        DataError: when `out` is taken.
        StorageError: when it cannot be written.
    """
    filesystem, path = locate(out)
    try:
        _refuse_if_taken(filesystem, path, out, overwrite)
        if is_local(filesystem):
            with _beside(filesystem, Path(path)) as staging:
                yield staging
        else:
            with _in_place(filesystem, path) as staging:
                yield staging
    except OSError as error:
        raise StorageError(
            f"{out} cannot be written: {error}", hint="check the space left and the permissions"
        ) from error


def _refuse_if_taken(filesystem: pafs.FileSystem, path: str, out: str, overwrite: bool) -> None:
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        return
    if info.type == pafs.FileType.File:
        raise DataError(f"{out} is a file", hint="name a folder that does not exist yet")
    if read_manifest(filesystem, path) is not None or read_splits(filesystem, path):
        if overwrite:
            return
        raise DataError(
            f"{out} holds a dataset already", hint="name another folder, or pass --overwrite"
        )
    if foreign := [path for path in _contents(filesystem, path) if not _is_ours(path)]:
        raise DataError(
            f"{out} is not empty: it holds {foreign[0]}",
            hint="name a folder that does not exist yet",
        )


def _contents(filesystem: pafs.FileSystem, folder: str) -> list[str]:
    """Paths of the files of a folder and of the folders in it, where splits lie."""
    found = []
    for entry in filesystem.get_file_info(pafs.FileSelector(folder)):
        if entry.type == pafs.FileType.File:
            found.append(entry.base_name)
            continue
        inside = filesystem.get_file_info(pafs.FileSelector(entry.path))
        found += [join(entry.base_name, each.base_name) for each in inside] or [entry.base_name]
    return found


def _is_ours(path: str) -> bool:
    name = path.rpartition("/")[2]
    written = (MANIFEST_NAME, REJECTED_NAME, SPLITS_NAME)
    return is_shard_name(name) or is_run_name(name) or name in written


@contextlib.contextmanager
def _beside(filesystem: pafs.FileSystem, out: Path) -> Iterator[Staging]:
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    part = out.with_name(f"{out.name}.partial-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield Staging(filesystem, str(part), str(out))
        if out.exists():
            old = out.with_name(f"{part.name}-old")
            out.rename(old)
            part.rename(out)
            shutil.rmtree(old)
        else:
            part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove what an ingest into `out` left here when its process was killed."""
    mine = re.compile(rf"{re.escape(f'{out.name}.partial-{socket.gethostname()}-')}(\d+)")
    for entry in out.parent.iterdir():
        match = mine.fullmatch(entry.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(entry)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _in_place(filesystem: pafs.FileSystem, out: str) -> Iterator[Staging]:
    filesystem.create_dir(out, recursive=True)
    _clear(filesystem, out)
    try:
        yield Staging(filesystem, out, out)
    except BaseException:
        _clear(filesystem, out)
        raise


def _clear(filesystem: pafs.FileSystem, out: str) -> None:
    ours = filter(_is_ours, _contents(filesystem, out))
    # The manifests first: without them the rest is no dataset any more.
    rank = {SPLITS_NAME: 0, MANIFEST_NAME: 1}
    for path in sorted(ours, key=lambda path: (rank.get(path.rpartition("/")[2], 2), path)):
        filesystem.delete_file(join(out, path))
