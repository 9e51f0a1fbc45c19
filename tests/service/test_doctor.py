from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimray.service.commands import doctor_checks as checks
from mimray.service.commands.doctor import Finding as DoctorFinding
from mimray.service.commands.doctor import as_json, diagnose, render
from mimray.trainers.environment.findings import Finding


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def listening_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_diagnose__this_machine_can_train_and_nothing_is_left_behind(tmp_path: Path):
    findings = diagnose(storage=str(tmp_path / "runs"), ports=(free_port(),), memory_gib=0.5)

    assert [finding for finding in findings if finding.status == "fail"] == []
    names = {finding.name for finding in findings}
    assert {"python", "torch", "deepspeed", "ray", "storage", "mlflow"} <= names
    assert list(tmp_path.iterdir()) == []


def test_diagnose__a_check_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken() -> checks.Verdict:
        raise RuntimeError("libcudart is missing")

    monkeypatch.setattr(checks, "check_deepspeed", broken)

    by_name = {finding.name: finding for finding in diagnose(ports=())}

    assert by_name["deepspeed"].status == "fail"
    assert by_name["deepspeed"].detail == "RuntimeError: libcudart is missing"
    assert by_name["python"].status == "ok"


def test_check_port__names_who_took_it(listening_port: int):
    verdict = checks.check_port(listening_port)

    assert verdict.status == "warn"
    assert "taken" in verdict.detail
    assert "pid" in verdict.detail
    assert checks.check_port(free_port()).status == "ok"


def test_check_storage__a_path_under_a_file_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()

    verdict = checks.check_storage(str(tmp_path / "file" / "runs"))

    assert verdict.status == "fail"
    assert "Not a directory" in verdict.detail
    assert verdict.cure


def test_check_storage__a_bad_uri_is_a_finding():
    verdict = checks.check_storage("nonsense://bucket/runs")

    assert verdict.status == "fail"
    assert "nonsense://bucket/runs cannot be written" in verdict.detail


def test_check_storage__local_paths_and_file_uris(tmp_path: Path):
    assert checks.check_storage(str(tmp_path / "a" / "b")).status in ("ok", "warn")
    assert checks.check_storage(f"file://{tmp_path}/a").status in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


def test_check_memory__says_how_much_is_missing():
    verdict = checks.check_memory(1e6)

    assert verdict.status == "fail"
    assert "1e+06 GiB wanted" in verdict.detail
    assert checks.check_memory(0.01).status == "ok"


def test_check_environment__tells_what_is_done_about_each_finding(
    monkeypatch: pytest.MonkeyPatch,
):
    mended = Finding("TMPDIR=/x is full", "temporary files go to /tmp", "make room")
    lost = Finding("there is no place", "", "set TMPDIR")
    monkeypatch.setattr(checks, "adjust", tuple)
    assert checks.check_environment().status == "ok"
    monkeypatch.setattr(checks, "adjust", lambda: (mended,))
    assert checks.check_environment() == checks.Verdict(
        "warn", "TMPDIR=/x is full: temporary files go to /tmp", "make room"
    )
    monkeypatch.setattr(checks, "adjust", lambda: (mended, lost))
    assert checks.check_environment().status == "fail"


@pytest.mark.parametrize(
    ("free_gib", "cost"), [(0, "decoded in the process"), (0.1, "pipes"), (2, "moves to disk")]
)
def test_check_shared_memory__says_what_too_little_costs(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, cost: str
):
    monkeypatch.setattr(checks.limits, "available_memory", lambda: 40 * checks.GIB)
    monkeypatch.setattr(checks.limits, "free_shared_memory", lambda: int(free_gib * checks.GIB))
    verdict = checks.check_shared_memory()
    assert verdict.status == "warn"
    assert cost in verdict.detail
    assert "--shm-size=12g" in verdict.cure


def test_check_cpus__a_share_of_the_machine_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(checks.limits, "usable_cpus", lambda: 4)
    assert checks.check_cpus().detail == "4 of the machine's 64, by affinity or quota"


def test_check_names__a_host_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "nosuchhost.invalid")
    verdict = checks.check_names()
    assert verdict.status == "warn"
    assert "127.0.0.1 nosuchhost.invalid" in verdict.cure


def test_check_cluster__answers_or_does_not(monkeypatch: pytest.MonkeyPatch, listening_port: int):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening_port}")
    assert checks.check_cluster().status == "warn"  # it answers, without a token
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert checks.check_cluster().status == "ok"
    monkeypatch.setenv("RAY_ADDRESS", f"ray://127.0.0.1:{free_port()}")
    assert checks.check_cluster().status == "fail"


def test_check_mlflow__a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")

    verdict = checks.check_mlflow("runs")

    assert verdict.status == "fail"
    assert "no MLflow server answers" in verdict.detail
    assert "MLFLOW_TRACKING_URI" in verdict.cure


def test_check_compiler__finds_ninja_beside_python_without_activation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.check_compiler().status == "warn"

    for tool in ("g++", "ninja"):
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "")
    assert checks.check_compiler().status == "ok"


def test_render__one_line_a_finding_and_the_cure_below():
    findings = [
        DoctorFinding("python", "ok", "3.11.7"),
        DoctorFinding("port 8000", "warn", "taken", "choose another"),
        DoctorFinding("ray", "fail", "no Ray", "install it"),
    ]

    assert render(findings).splitlines() == [
        "ok    python     3.11.7",
        "warn  port 8000  taken",
        "                 -> choose another",
        "fail  ray        no Ray",
        "                 -> install it",
        "",
        "1 ok, 1 to look at, 1 to mend",
    ]
    assert json.loads(as_json(findings))[1] == {
        "name": "port 8000",
        "status": "warn",
        "detail": "taken",
        "cure": "choose another",
    }
