"""A real endpoint under steady load, and what can happen to it: no request is answered wrong.

Every answer is 200 with the right numbers, or a refusal that says when to come back.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest

from mimray.serving.config import check_config
from mimray.serving.deploy import haproxy
from mimray.serving.deploy.endpoint import Endpoint, start
from mimray.serving.deploy.haproxy import HAProxyState, haproxy_available
from mimray.serving.deploy.serve_schema import Version

pytestmark = [
    pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform"),
]
ALLOWED = {200, 503}
HALF = b"POST /v1/features?model=m HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\nabc"
"""A request whose body does not end."""


class Registry:
    """The versions that references mean; the test changes them."""

    def __init__(self, **versions: Version) -> None:
        self.versions = {name.replace("_", "@"): version for name, version in versions.items()}

    def __call__(self, reference: str) -> Version:
        from mimray.trainers.errors import BundleError

        if reference not in self.versions:
            raise BundleError(f"no model {reference!r}")
        return self.versions[reference]


@pytest.fixture(scope="module")
def registry(bundles: dict[str, Path]) -> Registry:
    return Registry(m_champion=Version("m@champion", bundles["alpha"], "1"))


@pytest.fixture(scope="module")
def endpoint(
    registry: Registry, ray_session: str, free_port: Callable[[], int]
) -> Iterator[Endpoint]:
    port = free_port()
    model = {
        "bundle": "m@champion",
        "replicas": 2,
        "device": "cpu",
        "num_cpus": 0.3,
        "cache_mib": 0,
        "max_queue_size": 8,
        "canary": {"bundle": "m@canary", "share": 0.5},
    }
    config = check_config({"port": port, "models": {"m": model}}, "test")
    with start(config, registry) as endpoint:
        yield endpoint
    assert not HAProxyState(port).processes()


@pytest.fixture(autouse=True)
def _as_at_first(endpoint: Endpoint, registry: Registry, bundles: dict[str, Path]) -> None:
    registry.versions.clear()
    registry.versions["m@champion"] = Version("m@champion", bundles["alpha"], "1")
    endpoint.follow()
    assert endpoint.versions == {"m": "1"}


@pytest.fixture(scope="module")
def expected(bundles: dict[str, Path], picture: Callable[..., bytes]) -> dict[str, Any]:
    """Pooled vectors of the picture by either version."""
    import torch

    from mimray.serving.config import Limits
    from mimray.serving.inference.placement import Sizing
    from mimray.serving.inference.preprocess import Preparer
    from mimray.trainers.bundles import load_bundle
    from mimray.trainers.models.normalise import normalise

    found = {}
    for version, name in (("1", "alpha"), ("2", "beta")):
        encoder = load_bundle(bundles[name])
        prepared = Preparer(encoder.card, 16, Limits()).prepare(picture(1), Sizing())
        images = normalise(
            torch.from_numpy(prepared.pixels)[None], encoder.card.mean, encoder.card.std
        )
        found[version] = encoder(images).pooled[0].numpy()
    return found


class Load:
    """Requests one after the other from several threads, each answer held against the truth."""

    def __init__(self, url: str, body: bytes, expected: dict[str, Any], path: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.problems: list[str] = []
        self.lost: list[str] = []
        self._url, self._body, self._expected, self._path = url, body, expected, path
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(4)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=240)
            assert not thread.is_alive(), "a request hangs"

    def wait_for(self, count: int, timeout_s: float = 240) -> None:
        """Until so many more requests were answered with features."""
        wanted = self.statuses[200] + count
        deadline = time.monotonic() + timeout_s
        while self.statuses[200] < wanted:
            assert time.monotonic() < deadline, f"{self.statuses} {self.problems[:3]}"
            time.sleep(0.02)

    def _run(self) -> None:
        with httpx2.Client(base_url=self._url, timeout=240) as client:
            while not self._stop.is_set():
                try:
                    response = client.post(self._path, content=self._body)
                except httpx2.TransportError as error:
                    self.lost.append(repr(error))
                    time.sleep(0.05)
                    continue
                self.statuses[response.status_code] += 1
                self._check(response)

    def _check(self, response: Any) -> None:
        if response.status_code != 200:
            problem = response.headers["content-type"] == "application/problem+json"
            if not problem or not response.json()["error"]:
                self.problems.append(f"{response.status_code} {response.text[:200]}")
            else:
                self.refusals[response.json()["error"]] += 1
            if response.status_code == 503 and not response.headers["retry-after"].isdigit():
                self.problems.append("503 without Retry-After")
            time.sleep(0.05)
            return
        answer = response.json()
        self.versions[answer["version"]] += 1
        off = np.abs(np.array(answer["data"][0]["pooled"]) - self._expected[answer["version"]])
        if off.max() > 1e-5:
            self.problems.append(f"version {answer['version']} is off by {off.max()}")


@contextmanager
def _load(
    endpoint: Endpoint, picture: Callable[..., bytes], expected: dict[str, Any],
    path: str = "/v1/features?model=m",
) -> Iterator[Load]:  # fmt: skip
    with Load(endpoint.url, picture(1), expected, path) as load:
        load.wait_for(10)
        yield load
        load.wait_for(10)
    assert not load.problems


def _replicas(name: str = "ServeReplica:m:") -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(name in word for word in process.info["cmdline"] or [])
    ]


def test_replica_killed__others_answer(
    endpoint: Endpoint, picture: Callable[..., bytes], expected: dict[str, Any]
) -> None:
    with _load(endpoint, picture, expected) as load:
        victim = _replicas()[0]
        victim.kill()
        load.wait_for(40)
        assert load.statuses.keys() <= ALLOWED
        deadline = time.monotonic() + 240
        while len([p for p in _replicas() if p.pid != victim.pid]) < 2:
            assert time.monotonic() < deadline, "no replica took its place"
            time.sleep(0.1)


def test_proxy_killed__comes_back_on_its_port(
    endpoint: Endpoint, picture: Callable[..., bytes], expected: dict[str, Any]
) -> None:
    port = int(endpoint.url.rpartition(":")[2])
    with _load(endpoint, picture, expected) as load:
        for process in HAProxyState(port).processes():
            process.kill()
        load.wait_for(40, timeout_s=240)
        assert load.statuses.keys() <= ALLOWED


def test_slow_and_half_sent__nobody_else_waits(
    endpoint: Endpoint, picture: Callable[..., bytes], expected: dict[str, Any]
) -> None:
    host, port = endpoint.url.removeprefix("http://").split(":")
    sockets = []
    for data in (HALF, HALF, b"POST /v1/feat", b"GET / HTTP/1.1\r\nHost"):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(data)
        sockets.append(connection)
    with _load(endpoint, picture, expected) as load:
        load.wait_for(40)
        assert load.statuses.keys() == {200}
    for connection in sockets:
        connection.close()
    with _load(endpoint, picture, expected) as load:
        load.wait_for(10)


@pytest.mark.parametrize("said", [HALF, b"POST /v1/feat", b""], ids=["body", "headers", "nothing"])
def test_unfinished__of_one_client_by_the_thousand_hold_up_nobody(
    endpoint: Endpoint, picture: Callable[..., bytes], said: bytes
) -> None:
    """The others are of the same address, as behind a proxy."""
    host, port = endpoint.url.removeprefix("http://").split(":")
    with ExitStack() as sockets:
        for _ in range(1100):
            connection = socket.create_connection((host, int(port)), timeout=60)
            sockets.enter_context(connection)
            connection.sendall(said)
        for _ in range(3):
            began = time.monotonic()
            assert httpx2.get(endpoint.url + "/v2/health/live", timeout=60).status_code == 200
            assert time.monotonic() - began < 2
        if said != HALF:
            asked = f"{endpoint.url}/v1/features?model=m"
            assert httpx2.post(asked, content=picture(0), timeout=60).status_code == 200


def test_haproxy__runs_as_we_completed_it(endpoint: Endpoint) -> None:
    from mimray.serving.deploy.haproxy_launcher import MARK, STRIPPED, completed

    host, port = endpoint.url.removeprefix("http://").split(":")
    (file,) = HAProxyState(int(port)).folder.glob("*/haproxy.cfg")
    config = file.read_text()
    assert config.startswith(MARK)
    assert completed(config, "x", 1) == config  # once is enough
    assert "text/plain lf-string" not in config
    assert "127.0.0.1:514" not in config  # the system's log, by a UDP socket on every address
    assert not [
        line for line in config.splitlines() if line.strip().startswith(("bind :", "bind *"))
    ]
    # Which models there are is for those with a key, however they spell the path.
    for path in ("/-/routes", "/%2d/routes", "/-/rOuTes", "/-%2Froutes", "/%2D%2froute%73"):
        with socket.create_connection((host, int(port)), timeout=120) as connection:
            asked = f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            connection.sendall(asked.encode())
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 404"), path
        assert b"content-type: application/problem+json" in head
        assert json.loads(body)["code"] == "not_found"
        assert json.loads(body)["error"] == "there is nothing at this path"
    # A client cannot switch its own timeout off, or on.
    found = httpx2.get(endpoint.url + "/v1/models", headers={STRIPPED[0]: "1e-6"})
    assert found.status_code == 200
    with socket.create_connection((host, int(port)), timeout=120) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 400")


def test_launcher__refuses_what_it_does_not_know(tmp_path: Path) -> None:
    """Better no endpoint than one that clients can command."""
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\ndefaults\n    mode http\n    timeout client 60s\n")
    launcher = Path(haproxy.__file__).with_name("haproxy.sh")
    done = subprocess.run(
        [str(launcher), "-db", "-f", str(config)],
        env={**os.environ, "MIMRAY_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "this HAProxy is not started: nothing in HAProxy's configuration" in done.stderr


def test_overload__is_refused_and_what_is_taken_is_quick(
    endpoint: Endpoint, picture: Callable[..., bytes], expected: dict[str, Any]
) -> None:
    """Ten times as many at once as are admitted."""
    path = "/v1/features?model=m"
    with _load(endpoint, picture, expected, path):
        memory = sum(process.memory_info().rss for process in _replicas())
    several = [("f", (str(i), picture(1), "image/png")) for i in range(4)]
    statuses: Counter[int] = Counter()
    taken: list[float] = []

    def flood() -> None:
        with httpx2.Client(base_url=endpoint.url, timeout=240) as client:
            for _ in range(4):
                started = time.perf_counter()
                answer = client.post(path, files=several)
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    taken.append(time.perf_counter() - started)
                else:
                    assert answer.headers["retry-after"].isdigit()

    threads = [threading.Thread(target=flood) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=240)
        assert not thread.is_alive(), "a request hangs"
    assert statuses.keys() == {200, 503}
    assert sum(statuses.values()) == 160
    assert max(taken) < 20  # `max_wait_s`
    assert sum(process.memory_info().rss for process in _replicas()) < memory + 200 * 2**20


def test_files_and_processes__do_not_pile_up(
    endpoint: Endpoint, picture: Callable[..., bytes], expected: dict[str, Any]
) -> None:
    def counted() -> tuple[int, int]:
        replicas = _replicas()
        return len(replicas), sum(len(p.net_connections()) + p.num_fds() for p in replicas)

    with _load(endpoint, picture, expected):
        pass
    before = counted()
    bad = [b"", b"x" * 1000, picture(1, format="JPEG")[:100]]
    with httpx2.Client(base_url=endpoint.url) as client:
        for index in range(150):
            client.post("/v1/features?model=m", content=bad[index % 3])
            with socket.create_connection(("127.0.0.1", int(endpoint.url.rpartition(":")[2]))) as c:
                c.sendall(b"POST /v1/features?model=m HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
    time.sleep(0.5)
    after = counted()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 10


@pytest.mark.slow
def test_canary__gets_its_share_and_is_promoted(
    endpoint: Endpoint,
    registry: Registry,
    bundles: dict[str, Path],
    picture: Callable[..., bytes],
    expected: dict[str, Any],
) -> None:
    canary = Version("m@canary", bundles["beta"], "2")
    with _load(endpoint, picture, expected, "/v1/features?model=m") as load:
        registry.versions["m@canary"] = canary
        assert endpoint.follow() == ["m: version 1 → version 1, 50% to version 2"]
        load.versions.clear()
        load.wait_for(200)
        share = load.versions["2"] / sum(load.versions.values())
        assert 0.35 < share < 0.65  # 4 standard deviations of 200 fair draws
        client = httpx2.Client(base_url=endpoint.url)
        assert client.get("/v2/models/m").json()["versions"] == ["1", "2"]
        for version in ("1", "2"):
            found = client.post(f"/v1/features?version={version}", content=picture(1)).json()
            assert found["version"] == version
        registry.versions["m@champion"] = replace(canary, reference="m@champion")
        assert endpoint.follow() == ["m: version 1, 50% to version 2 → version 2"]
        load.wait_for(20)
        load.versions.clear()
        load.wait_for(20)
        assert load.versions.keys() == {"2"}
        assert not load.refusals
        assert not load.lost


# Last, for what it leaves would have to be rolled back.
def test_rollout__no_request_fails_and_a_damaged_bundle_is_refused(
    endpoint: Endpoint,
    registry: Registry,
    bundles: dict[str, Path],
    picture: Callable[..., bytes],
    expected: dict[str, Any],
    tmp_path: Path,
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(bundles["beta"], damaged)
    weights = damaged / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with _load(endpoint, picture, expected) as load:
        registry.versions["m@champion"] = Version("m@champion", damaged, "9")
        (line,) = endpoint.follow()
        assert "does not match its checksum" in line
        assert "goes on with version 1" in line
        assert endpoint.follow() == []  # said once
        registry.versions["m@champion"] = Version("m@champion", bundles["beta"], "2")
        assert endpoint.follow() == ["m: version 1 → version 2"]
        load.wait_for(20)
        newest = load.versions.copy()
        load.wait_for(20)
        assert load.versions["1"] == newest["1"], "the old version still answers"
        assert not load.refusals
        assert not load.lost
    client = httpx2.Client(base_url=endpoint.url)
    assert client.get("/v2/models/m").json()["versions"] == ["2"]
    assert client.get("/v2/models/m/versions/1").status_code == 404
