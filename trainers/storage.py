"""A run's directory on any filesystem: local, S3, GCS; no shared disk is assumed."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from pyarrow import fs as pafs

from mimray.trainers.data.files import is_inside, join, refuse_secrets
from mimray.trainers.errors import RunConflictError, StorageError

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Of a store that is away or overloaded, in the words of Arrow's clients and of file servers.
_PASSING = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|THROTTL|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT"
    r"|curlCode|UNAVAILABLE|HTTP status code: 5\d\d|Connection (timed out|refused|reset)"
    r"|Stale file handle"
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 20.0


def _patient(
    method: Callable[Concatenate[RunDir, P], R],
) -> Callable[Concatenate[RunDir, P], R]:
    """Have a method of `RunDir`, which may be repeated, wait for a store that does not answer."""

    @functools.wraps(method)
    def patient(self: RunDir, /, *args: P.args, **kwargs: P.kwargs) -> R:
        until, pause_s = time.monotonic() + self.patience_s, _FIRST_PAUSE_S
        while True:
            try:
                return method(self, *args, **kwargs)
            except StorageError as error:
                if time.monotonic() + pause_s > until or not _PASSING.search(str(error)):
                    raise
                logger.warning("%s; trying again for %g s", error.args[0], self.patience_s)
            # Workers that lost the store together must not come back together.
            time.sleep(pause_s * random.uniform(0.5, 1))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    return patient


class RunDir:
    """A directory named by a path or a `pyarrow.fs` URI; cheap to make again in any process.

    Args:
        uri: a local path, or a URI of `file://`, `s3://` or `gs://` with the service's options
            behind a `?`.
        patience_s: seconds for which anything done here waits for a store that does not answer.
    """

    def __init__(self, uri: str, patience_s: float = 0.0) -> None:
        refuse_secrets(uri)
        self.patience_s = patience_s
        self.uri = uri.rstrip("/") if "://" in uri else str(Path(uri).expanduser().absolute())
        try:
            if "://" in self.uri:
                self.filesystem, root = pafs.FileSystem.from_uri(self.uri)
                self.root = root.rstrip("/")
            else:
                self.filesystem, self.root = pafs.LocalFileSystem(), self.uri
        except (OSError, ValueError) as error:
            raise StorageError(
                f"storage {uri}: {error}", hint="a local path, s3://bucket/… or gs://bucket/…"
            ) from None

    def __truediv__(self, name: str) -> RunDir:
        # Share the client: opening another may query the service for the bucket's region.
        below = copy(self)
        below.uri, below.root = join(self.uri, name), self.path(name)
        return below

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self.root.rpartition("/")[2])

    @property
    def local(self) -> Path | None:
        """The directory as a local path; None if it is remote."""
        return Path(self.root) if self.filesystem.type_name == "local" else None

    def path(self, name: str) -> str:
        """The path of a file below, in the filesystem's form."""
        return f"{self.root}/{name}" if name else self.root

    def holds(self, other: RunDir) -> bool:
        """True if another directory is this one or lies below it."""
        if self.local is not None and other.local is not None:
            return other.local.resolve().is_relative_to(self.local.resolve())
        same_store: bool = other.filesystem.equals(self.filesystem)
        return same_store and f"{other.root}/".startswith(f"{self.root}/")

    @_patient
    def create(self) -> None:
        """Make the directory and its parents."""
        with storage_errors(self.uri):
            self.filesystem.create_dir(self.root, recursive=True)

    @_patient
    def size(self, name: str) -> int | None:
        """The size of a file, bytes; None without such a file."""
        with storage_errors(self.uri):
            info = self.filesystem.get_file_info(self.path(name))
        return int(info.size) if info.type == pafs.FileType.File else None

    @_patient
    def exists(self, name: str = "") -> bool:
        """True if a file or directory exists."""
        with storage_errors(self.uri):
            info = self.filesystem.get_file_info(self.path(name))
        return bool(info.type != pafs.FileType.NotFound)

    @_patient
    def folders(self) -> list[str]:
        """The names of the directories directly below, sorted."""
        with storage_errors(self.uri):
            selector = pafs.FileSelector(self.root, allow_not_found=True)
            found = self.filesystem.get_file_info(selector)
        return sorted(i.base_name for i in found if i.type == pafs.FileType.Directory)

    @_patient
    def read(self, name: str) -> bytes:
        """Read a whole file."""
        with storage_errors(self.uri), self.filesystem.open_input_file(self.path(name)) as file:
            return bytes(file.read())

    @_patient
    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically: readers see the old one or the new one, never a part."""
        with storage_errors(self.uri):
            if self.local is None:
                # Object stores make an object visible only when it is complete.
                with self.filesystem.open_output_stream(self.path(name)) as stream:
                    stream.write(data)
                return
            target = self.local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                with aside.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, target)
            finally:
                aside.unlink(missing_ok=True)  # a full disk leaves a part of the file

    def append(self, name: str, data: bytes) -> None:
        """Append to a file; on an object store by writing it again."""
        if self.local is None:
            before = self.read(name) if self.exists(name) else b""
            self.write(name, before + data)
            return
        with storage_errors(self.uri), (self.local / name).open("ab") as file:
            file.write(data)

    @_patient
    def upload(self, file: Path, name: str) -> None:
        """Copy a file of this machine into the directory."""
        with storage_errors(self.uri):
            pafs.copy_files(
                str(file),
                self.path(name),
                source_filesystem=pafs.LocalFileSystem(),
                destination_filesystem=self.filesystem,
            )

    @_patient
    def download(self, folder: Path) -> None:
        """Copy everything below into a folder of this machine.

        Raises:
            StorageError: a name, of those a store allows, leads out of the folder.
        """
        with storage_errors(self.uri):
            for found in self.filesystem.get_file_info(
                pafs.FileSelector(self.root, recursive=True)
            ):
                name = found.path.removeprefix(self.root).removeprefix("/")
                if not is_inside(name):
                    raise StorageError(
                        f"{self.uri} has a file {name!r}, which leads out of it",
                        hint="remove it; mimray writes no such name",
                    )
            pafs.copy_files(
                self.root,
                str(folder),
                source_filesystem=self.filesystem,
                destination_filesystem=pafs.LocalFileSystem(),
            )

    @_patient
    def delete(self, name: str = "") -> None:
        """Remove a directory below (or this one) with all it holds, if it exists."""
        with storage_errors(self.uri):
            if self.local is not None:
                shutil.rmtree(self.path(name), ignore_errors=True)
            elif self.exists(name):
                # A store may drop an emptied folder by itself.
                with contextlib.suppress(FileNotFoundError):
                    self.filesystem.delete_dir(self.path(name))


OWNER = ".owner"


def claim(run: RunDir, launch_id: str) -> None:
    """Make a launch the owner of a run; workers of earlier launches stop at their next write."""
    run.write(OWNER, launch_id.encode())


def check_seen(run: RunDir) -> None:
    """Refuse to work on a node that has another disk under the run's path than the driver.

    Raises:
        StorageError: the file that the driver wrote is not seen from here.
    """
    if not run.exists(OWNER):
        raise StorageError(
            f"{run} is not seen from {socket.gethostname()}",
            hint="every node needs the same --storage: a shared folder, s3://… or gs://…",
        )


def check_owner(run: RunDir, launch_id: str) -> None:
    """Refuse to write for a launch that no longer owns the run.

    Workers of a killed driver run on for some seconds, and two people may start the same name; both
    must not write into one directory.

    Raises:
        RunConflictError: another launch has claimed the run since.
    """
    if launch_id and run.read(OWNER) != launch_id.encode():
        raise RunConflictError(
            f"{run} was taken over by a later launch", hint="use another --name to run both"
        )


@contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn an OSError of a filesystem or an object store into a StorageError with a cure."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"no space left in {uri}",
                hint="free some, lower checkpoint.keep, or choose another --storage; "
                "the same command then continues from the last whole checkpoint",
            ) from error
        reason = error.strerror or str(error).splitlines()[0]
        raise StorageError(
            f"{uri}: {reason}", hint="check the path, its permissions and credentials"
        ) from error
