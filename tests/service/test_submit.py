from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.service.commands import submit
from mimray.service.commands.submit import job_name, run_submit
from mimray.trainers.errors import ConfigError, ResourceError

COMMAND = ("pretrain", "mae-tiny", "--data", "s3://bucket/my photos")


class Status(str):
    """A status as Ray's: a string with a value, that knows whether it is the last one."""

    @property
    def value(self) -> str:
        return str(self)

    def is_terminal(self) -> bool:
        return self in ("SUCCEEDED", "FAILED", "STOPPED")


class Cluster:
    """A cluster's job client, with jobs that end as they are told."""

    def __init__(self, *statuses: str, refuses: str = "") -> None:
        self.jobs: dict[str, Any] = {}
        self.submitted: list[dict[str, Any]] = []
        self.refuses = refuses
        base = job_name(COMMAND)
        for number, status in enumerate(statuses, start=1):
            self._add(base if number == 1 else f"{base}-{number}", status)

    def _add(self, job_id: str, status: str) -> None:
        self.jobs[job_id] = SimpleNamespace(
            submission_id=job_id, status=Status(status), start_time=len(self.jobs),
            driver_exit_code=0 if status == "SUCCEEDED" else None, message="",
        )  # fmt: skip

    def list_jobs(self) -> list[Any]:
        others = [SimpleNamespace(submission_id=one) for one in (None, "raysubmit_1")]
        return [*others, *self.jobs.values()]

    def submit_job(self, **asked: Any) -> None:
        if self.refuses:
            raise RuntimeError(f"Request failed:\n{self.refuses}")
        self.submitted.append(asked)
        self._add(asked["submission_id"], "RUNNING")

    def get_job_info(self, job_id: str) -> Any:
        return self.jobs[job_id]

    async def tail_job_logs(self, job_id: str) -> Any:
        yield "step 1/2\n"
        self.jobs[job_id].status = Status("SUCCEEDED")
        self.jobs[job_id].driver_exit_code = 0


def run(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    monkeypatch.setattr(submit, "_client", lambda address: cluster)
    asked = {"address": None, "working_dir": None, "name": None, "detach": False, "again": False}
    return run_submit(COMMAND, **{**asked, **options})


def test_submit__ships_the_checkout_and_follows_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cluster = Cluster()

    found = run(cluster, monkeypatch)

    [asked] = cluster.submitted
    assert asked["entrypoint"] == (
        "python -m service pretrain mae-tiny --data 's3://bucket/my photos'"
    )
    assert asked["submission_id"] == found["id"] == job_name(COMMAND)
    assert (found["found"], found["status"], found["exit_code"]) == (False, "SUCCEEDED", 0)
    assert "step 1/2" in capsys.readouterr().err


def test_submit__detached_returns_at_once(monkeypatch: pytest.MonkeyPatch):
    assert run(Cluster(), monkeypatch, detach=True)["status"] == "RUNNING"


@pytest.mark.parametrize(
    ("there", "again", "new_job"),
    [
        (("RUNNING",), False, None),
        (("SUCCEEDED",), False, None),
        (("SUCCEEDED",), True, "-2"),
        (("FAILED",), False, "-2"),
        (("FAILED", "STOPPED"), False, "-3"),
        (("FAILED", "RUNNING"), True, None),
    ],
)
def test_submit__the_same_command_is_the_same_job(
    monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], again: bool, new_job: str | None
):
    cluster = Cluster(*there)

    found = run(cluster, monkeypatch, again=again)

    assert found["found"] == (new_job is None)
    if new_job is None:
        assert cluster.submitted == []
    else:
        assert found["id"] == job_name(COMMAND) + new_job


def test_submit__a_number_is_not_given_twice(monkeypatch: pytest.MonkeyPatch):
    cluster = Cluster("FAILED", "FAILED", "FAILED")
    del cluster.jobs[f"{job_name(COMMAND)}-2"]

    assert run(cluster, monkeypatch)["id"] == f"{job_name(COMMAND)}-4"


def test_submit__a_head_that_dies_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch):
    class Dying(Cluster):
        async def tail_job_logs(self, job_id: str) -> Any:
            yield "step 1/2\n"
            raise RuntimeError("WebSocket closed with code 1006")

    with pytest.raises(ResourceError, match=r"lost sight of mimray-pretrain-\w+: WebSocket"):
        run(Dying(), monkeypatch)


def test_submit__a_refusal_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ResourceError, match=r"refuses mimray-pretrain-\w+: package too large"):
        run(Cluster(refuses="package too large"), monkeypatch)


@pytest.mark.parametrize("command", [("mimray", "pretrain"), ("ui",), ("submit", "pretrain")])
def test_submit__takes_only_commands_for_a_cluster(command: tuple[str, ...]):
    with pytest.raises(ConfigError):
        run_submit(command, address=None, working_dir=None, name=None, detach=False, again=False)


def test_submit__no_dashboard_is_told_with_the_cure():
    done = CliRunner().invoke(
        cli, ["submit", "--address", "http://127.0.0.1:9", "--", "pretrain", "mae-tiny"]
    )

    assert done.exit_code == 2
    assert "no Ray dashboard answers at http://127.0.0.1:9" in done.stderr


def test_name__is_told_by_the_command_alone():
    assert job_name(COMMAND) == job_name(list(COMMAND))
    assert job_name(COMMAND) != job_name((*COMMAND, "--fresh"))
    assert job_name(COMMAND).startswith("mimray-pretrain-")
