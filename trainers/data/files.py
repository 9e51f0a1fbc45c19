"""URIs of data: the files below them, and those of them that are pictures."""

from __future__ import annotations

import os
import posixpath
import stat
from dataclasses import dataclass

from pyarrow import ArrowInvalid
from pyarrow import fs as pafs

from mimray.trainers.data.account import Account
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.redaction import masked

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif"),
)
# Pictures by their names, in formats that Pillow does not read by itself.
UNREADABLE_SUFFIXES = (
    *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".psd", ".exr", ".hdr", ".svg", ".dcm", ".czi"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw"),
)
# What Spark, macOS, Windows and Synology put among people's files. A leading `_` alone hides
# nothing: cameras name Adobe RGB pictures `_MG_1000.JPG`.
_BOOKKEEPING = frozenset(
    (
        *("_SUCCESS", "_metadata", "_common_metadata", "_temporary", "_delta_log"),
        *("_spark_metadata", "__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db"),
        *("desktop.ini", "System Volume Information", "lost+found"),
    )
)


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
        ConfigError: when the URI holds a password.
        DataError: when the scheme is unknown or the service does not answer.
    """
    refuse_secrets(uri)
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


def refuse_secrets(uri: str) -> None:
    """Refuse a URI with a password or a secret option, since plans and logs record URIs.

    Raises:
        ConfigError: there is one in it.
    """
    if "://" in uri and masked(uri) != uri:
        raise ConfigError(
            f"{uri} holds a secret, and addresses are recorded",
            hint="give it in the environment: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "GOOGLE_APPLICATION_CREDENTIALS, PGPASSWORD",
        )


def is_inside(path: str) -> bool:
    """True if a relative path, as a file or a store names it, stays in the folder it is joined to.

    Args:
        path: the path, with slashes or backslashes between its parts.
    """
    path = posixpath.normpath(path.replace("\\", "/"))
    return not path.startswith("/") and path.partition("/")[0] != ".."


def absolute(uri: str) -> str:
    """Make a local path absolute, since Ray's workers have another working directory."""
    return uri if "://" in uri else os.path.abspath(os.path.expanduser(uri))


def unreachable(uri: str, error: OSError) -> DataError:
    """The error of a well-formed URI that cannot be read."""
    return DataError(
        f"{uri} cannot be read: {error}",
        hint="check the name of the bucket or folder, your credentials and the network",
    )


def changed(uri: str) -> DataError:
    """The error of a file that is another one than when the data was opened."""
    return DataError(
        f"{uri} has changed since the data was opened",
        hint="put back the file that was there; other pictures need a run of another --name",
    )


def is_local(filesystem: pafs.FileSystem) -> bool:
    """True if files lie on a disk of this machine, or one mounted as such."""
    return bool(filesystem.type_name == "local")


def list_files(uri: str, account: Account | None = None) -> list[FoundFile]:
    """List every file below a folder, sorted by path; for a file, that file alone.

    Hidden files and folders (names with a leading `.`, and the bookkeeping of other programs) are
    passed over, and so is a name that is not UTF-8. Links are followed, and each folder is entered
    once, under its own name if it has one.

    Args:
        uri: URI of the folder or file.
        account: takes the count of what is passed over.

    Raises:
        DataError: when there is nothing at `uri`, or it cannot be read.
    """
    account = account if account is not None else Account()
    filesystem, root = locate(uri)
    try:
        info = filesystem.get_file_info(root)
        if info.type == pafs.FileType.NotFound:
            raise DataError(
                f"{uri} does not exist", hint="check the path or the name of the bucket"
            )
        if info.type == pafs.FileType.File:
            return [FoundFile(info.base_name, info.size)]
        if is_local(filesystem):
            found = _walk(root, account)
        else:
            found = _visible(filesystem, root, account)
    except UnicodeEncodeError as error:
        raise DataError(
            f"the path {os.fsencode(uri)!r} is not UTF-8", hint="rename the folder"
        ) from error
    except OSError as error:
        raise unreachable(uri, error) from error
    return sorted(found, key=lambda file: file.path)


def _visible(filesystem: pafs.FileSystem, root: str, account: Account) -> list[FoundFile]:
    """Files of a bucket; what is hidden is counted once for each hidden folder."""
    start = len(root.rstrip("/")) + 1
    files, hidden = [], set()
    for entry in filesystem.get_file_info(pafs.FileSelector(root, recursive=True)):
        if entry.type != pafs.FileType.File:
            continue
        path = entry.path[start:]
        parts = path.split("/")
        depth = next((i for i, part in enumerate(parts) if _is_hidden(part)), None)
        if depth is None:
            files.append(FoundFile(path, entry.size))
        else:
            hidden.add("/".join(parts[: depth + 1]))
    for path in hidden:
        account.add("hidden", path.rpartition("/")[2])
    return files


def _walk(root: str, account: Account) -> list[FoundFile]:
    """Files of a local folder. Real folders are entered before links, which thus add no names."""
    files: list[FoundFile] = []
    entered = {_identity(os.stat(root))}
    folders, links = [""], list[str]()
    while folders or links:
        if not folders:
            path = links.pop()
            identity = _identity(os.stat(os.path.join(root, path)))
            if identity in entered:
                account.add("entered_before", path)
                continue
            entered.add(identity)
            folders.append(path)
            continue
        folder = folders.pop()
        for entry in _entries(root, folder, account):
            path = f"{folder}/{entry.name}" if folder else entry.name
            try:
                status = entry.stat()
            except OSError:
                account.add("dead_link", path)
                continue
            if stat.S_ISREG(status.st_mode):
                files.append(FoundFile(path, status.st_size))
            elif not stat.S_ISDIR(status.st_mode):
                account.add("special_file", path)
            elif entry.is_symlink():
                links.append(path)
            else:
                # A folder that is mounted twice is no link and yet the same.
                identity = _identity(status)
                if identity in entered:
                    account.add("entered_before", path)
                    continue
                entered.add(identity)
                folders.append(path)
        links.sort(reverse=True)
    return files


def _entries(root: str, folder: str, account: Account) -> list[os.DirEntry[str]]:
    """The visible entries of a folder by name; the rest is counted."""
    try:
        with os.scandir(os.path.join(root, folder) if folder else root) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except PermissionError:
        if not folder:
            raise
        account.add("not_permitted", folder)
        return []
    visible = []
    for entry in entries:
        if not _is_utf8(entry.name):
            place = f"{folder}/{entry.name}" if folder else entry.name
            account.add("name_not_utf8", os.fsencode(place).decode("utf-8", "backslashreplace"))
        elif _is_hidden(entry.name):
            account.add("hidden", entry.name)
        else:
            visible.append(entry)
    return visible


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_utf8(name: str) -> bool:
    return name.isascii() or not any("\udc80" <= character <= "\udcff" for character in name)


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


def is_unreadable_picture(path: str) -> bool:
    """True if a file has the suffix of a picture in a format that is not read here."""
    return path.lower().endswith(UNREADABLE_SUFFIXES)


def is_parquet(path: str) -> bool:
    """True if a file has the suffix of Parquet."""
    return split_options(path)[0].lower().endswith((".parquet", ".pq"))


def suffix(path: str) -> str:
    """The lower-case suffix of a file's name, e.g. `.jpg`; `no suffix` where it has none."""
    stem, dot, ending = path.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if dot and stem else "no suffix"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _BOOKKEEPING
