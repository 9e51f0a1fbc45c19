"""Where a run stands, from its directory and the answer of its recorder."""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.service.commands import doctor_run
from mimray.service.commands.doctor_run import Answer, Diagnosis, Traces, diagnose_run, judge
from mimray.trainers.lifeline import Heartbeat
from mimray.trainers.recorder import LAUNCH, Launch, RunState, Standing
from tests.trainers.runs import small_plan

NOW = 10_000.0
BEGUN = Launch("l1", "host", "10.0.0.1:6379", "mimray pretrain mae-tiny", NOW - 60)
ROW = {"step": 40, "samples": 640, "loss": 0.5, "images_per_s": 8.0, "time": NOW - 5}
TRACES = Traces(
    run="/runs/a",
    steps=100,
    row=ROW,
    num_rows=40,
    damages={"step-00000040": "", "step-00000030": ""},
    exported=False,
    launch=BEGUN,
    hangs=[],
    now=NOW,
)


def beat(rank: int, **facts: Any) -> Heartbeat:
    usual = {"steps": 11, "since_s": 0.5, "slowest_s": 2.0} | facts
    return Heartbeat(rank, f"node{rank}", "host", 100 + rank, **usual)


def answer(*heard: tuple[Heartbeat, float], hung: str = "", **facts: Any) -> Answer:
    state = RunState(**({"started_at": 30, "attempts": 1, "workers": 2, "row": ROW} | facts))
    return Answer(Standing(state, list(heard), hung))


def by_name(diagnosis: Diagnosis) -> dict[str, Any]:
    return {finding.name: finding for finding in diagnosis.findings}


def test_running__each_worker_has_a_line():
    found = judge(TRACES, answer((beat(0), 0.4), (beat(1, pause="checkpoint"), 12.0)))

    assert (found.state, found.step, found.steps, found.resumes_from) == ("running", 40, 100, 40)
    lines = by_name(found)
    # 60 steps of 16 pictures at 8 a second
    assert lines["run"].detail == (
        "running: step 40 of 100, 2 workers, 8 pictures/s, about 2 min 0 s to go"
    )
    assert lines["rank 0"].status == "ok"
    assert lines["rank 0"].detail == (
        "update 41, begun 0.9 s ago (the slowest took 2 s); process 100 on host, node node0"
    )
    assert lines["rank 1"].status == "warn"
    assert "checkpoint after update 41" in lines["rank 1"].detail
    assert "no heartbeat for 12 s" in lines["rank 1"].detail
    assert lines["checkpoints"].detail == "step-00000040 is whole, and 1 before it"
    assert lines["metrics"].detail == "40 rows to step 40, loss 0.5000, 5 s ago"
    assert found.workers[1] == {
        "rank": 1, "host": "host", "node_id": "node1", "pid": 101, "update": 41,
        "since_s": 12.5, "slowest_s": 2.0, "pause": "checkpoint", "silent_s": 12.0,
    }  # fmt: skip


def test_running__a_later_start_a_score_and_a_signal_are_told():
    found = judge(TRACES, answer(attempts=2, phase="features 64/100", stopping="SIGTERM"))
    detail = by_name(found)["run"].detail
    for part in ("start 2 of this launch", "features 64/100", "asked to stop by SIGTERM"):
        assert part in detail


def test_starting__warns_where_it_takes_long():
    waiting = answer((beat(0, steps=0, since_s=3.0, slowest_s=0.0), 0.5), started_at=None, row={})
    found = judge(TRACES, waiting)
    assert found.state == "starting"
    assert by_name(found)["run"].status == "ok"
    assert by_name(found)["rank 0"].detail.startswith("starting for 3.5 s; process")
    slow = judge(replace(TRACES, now=NOW + 3600), waiting)
    assert (by_name(slow)["run"].status, "1 h 1 min" in by_name(slow)["run"].detail) == (
        "warn",
        True,
    )


def test_hung__fails_and_names_the_worker():
    reason = "rank 1 (process 101 on host, update 11 of this start) has made no step for 130 s"
    found = judge(TRACES, answer((beat(0), 0.4), (beat(1), 0.4), hung=reason))
    assert found.state == "hung"
    lines = by_name(found)
    assert (lines["run"].status, lines["rank 1"].status, lines["rank 0"].status) == (
        "fail",
        "fail",
        "ok",
    )
    assert reason in lines["run"].detail


def test_stopped__tells_the_reason_and_the_command_that_goes_on():
    killed = by_name(judge(TRACES, Answer()))["run"]
    assert (killed.status, "its driver was killed" in killed.detail) == ("warn", True)
    assert killed.cure == "`mimray pretrain mae-tiny` goes on from step 40"

    failed = replace(
        BEGUN, status="FAILED", reason="rank 0 ran out of memory", cure="--set engine.offload=…"
    )
    ended = by_name(judge(replace(TRACES, launch=failed), Answer()))["run"]
    assert ended.detail == "stopped: step 40 of 100, 5 s ago: rank 0 ran out of memory"
    assert ended.cure == "--set engine.offload=…; `mimray pretrain mae-tiny` goes on from step 40"

    over = replace(BEGUN, command="mimray pretrain mae-tiny --fresh --data 'a b'")
    again = by_name(judge(replace(TRACES, launch=over), Answer()))["run"].cure
    assert again == "`mimray pretrain mae-tiny --data 'a b'` goes on from step 40"

    early = judge(replace(TRACES, damages={}, row={}, num_rows=0), Answer())
    assert (early.state, early.resumes_from, early.step) == ("stopped", 0, 0)
    assert by_name(early)["metrics"].detail == "no row yet"


