"""URIs of data: the files below them, and those of them that are pictures."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pyarrow import ArrowInvalid
from pyarrow import fs as pafs

from mimray.trainers.errors import DataError

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test"))


@dataclass(frozen=True)
class FoundFile:
    """A file below a root.

    Attributes:
        path: relative to the root, with `/`.
        num_bytes: size of the file.
    """

    path: str
    num_bytes: int


def locate(uri: str) -> tuple[pafs.FileSystem, str]:
    """Find the filesystem and the path inside it that a URI or a local path names.

    Raises:
        DataError: when the scheme is unknown or the service does not answer.
    """
    if "://" not in uri:
        return pafs.LocalFileSystem(), absolute(uri)
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (ArrowInvalid, ValueError, ImportError) as error:
        raise DataError(
            f"{uri}: {error}", hint="use a local path, file://, s3:// or gs://"
        ) from error
    except OSError as error:
        raise unreachable(uri, error) from error
    return filesystem, path.rstrip("/") or "/"


def absolute(uri: str) -> str:
    """Make a local path absolute, since Ray's workers have another working directory."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def unreachable(uri: str, error: OSError) -> DataError:
    """The error of a well-formed URI that cannot be read."""
    return DataError(
        f"{uri} cannot be read: {error}",
        hint="check the name of the bucket or folder, your credentials and the network",
    )


def is_local(filesystem: pafs.FileSystem) -> bool:
    """True if files lie on a disk of this machine, or one mounted as such."""
    return bool(filesystem.type_name == "local")


def list_files(uri: str) -> list[FoundFile]:
    """List every file below a folder, sorted by path; for a file, that file alone.

    Hidden files and folders (names with a leading `.` or `_`) are passed over: they are
    the bookkeeping of other programs.

    Raises:
        DataError: when there is nothing at `uri`, or it cannot be read.
    """
    filesystem, root = locate(uri)
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.File:
            return [FoundFile(info.base_name, info.size)]
        found = (
            filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
            if info.type == pafs.FileType.Directory
            else None
        )
    except OSError as error:
        raise unreachable(uri, error) from error
    if found is None:
        raise DataError(f"{uri} does not exist", hint="check the path or the name of the bucket")
    start = len(root.rstrip("/")) + 1
    files = [FoundFile(f.path[start:], f.size) for f in found if f.type == pafs.FileType.File]
    return sorted((f for f in files if not _is_hidden(f.path)), key=lambda f: f.path)


def is_file(uri: str) -> bool:
    """True if `uri` is one file, rather than a folder or nothing."""
    filesystem, path = locate(uri)
    try:
        return bool(filesystem.get_file_info(path).type == pafs.FileType.File)
    except OSError as error:
        raise unreachable(uri, error) from error


def read_bytes(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Read a whole file."""
    with filesystem.open_input_file(path) as file:
        return bytes(file.read())


def join(base: str, name: str) -> str:
    """Append a relative name to a URI or path; a URI's options stay at its end."""
    place, options = split_options(base)
    return f"{place.rstrip('/')}/{name}{options}"


def parent(uri: str) -> str:
    """The folder that a file or folder lies in."""
    place, options = split_options(uri)
    above = place.rstrip("/").rpartition("/")[0]
    return f"{above or ('/' if place.startswith('/') else '.')}{options}"


def split_options(uri: str) -> tuple[str, str]:
    """Part a URI from its `?options`, which say how the service is reached, not what is meant.

    Source: https://arrow.apache.org/docs/cpp/api/filesystem.html (S3Options, GcsOptions)
    """
    if "://" not in uri:
        return uri, ""
    place, question, options = uri.partition("?")
    return place, question + options


def is_picture(path: str) -> bool:
    """True if a file has the suffix of a picture."""
    return split_options(path)[0].lower().endswith(PICTURE_SUFFIXES)


def is_parquet(path: str) -> bool:
    """True if a file has the suffix of Parquet."""
    return split_options(path)[0].lower().endswith((".parquet", ".pq"))


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))
