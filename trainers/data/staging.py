"""A dataset is whole or it is not there: written aside or uncommitted, made visible last."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs as pafs

from mimray.trainers.data.files import is_local, join, locate
from mimray.trainers.data.manifest import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS_NAME,
    UNFINISHED_NAME,
    is_run_name,
    is_shard_name,
    read_manifest,
    read_splits,
    read_unfinished,
    unfinished_json,
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
def staged(out: str, *, overwrite: bool, parts: Sequence[str] = ()) -> Iterator[Staging]:
    """Give a folder to write a dataset into; it becomes `out` only if the block succeeds.

    On a local disk the folder lies beside `out` and is renamed. An object store has no rename:
    there the shards are written in place, beside a file that calls them unfinished and names the
    folders of parts, and `dataset.json`, which the block must write last, is what makes them a
    dataset; `overwrite` removes the old one first. Files that an ingest has not written are never
    removed: where there are any, `out` is refused.

    Args:
        out: URI of the dataset to make.
        overwrite: True allows a complete dataset there to be replaced.
        parts: names of the parts in folders of their own.

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
                # Hours may have passed.
                _refuse_if_taken(filesystem, path, out, overwrite)
        else:
            with _in_place(filesystem, path, parts) as staging:
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
    whole = read_manifest(filesystem, path) is not None or bool(read_splits(filesystem, path))
    if whole and not overwrite:
        raise DataError(
            f"{out} holds a dataset already", hint="name another folder, or pass --overwrite"
        )
    if foreign := _contents(filesystem, path).foreign:
        raise DataError(
            f"{out} is not empty: it holds {foreign[0]}, which no ingest into it has written",
            hint="move it away, or name another folder"
            if whole
            else "name a folder that does not exist yet",
        )


@dataclass(frozen=True)
class _Contents:
    """Files of a dataset, whole or unfinished, and what lies beside them.

    Attributes:
        parts: names of the folders that the dataset's own files name.
        ours: paths of the files that an ingest wrote, in those and in the folder itself.
        foreign: paths of all other files and folders.
    """

    parts: tuple[str, ...]
    ours: tuple[str, ...]
    foreign: tuple[str, ...]


def _contents(filesystem: pafs.FileSystem, folder: str) -> _Contents:
    """Part what an ingest wrote from the rest.

    A name alone makes no file ours: a folder of datasets holds such names, too. So its folder must
    have a manifest, or be marked as unfinished.
    """
    unfinished = read_unfinished(filesystem, folder)
    parts = tuple(dict.fromkeys((*read_splits(filesystem, folder), *(unfinished or ()))))
    marked = unfinished is not None or bool(parts)
    ours, foreign = list[str](), list[str]()
    for name in ("", *parts):
        place = join(folder, name) if name else folder
        is_written = marked or read_manifest(filesystem, place) is not None
        selector = pafs.FileSelector(place, allow_not_found=True)
        for entry in filesystem.get_file_info(selector):
            path = join(name, entry.base_name) if name else entry.base_name
            if entry.type != pafs.FileType.File:
                if name or entry.base_name not in parts:
                    foreign.append(path)
            elif is_written and _is_named_as_ours(entry.base_name):
                ours.append(path)
            else:
                foreign.append(path)
    return _Contents(parts, tuple(ours), tuple(sorted(foreign)))


def _is_named_as_ours(name: str) -> bool:
    written = (MANIFEST_NAME, REJECTED_NAME, SPLITS_NAME, UNFINISHED_NAME)
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
def _in_place(filesystem: pafs.FileSystem, out: str, parts: Sequence[str]) -> Iterator[Staging]:
    filesystem.create_dir(out, recursive=True)
    staging = Staging(filesystem, out, out)
    # Of the old dataset as well: its files must be known for ours while they are removed.
    parts = tuple(dict.fromkeys((*_contents(filesystem, out).parts, *parts)))
    staging.write(UNFINISHED_NAME, unfinished_json(parts))
    _clear(filesystem, out)
    try:
        yield staging
    except BaseException:
        _clear(filesystem, out)
        filesystem.delete_file(join(out, UNFINISHED_NAME))
        raise
    filesystem.delete_file(join(out, UNFINISHED_NAME))


def _clear(filesystem: pafs.FileSystem, out: str) -> None:
    """Remove the files of a dataset but the one that calls it unfinished, and emptied folders."""
    found = _contents(filesystem, out)
    # The manifests first: without them the rest is no dataset any more.
    rank = {SPLITS_NAME: 0, MANIFEST_NAME: 1}
    for path in sorted(found.ours, key=lambda path: (rank.get(path.rpartition("/")[2], 2), path)):
        if path != UNFINISHED_NAME:
            filesystem.delete_file(join(out, path))
    for name in found.parts:
        selector = pafs.FileSelector(join(out, name), allow_not_found=True)
        exists = filesystem.get_file_info(join(out, name)).type == pafs.FileType.Directory
        if exists and not filesystem.get_file_info(selector):
            filesystem.delete_dir(join(out, name))
