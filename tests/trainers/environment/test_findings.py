"""Hindrances to a process are found, and the variables that mend them are set."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimray.trainers.environment import findings, places
from mimray.trainers.environment.findings import adjust, quiet_variables, require_usable
from mimray.trainers.errors import ResourceError

VARIABLES = ("HOME", "TMPDIR", "RAY_TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME")


@pytest.fixture
def short() -> Iterator[Path]:
    """A short folder, where pytest's own are long."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="m") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _plain_machine(short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in VARIABLES:
        os.environ.pop(name, None)
    home, own = short / "home", short / "t"
    home.mkdir()
    own.mkdir()
    os.environ["HOME"] = str(home)
    for module in (places, findings):
        monkeypatch.setattr(module, "SHORT_PLACES", (str(own),))
    os.environ["TMPDIR"] = str(own)
    adjust.cache_clear()
    yield
    adjust.cache_clear()


def told() -> str:
    return "; ".join(map(str, adjust()))


def test_adjust__a_machine_without_troubles_stays_as_it_is() -> None:
    before = dict(os.environ)
    assert adjust() == ()
    assert dict(os.environ) == before


def test_adjust__a_long_tmpdir_is_kept_and_rays_session_goes_to_a_short_place(short: Path) -> None:
    long = short / "slurm_jobdir/1355700/node-0016/tmp"
    long.mkdir(parents=True)
    os.environ["TMPDIR"] = str(long)
    assert f"TMPDIR={long} is too long for sockets" in told()
    assert f"Ray's session goes to {short / 't'}" in told()
    assert os.environ["TMPDIR"] == str(long)
    assert os.environ["RAY_TMPDIR"] == str(short / "t")
    session = os.path.join(os.environ["RAY_TMPDIR"], places.RAY_SOCKET.lstrip("/"))
    assert len(session) <= places.SOCKET_PATH_BYTES


@pytest.mark.parametrize(
    ("given", "reason"), [("absent", "does not exist"), ("file", "is no folder")]
)
def test_adjust__a_tmpdir_that_cannot_be_used(short: Path, given: str, reason: str) -> None:
    (short / "file").touch()
    os.environ["TMPDIR"] = str(short / given)
    assert told() == f"TMPDIR={short / given} {reason}: temporary files go to {short / 't'}"
    assert os.environ["TMPDIR"] == str(short / "t")


def test_adjust__a_full_tmpdir(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = short / "full"
    full.mkdir()
    usage = places.shutil.disk_usage
    monkeypatch.setattr(
        places.shutil,
        "disk_usage",
        lambda place: usage(place)._replace(free=1 << 20) if place == str(full) else usage(place),
    )
    os.environ["TMPDIR"] = str(full)
    assert f"TMPDIR={full} is full (1 MiB free)" in told()


def test_require_usable__no_place_at_all_is_refused_with_a_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (places, findings):
        monkeypatch.setattr(module, "SHORT_PLACES", ("/absent",))
    del os.environ["TMPDIR"]
    with pytest.raises(ResourceError, match="no place for temporary files: /absent does not") as e:
        require_usable()
    assert "set TMPDIR" in e.value.hint


def test_require_usable__a_ray_tmpdir_that_was_asked_for_is_refused_not_replaced() -> None:
    os.environ["RAY_TMPDIR"] = "/absent"
    with pytest.raises(ResourceError, match="RAY_TMPDIR=/absent does not exist"):
        require_usable()


def test_adjust__a_session_folder_of_someone_else(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (short / "t/ray").write_text("as good as a folder that cannot be written")
    assert f"{short / 't/ray'} is no folder" in told()
    assert os.environ["RAY_TMPDIR"] == str(short / f"t/mimray-{os.getuid()}")


@pytest.mark.parametrize("home", [None, "/nonexistent"])
def test_adjust__without_a_home(
    short: Path, home: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    del os.environ["HOME"]
    if home is not None:
        os.environ["HOME"] = home
    assert "caches and Ray's token are kept in" in told()
    made = Path(os.environ["HOME"])
    assert made == short / f"t/mimray-{os.getuid()}/home"
    assert made.parent.stat().st_mode & 0o777 == 0o700


def test_adjust__a_home_whose_caches_cannot_be_written_stays(short: Path) -> None:
    (short / "home/.cache").touch()
    home = os.environ["HOME"]
    assert "where caches would be kept, is no folder" in told()
    assert os.environ["HOME"] == home
    assert os.environ["XDG_CACHE_HOME"] == str(short / f"t/mimray-{os.getuid()}/home/.cache")


def test_adjust__a_working_directory_that_was_removed(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = short / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ResourceError, match="working directory cannot be found"):
        require_usable()


def test_private_folder__made_by_someone_else_is_refused(short: Path) -> None:
    (short / f"mimray-{os.getuid()}").mkdir(mode=0o755)
    with pytest.raises(ResourceError, match="not a private directory"):
        places.private_folder(str(short))


def test_quiet_variables__loopback_goes_past_a_proxy() -> None:
    given = {"https_proxy": "http://proxy:3128", "NO_PROXY": "intra.net, ::1", "USER": "me"}
    wanted = "intra.net,::1,127.0.0.1,localhost"
    assert quiet_variables(given) == {"no_proxy": wanted, "NO_PROXY": wanted}
    assert quiet_variables({"USER": "me"}) == {}
    assert quiet_variables({"USER": "me", "http_proxy": "x", "no_proxy": "*"})["NO_PROXY"] == "*"


def test_quiet_variables__a_user_without_an_entry_has_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert quiet_variables({}) == {"USER": f"uid{os.getuid()}"}
