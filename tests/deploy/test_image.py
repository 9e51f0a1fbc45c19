"""The programs of the image: the check of its health, and the notice before a node ends."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

IMAGE = Path(__file__).parents[2] / "deploy/image"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, IMAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


healthy, leave = load("healthy"), load("leave")


class Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def agent() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def process(folder: Path, pid: int, name: str, *arguments: str) -> None:
    """Write a process as Linux mounts it: its name and command line."""
    (folder / str(pid)).mkdir(parents=True)
    (folder / f"{pid}/comm").write_text(f"{name}\n")
    (folder / f"{pid}/cmdline").write_bytes(b"\0".join(a.encode() for a in arguments) + b"\0")


def test_healthy__asks_the_node_and_the_endpoint(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text("global\n    x\n\nfrontend http_frontend\n    bind *:8001\n")
    processes = tmp_path / "proc"
    process(processes, 1, "tini", "tini", "--")
    process(processes, 2, "raylet", "raylet", "--agent_command=python agent.py --listen-port=700 x")
    process(processes, 3, "haproxy", "/bin/haproxy", "-db", "-f", str(config))

    assert sorted(healthy.urls(processes)) == [
        "http://127.0.0.1:700/api/healthz",
        "http://127.0.0.1:8001/-/healthz",
    ]


def test_healthy__a_command_without_ray_is_asked_nothing(tmp_path: Path) -> None:
    process(tmp_path, 1, "mimray", "python", "mimray", "recipes")

    assert healthy.urls(tmp_path) == []


def test_healthy__a_node_that_is_not_well_ends_with_the_reason(
    agent: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{agent.server_port}/api/healthz"
    monkeypatch.setattr(healthy, "urls", lambda: [url])
    healthy.main()

    monkeypatch.setattr(Answers, "status", 503)
    with pytest.raises(SystemExit, match=f"{url}.*503"):
        healthy.main()


HEAD = ["/ray/gcs_server --x", "/ray/raylet --y", "ray::DashboardAgent", "ray::_StatsActor"]
WORKER = ["/ray/raylet --y", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::IDLE"]


@pytest.mark.parametrize(
    ("commands", "expected"),
    [
        (HEAD, False),
        ([*HEAD, "ray::JobSupervisor"], True),
        (WORKER, False),
        ([*WORKER, "ray::IDLE_SpillWorker"], False),
        ([*WORKER, "ray::RayTrainWorker.execute"], True),
        ([*WORKER, "ray::ServeReplica:m:model"], True),
    ],
)
def test_leave__knows_work_from_what_ray_keeps(commands: list[str], expected: bool) -> None:
    assert leave.works(commands) is expected


def test_leave__a_worker_is_drained_and_a_head_drains_the_others() -> None:
    nodes = [
        {"NodeID": "h", "Alive": True, "Resources": {"node:__internal_head__": 1.0}},
        {"NodeID": "a", "Alive": True, "Resources": {"GPU": 1.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"GPU": 1.0}},
        {"NodeID": "dead", "Alive": False, "Resources": {}},
    ]

    assert leave.to_drain(nodes, "a") == ["a"]
    assert leave.to_drain(nodes, "h") == ["a", "b"]
