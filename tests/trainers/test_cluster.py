"""Ray's token and address, without a Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mimray.trainers import cluster
from mimray.trainers.cluster import connected_if_larger, keep_token, start_ray, unreachable
from mimray.trainers.environment import limits
from mimray.trainers.errors import ResourceError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


def test_token__is_made_readable_by_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keep_token()
    finally:
        os.umask(before)
    file = tmp_path / ".ray/auth_token"
    assert mode(file) == 0o600
    assert mode(file.parent) == 0o700
    token = file.read_text()
    assert len(token) == 64
    keep_token()
    assert file.read_text() == token


def test_token__that_others_can_read_is_closed(tmp_path: Path) -> None:
    file = tmp_path / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    keep_token()
    assert mode(file) == 0o600
    assert file.read_text() == "secret"


def test_token__of_another_user_that_others_can_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    keep_token()
    assert mode(file) == 0o644
    assert f"chmod 600 {file}" in caplog.text
    assert "secret" not in caplog.text.replace(str(tmp_path), "")


# In a process of its own, as Ray's settings are of the process.
PROTECTED = """
import ray
from ray._private import ray_constants
from ray._raylet import get_authentication_mode
ray.init = lambda **_: print(int(get_authentication_mode()), ray_constants.ENABLE_RAY_CLUSTER)
from mimray.trainers.cluster import start_ray
start_ray()
"""


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ({}, "1 False"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}, "0 True"),
    ],
)
def test_start_ray__a_local_one_is_protected_unless_told_though_ray_was_imported_before(
    tmp_path: Path, given: dict[str, str], seen: str
) -> None:
    own = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROTECTED], env={**own, **given}, capture_output=True, text=True
    )
    assert done.stdout == f"{seen}\n", done.stderr
    assert (tmp_path / ".ray/auth_token").exists() == (not given)


def test_token__goes_elsewhere_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".ray").write_text("in the way")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setattr(cluster, "temporary_place", lambda: str(place))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # restored after the test
    keep_token()
    kept = place / f"mimray-{os.getuid()}" / "auth_token"
    assert mode(kept) == 0o600
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(kept)
    assert str(kept) in caplog.text


@pytest.mark.parametrize(
    ("name", "value"), [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_MODE", "disabled")]
)
def test_token__is_not_made_where_none_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    keep_token()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_start_ray__a_dead_cluster_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address.format(port=listener.getsockname()[1])
        assert unreachable(address) == ""
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}: Connection ref"):
        start_ray()


def test_unreachable__what_is_no_address() -> None:
    assert unreachable("auto") == unreachable("local") == ""
    assert "an address is host:port" in unreachable("host:port")
    assert unreachable("nosuchhost.invalid:6379")


def test_resources__of_a_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 2**30
    monkeypatch.setattr(limits, "usable_cpus", lambda: 3)
    monkeypatch.setattr(limits, "memory_limit", lambda: 4 * gib)
    monkeypatch.setattr(limits, "available_memory", lambda: 2 * gib)
    monkeypatch.setattr(limits, "free_shared_memory", lambda: 64 << 20)
    found = cluster._resources()
    assert found["num_cpus"] == 3
    assert found["object_store_memory"] == int(0.3 * 2 * gib)
    assert found["_memory"] == 2 * gib - found["object_store_memory"]
    assert "_plasma_directory" not in found
    monkeypatch.setattr(limits, "free_shared_memory", lambda: 0)
    assert Path(cluster._resources()["_plasma_directory"]).is_dir()


@pytest.mark.parametrize(
    ("cpus", "cuda", "address", "connects"),
    [
        (4, False, None, False),
        (4, False, "local", False),
        (5, False, None, True),
        (2, True, None, True),
        (2, False, "10.0.0.1:6379", True),
    ],
)
def test_connected_if_larger__where_there_is_more_than_a_few_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, cuda: bool, address: str | None, connects: bool
) -> None:
    seen: list[str] = []

    @contextmanager
    def connected() -> Iterator[None]:
        seen.append("connected")
        yield

    monkeypatch.setattr(cluster, "connected", connected)
    monkeypatch.setattr(limits, "usable_cpus", lambda: cpus)
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)

    with connected_if_larger():
        seen.append("worked")

    assert seen == ["connected"] * connects + ["worked"]


def test_connected_if_larger__uses_the_cluster_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(cluster, "start_ray", lambda *_, **__: seen.append("started"))

    with connected_if_larger():
        seen.append("worked")

    assert seen == ["worked"]