def test_finished__needs_its_bundle_and_all_steps():
    done = replace(TRACES, exported=True, row={**ROW, "step": 100})
    found = judge(done, Answer())
    assert (found.state, found.resumes_from) == ("finished", None)
    assert {finding.status for finding in found.findings} == {"ok"}
    assert judge(replace(done, steps=200), Answer()).state == "stopped"  # made longer, not yet run
    assert judge(replace(done, exported=False), Answer()).state == "stopped"


def test_damaged__each_checkpoint_that_cannot_be_read_is_named():
    one = replace(
        TRACES, damages={"step-00000040": "x does not match its checksum", "step-00000030": ""}
    )
    found = judge(one, Answer())
    assert (found.state, found.resumes_from) == ("stopped", 30)
    assert by_name(found)["checkpoint"].status == "warn"
    assert "step-00000040 is damaged: x does not" in by_name(found)["checkpoint"].detail

    both = judge(replace(TRACES, damages=dict.fromkeys(one.damages, "gone")), Answer())
    assert (both.state, both.resumes_from) == ("damaged", None)
    assert by_name(both)["run"].status == "fail"
    assert "--fresh" in by_name(both)["run"].cure


def test_unknown__where_its_cluster_was_not_asked():
    found = judge(TRACES, Answer(problem="10.0.0.1:6379: No route to host"))
    run = by_name(found)["run"]
    assert (found.state, run.status) == ("unknown", "warn")
    assert "5 s ago, and its cluster was not asked: 10.0.0.1:6379: No route to host" in run.detail
    assert "--address" in run.cure


def test_hangs__the_last_one_is_told():
    found = judge(replace(TRACES, hangs=["Sat …: rank 1 (…) has given no sign of life"]), Answer())
    assert by_name(found)["hangs"].detail.startswith("1 so far, the last one Sat …: rank 1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of which there is a plan and nothing more."""
    plan = small_plan()
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "plan.json").write_text(plan.model_dump_json())
    return folder


def launched(run: Path, **facts: Any) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    launch = Launch("l1", socket.gethostname(), address, "mimray pretrain", NOW)
    (run / LAUNCH).write_text(json.dumps(asdict(launch) | facts))


def test_diagnose__never_started(run: Path):
    found = diagnose_run("photo", storage=str(run.parent))
    [finding] = found.findings
    assert (found.state, finding.status) == ("never started", "fail")
    assert "mimray pretrain … --name photo" in finding.cure
    assert "there are: photos" in finding.cure

    (run.parent / "sweep").mkdir()
    (run.parent / "sweep/sweep.json").write_text("{}")
    [finding] = diagnose_run("sweep", storage=str(run.parent)).findings
    assert "--run sweep/trials/0000" in finding.cure


def test_diagnose__nobody_is_asked_where_the_launch_has_ended(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    launched(run, status="KILLED", reason="stopped as asked after step 4 of 9")
    monkeypatch.setattr(doctor_run, "_standing", pytest.fail)
    found = diagnose_run("photos", storage=str(run.parent))
    assert found.state == "stopped"
    assert "stopped as asked after step 4 of 9" in found.findings[0].detail


def test_diagnose__a_ray_of_this_machine_that_is_gone_is_an_answer(run: Path):
    launched(run)
    assert diagnose_run("photos", storage=str(run.parent)).state == "stopped"


@pytest.mark.parametrize("launch", [{"host": "elsewhere"}, None])
def test_diagnose__is_not_known_where_nothing_answers(
    run: Path, monkeypatch: pytest.MonkeyPatch, launch: dict[str, str] | None
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if launch is not None:
        launched(run, **launch)
    found = diagnose_run("photos", storage=str(run.parent))
    assert found.state == "unknown"
    assert "Connection refused" in found.findings[0].detail or launch is None


def test_diagnose__counts_hangs_and_not_their_stacks(run: Path):
    launched(run)
    (run / "hang.log").write_text(
        "Sat Nov 28 02:11:16 2026: rank 1 (process 3 on b, update 4 of this start) has made no "
        "step for 9 s, the slowest so far took 1.0 s\n\n"
        "rank 0 (process 2 on a, update 4 of this start)\nthread main\n\n"
        "Sun Nov  1 12:11:16 2026: rank 0 (process 2 on a, starting) has given no sign of life\n"
    )
    hangs = by_name(diagnose_run("photos", storage=str(run.parent)))["hangs"]
    assert hangs.detail == (
        "2 so far, the last one Sun Nov  1 12:11:16 2026: rank 0 (process 2 on a, starting) has "
        "given no sign of life"
    )


def test_command__a_damaged_plan_fails_with_its_cure(run: Path):
    (run / "plan.json").write_text("{")
    arguments = ["doctor", "--run", "photos", "--storage", str(run.parent)]
    done = CliRunner().invoke(cli, [*arguments, "--json"])
    assert done.exit_code == 2
    told = json.loads(done.stdout)
    assert (told["state"], told["findings"][0]["status"]) == ("damaged", "fail")
    assert "plan.json is not JSON" in told["findings"][0]["detail"]
    assert "fail  run  damaged" in CliRunner().invoke(cli, arguments).stdout
