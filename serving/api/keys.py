"""API keys and their quotas: named keys, kept as hashes, read again when their file changes."""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, PositiveInt, ValidationError

from mimray.serving.wire.errors import QuotaExceededError, UnauthorizedError
from mimray.trainers.config.base import Config
from mimray.trainers.errors import ServingError

logger = logging.getLogger(__name__)

FILE_VARIABLE = "MIMRAY_KEYS"
ENVIRONMENT_NAME = "environment"
"""The name in logs of the key from the environment."""

_PREFIX = "mim_"
_SECRET_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# A look at the file costs some microseconds, too many for every request.
_LOOK_S = 1.0


class Key(Config):
    """A key as it is kept.

    Attributes:
        name: the holder's name, for logs.
        sha256: SHA-256 of the key.
        created: time it was made, RFC 3339.
        pictures_per_minute: most pictures a minute; None for no limit.
    """

    name: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    created: str = ""
    pictures_per_minute: PositiveInt | None = None


class _File(Config):
    keys: tuple[Key, ...] = ()


def hash_key(key: str) -> str:
    """The SHA-256 that is kept of a key.

    A key is 256 random bits, so a slow hash would add nothing but time to every request.
    """
    return hashlib.sha256(key.encode()).hexdigest()


def default_file() -> Path:
    """The file of keys: `MIMRAY_KEYS`, or one in the user's configuration directory."""
    if os.environ.get(FILE_VARIABLE):
        return Path(os.environ[FILE_VARIABLE])
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "mimray" / "keys.json"


def read_keys(file: Path) -> tuple[Key, ...]:
    """Read a file of keys; without a file there are none.

    Raises:
        ServingError: the file is damaged, cannot be read, or can be written by others.
    """
    try:
        status = file.stat()
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"{file} cannot be read: {error}") from error
    if status.st_mode & 0o022:
        raise ServingError(f"{file} can be written by others", hint=f"chmod 600 {file}")
    try:
        return _File.model_validate_json(text).keys
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ServingError(f"{file} is damaged: {where}: {first['msg']}") from None


def add_key(file: Path, name: str, *, pictures_per_minute: int | None = None) -> str:
    """Make a key; only its hash is kept.

    Args:
        file: the file of keys.
        name: the holder's name.
        pictures_per_minute: most pictures a minute; None for no limit.

    Returns:
        The key.

    Raises:
        ServingError: the name is taken or not allowed, or the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"{name!r} cannot be a key's name", hint="use letters, digits, `.`, `_` and `-`"
        )
    key = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    with _changing(file) as keys:
        if any(known.name == name for known in keys):
            raise ServingError(
                f"there is a key named {name!r} in {file}", hint="revoke it first, or name another"
            )
        created = datetime.now(UTC).isoformat(timespec="seconds")
        keys.append(
            Key(
                name=name,
                sha256=hash_key(key),
                created=created,
                pictures_per_minute=pictures_per_minute,
            )
        )
    return key


def revoke_key(file: Path, name: str) -> None:
    """Remove a key; servers notice within a second.

    Raises:
        ServingError: there is none of that name, or the file cannot be written.
    """
    with _changing(file) as keys:
        kept = [key for key in keys if key.name != name]
        if len(kept) == len(keys):
            known = ", ".join(key.name for key in keys) or "none"
            raise ServingError(f"there is no key named {name!r} in {file}", hint=f"keys: {known}")
        keys[:] = kept


@contextmanager
def _changing(file: Path) -> Iterator[list[Key]]:
    """The keys of a file, to be changed; one change at a time, and the file is written whole."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_name(f".{file.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            keys = list(read_keys(file))
            yield keys
            tree = _File(keys=tuple(keys)).model_dump(mode="json")
            descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}-")
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(tree, stream, indent=2)
                stream.write("\n")
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(aside, file)
    except OSError as error:
        raise ServingError(f"{file} cannot be written: {error.strerror}") from error


class KeyRing:
    """The known keys.

    Args:
        file: the file of keys; None for none.
        hashes: SHA-256 of further keys, such as that of the environment.
        clock: gives seconds that only grow.

    Raises:
        ServingError: the file is absent or damaged.
    """

    def __init__(
        self,
        file: Path | None,
        hashes: Sequence[str] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._fixed = tuple(Key(name=ENVIRONMENT_NAME, sha256=sha256) for sha256 in hashes)
        self._clock = clock
        self._stamp = _stamp(file)
        self._looked = clock()
        self._trouble = ""
        if file is not None and self._stamp is None:
            raise ServingError(
                f"there are no keys in {file}", hint=f"`mimray keys add NAME --file {file}`"
            )
        self._keys = self._fixed + (read_keys(file) if file is not None else ())

    def admit(self, presented: str | None) -> Key:
        """Check a key that a client sent.

        Raises:
            UnauthorizedError: there is none, or it is not known.
        """
        self._look()
        if presented:
            digest = hash_key(presented)
            # Every key is compared, in constant time each.
            found = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
            if found:
                return found[0]
        raise UnauthorizedError(
            "this endpoint needs a valid API key",
            hint="send it as `Authorization: Bearer KEY` or `X-API-Key: KEY`",
        )

    def _look(self) -> None:
        now = self._clock()
        if self._file is None or now - self._looked < _LOOK_S:
            return
        self._looked = now
        stamp = _stamp(self._file)
        if stamp == self._stamp:
            return
        try:
            self._keys = self._fixed + read_keys(self._file)
        except ServingError as error:
            # The next look tries again, since a revoked key must not stay; logged once.
            if str(error) != self._trouble:
                logger.error("the keys stay as they were: %s", error)
            self._trouble = str(error)
            return
        if stamp is None:
            logger.error("%s is gone, and its keys with it", self._file)
        self._stamp, self._trouble = stamp, ""


def _stamp(file: Path | None) -> tuple[int, int, int, int] | None:
    if file is None:
        return None
    try:
        status = file.stat()
    except OSError:
        return None
    # The time of change, too: it alone shows a change of permissions.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


# Pictures are counted in parts so small that a quota of one a minute brings one part a nanosecond:
# whole numbers, which are exact.
_PARTS = 60 * 10**9


@dataclass
class _Bucket:
    level: int
    at_ns: int


class Quota:
    """Limits keys to their pictures a minute, in each process separately.

    A request is charged after it was answered, since its number of pictures is known only then; a
    key that has used up its pictures is refused until time has brought some back. A minute's
    pictures may come at once.

    Args:
        clock_ns: gives nanoseconds that only grow.
    """

    def __init__(self, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, key: Key) -> None:
        """Admit a request.

        Raises:
            QuotaExceededError: the key's pictures are used up.
        """
        rate = key.pictures_per_minute
        if rate is None:
            return
        missing = _PARTS - self._filled(key, rate).level
        if missing > 0:
            raise QuotaExceededError(
                f"key {key.name!r} may ask for {rate} pictures a minute",
                retry_after_s=-(-missing // (rate * 10**9)),
            )

    def charge(self, key: Key, pictures: int) -> None:
        """Charge the pictures of a request."""
        if key.pictures_per_minute is not None:
            self._filled(key, key.pictures_per_minute).level -= pictures * _PARTS

    def _filled(self, key: Key, rate: int) -> _Bucket:
        now_ns = self._clock_ns()
        bucket = self._buckets.setdefault(key.sha256, _Bucket(rate * _PARTS, now_ns))
        bucket.level = min(rate * _PARTS, bucket.level + (now_ns - bucket.at_ns) * rate)
        bucket.at_ns = now_ns
        return bucket
