"""Hindrances to this process on this machine, and the environment variables that mend them."""

from __future__ import annotations

import functools
import os
import pwd
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mimray.trainers.environment.network import LOOPBACK
from mimray.trainers.environment.places import (
    RAY_SOCKET,
    SHORT_PLACES,
    SMALL_FILES_BYTES,
    fault,
    private_folder,
    temporary_place,
)
from mimray.trainers.errors import ResourceError

# The names by which `getpass.getuser` knows a user before it asks for the entry in passwd.
USER_VARIABLES = ("LOGNAME", "USER", "LNAME", "USERNAME")


@dataclass(frozen=True)
class Finding:
    """One thing that hinders, and what is done about it.

    Attributes:
        problem: the thing, with its value.
        instead: what is done about it; empty if nothing can be done.
        cure: what a person can do about it.
        variables: the environment variables to set.
    """

    problem: str
    instead: str
    cure: str
    variables: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.problem}: {self.instead}" if self.instead else self.problem


@functools.cache
def adjust() -> tuple[Finding, ...]:
    """Set the variables that mend what hinders this process; once, however often it is called.

    Returns:
        The findings from before.
    """
    os.environ.update(quiet_variables(os.environ))
    found: list[Finding] = []
    # Each builds on what those before it have mended.
    for inspect in (_working_directory, _loopback, _temporary_files, _home, _caches, _ray_session):
        for finding in inspect(os.environ):
            os.environ.update(finding.variables)
            found.append(finding)
            if not finding.instead:
                return tuple(found)
    return tuple(found)


def require_usable() -> None:
    """Refuse to go on where something hinders that cannot be mended from here.

    Raises:
        ResourceError: with the first such finding and its cure.
    """
    for finding in adjust():
        if not finding.instead:
            raise ResourceError(finding.problem, hint=finding.cure)


def require_working_directory() -> None:
    """Refuse to go on in a folder that was removed, where no relative path means anything.

    Raises:
        ResourceError: the working directory cannot be found.
    """
    for finding in _working_directory(os.environ):
        raise ResourceError(finding.problem, hint=finding.cure)


def quiet_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that are right on every machine, and change nothing that a person sees.

    A user without an entry in passwd, as in most clusters' containers, gets a name; processes of
    this machine talk to each other without a proxy.
    """
    variables = {}
    if not any(map(environ.get, USER_VARIABLES)) and not _passwd_home():
        variables["USER"] = f"uid{os.getuid()}"
    if any(name.lower().endswith("_proxy") and environ[name] for name in environ):
        hosts = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        listed = [host.strip() for host in hosts.split(",") if host.strip()]
        if "*" not in listed:
            listed += [host for host in LOOPBACK if host not in listed]
        variables |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(listed))
    return variables


def _working_directory(environ: Mapping[str, str]) -> Iterator[Finding]:
    try:
        os.getcwd()
    except OSError as error:
        yield Finding(
            f"the working directory cannot be found ({error.strerror})",
            instead="",
            cure="it was removed: cd to another",
        )


def _loopback(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Ray's processes wait for each other without an end where they cannot meet."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname(), timeout=5.0).close()
    except OSError as error:
        yield Finding(
            f"processes of this machine cannot meet at 127.0.0.1 ({error.strerror or error})",
            instead="",
            cure="`ip link set lo up`, or let the sandbox have its loopback network",
        )


def _temporary_files(environ: Mapping[str, str]) -> Iterator[Finding]:
    given = environ.get("TMPDIR")
    place = temporary_place()
    if place is None:
        tried = dict.fromkeys(filter(None, (given, *SHORT_PLACES)))
        yield Finding(
            "there is no place for temporary files: "
            + ", ".join(f"{place} {fault(place)}" for place in tried),
            instead="",
            cure="make room, or set TMPDIR to a folder that can be written",
        )
    elif given and place != given:
        yield Finding(
            f"TMPDIR={given} {fault(given)}",
            instead=f"temporary files go to {place}",
            cure="set TMPDIR to a folder with room that can be written",
            variables={"TMPDIR": place},
        )
    elif place != "/tmp" and not given:
        # Libraries that do not look for a place themselves take /tmp.
        yield Finding(
            f"/tmp {fault('/tmp')}",
            instead=f"temporary files go to {place}",
            cure="make /tmp writable, or set TMPDIR",
            variables={"TMPDIR": place},
        )


def _home(environ: Mapping[str, str]) -> Iterator[Finding]:
    home = environ.get("HOME") or _passwd_home()
    if home and os.path.isdir(home):
        return
    problem = f"the home folder {home} {fault(home)}"
    if not home:
        problem = f"HOME is not set, and user {os.getuid()} has no entry in passwd"
    folder = str(_folder_of_caches())
    yield Finding(
        problem,
        instead=f"caches and Ray's token are kept in {folder}",
        cure="set HOME to a folder that can be written",
        variables={"HOME": folder},
    )


def _caches(environ: Mapping[str, str]) -> Iterator[Finding]:
    """A home that can be read only has settings and credentials to find, and stays."""
    home = environ.get("HOME") or _passwd_home()
    base = environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    for place in dict.fromkeys((_nearest(base), home)):
        problem = fault(place, wanted_bytes=SMALL_FILES_BYTES)
        if problem:
            folder = _folder_of_caches()
            yield Finding(
                f"{place}, where caches would be kept, {problem}",
                instead=f"they are kept in {folder}",
                cure="set HOME or XDG_CACHE_HOME to a folder that can be written",
                variables={
                    "XDG_CACHE_HOME": str(folder / ".cache"),
                    "MPLCONFIGDIR": environ.get("MPLCONFIGDIR") or str(folder / "matplotlib"),
                    "TRITON_HOME": environ.get("TRITON_HOME") or str(folder),
                },
            )
            return


def _ray_session(environ: Mapping[str, str]) -> Iterator[Finding]:
    given = environ.get("RAY_TMPDIR")
    if given:
        problem = fault(given, RAY_SOCKET)
        if problem:
            cure = "set RAY_TMPDIR to a short folder that can be written, such as /tmp"
            yield Finding(f"RAY_TMPDIR={given} {problem}", "", cure)
        return
    wanted = environ.get("TMPDIR") or "/tmp"
    place = temporary_place(RAY_SOCKET)
    if place is None:
        yield Finding(
            f"there is no place for Ray's session: {wanted} {fault(wanted, RAY_SOCKET)}",
            "",
            "set RAY_TMPDIR to a short folder with room that can be written",
        )
        return
    problem = f"TMPDIR={wanted} {fault(wanted, RAY_SOCKET)}" if place != wanted else ""
    session = os.path.join(place, "ray")
    if os.path.lexists(session) and fault(session):
        problem, place = f"{session} {fault(session)}", str(private_folder(place))
    if problem:
        yield Finding(
            problem,
            instead=f"Ray's session goes to {place}",
            cure="set RAY_TMPDIR to a short folder that can be written, such as /tmp",
            variables={"RAY_TMPDIR": place},
        )


def _folder_of_caches() -> Path:
    """A folder in place of the user's home."""
    place = temporary_place()
    assert place is not None  # found before
    folder = private_folder(place) / "home"
    folder.mkdir(exist_ok=True)
    return folder


def _nearest(folder: str) -> str:
    """The folder, or the nearest one above it that there is."""
    path = Path(folder).absolute()
    return str(next(place for place in (path, *path.parents) if os.path.lexists(place)))


def _passwd_home() -> str:
    """The home folder of this user's entry in passwd; empty without an entry."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""
