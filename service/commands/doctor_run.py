"""`mimray doctor --run`: where a run stands, and each of its workers."""

from __future__ import annotations

import difflib
import json
import os
import re
import shlex
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mimray.service.commands.doctor import Finding
from mimray.service.terminal.progress import duration
from mimray.trainers.cluster import connected, unreachable
from mimray.trainers.environment.network import is_loopback
from mimray.trainers.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from mimray.trainers.lifeline import Heartbeat
    from mimray.trainers.recorder import Launch, Standing
    from mimray.trainers.storage import RunDir

State = Literal[
    "never started", "starting", "running", "hung", "stopped", "finished", "damaged", "unknown"
]

ANSWER_TIMEOUT_S = 20.0
QUIET_S = 10.0
LONG_START_S = 300.0
# A line that the recorder begins each account with: the time, and its reason.
_HANG = re.compile(r"^\w{3} \w{3} [ \d]\d [\d:]{8} \d{4}: rank .*", re.M)


@dataclass(frozen=True)
class Traces:
    """The state of a run as its directory tells it.

    Attributes:
        run: the directory.
        steps: the run's length, in updates.
        row: the newest row of metrics; empty without one.
        num_rows: the number of rows.
        damages: the damage of each checkpoint by name, newest first; empty where it is whole.
        exported: True if there is a bundle.
        launch: the newest launch, if the directory tells of one.
        hangs: a line for each time that a worker hung, oldest first.
        now: the time of all this, seconds since 1970.
    """

    run: str
    steps: int
    row: dict[str, Any]
    num_rows: int
    damages: dict[str, str]
    exported: bool
    launch: Launch | None
    hangs: list[str]
    now: float

    @property
    def step(self) -> int:
        """Updates made, as far as the metrics tell."""
        return int(self.row.get("step", 0))

    @property
    def resumes_from(self) -> int | None:
        """The step that the next launch goes on from; None if it could load no checkpoint."""
        whole = [name for name, damage in self.damages.items() if not damage]
        if whole:
            return int(whole[0].removeprefix("step-"))
        return None if self.damages else 0

    @property
    def again(self) -> str:
        """The command that goes on with the run."""
        words = shlex.split(self.launch.command) if self.launch is not None else []
        # What started the run over once must not do so again.
        command = shlex.join(word for word in words if word != "--fresh")
        return f"`{command}`" if command else "the same command"


@dataclass(frozen=True)
class Answer:
    """The result of asking for a run's recorder.

    Attributes:
        standing: what the recorder says; None if there is none.
        problem: the reason why it is not known whether there is one; empty if it is known.
    """

    standing: Standing | None = None
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Where a run stands.

    Attributes:
        run: the run's directory.
        state: its state in a word.
        step: updates made.
        steps: the run's length, in updates.
        resumes_from: the step that the next launch goes on from; None if it could not, or need not.
        workers: the last heartbeat of each worker, and seconds since it was heard.
        findings: all of it for people, with cures.
    """

    run: str
    state: State
    step: int = 0
    steps: int = 0
    resumes_from: int | None = None
    workers: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def as_json(self) -> str:
        """The diagnosis as a JSON object."""
        return json.dumps(asdict(self), indent=2)


def diagnose_run(name: str, *, storage: str = "runs", address: str | None = None) -> Diagnosis:
    """Find out where a run stands, from its directory and from its recorder if it is under way.

    Args:
        name: the run's name, or the path of one below the storage.
        storage: the directory or `pyarrow.fs` URI of runs.
        address: the address of the cluster to ask; None for the one that the run was launched on,
            then RAY_ADDRESS.

    Raises:
        StorageError: the storage cannot be read.
    """
    from mimray.trainers.config.run import parse_plan
    from mimray.trainers.recorder import read_launch
    from mimray.trainers.storage import RunDir

    run = RunDir(storage) / name
    if not run.exists("plan.json"):
        return _never_started(RunDir(storage), name)
    try:
        steps = parse_plan(
            run.read("plan.json"), f"{run}/plan.json", "use the mimray that wrote it"
        ).steps
    except ConfigError as error:
        finding = Finding("run", "fail", f"damaged: {error.args[0]}", error.hint)
        return Diagnosis(str(run), "damaged", findings=[finding])
    # Asked before the directory is read: a run that ends in between has left all there.
    answer = _ask(read_launch(run), address)
    return judge(_traces(run, steps), answer)


def judge(traces: Traces, answer: Answer) -> Diagnosis:
    """A run's state and findings, from its directory and its recorder."""
    standing, state = answer.standing, _state(traces, answer)
    findings, workers = [_run_finding(state, traces, answer)], list[dict[str, Any]]()
    if standing is not None:
        workers = [_worker(standing, beat, silent_s) for beat, silent_s in standing.workers]
        findings += [_worker_finding(standing, *heard) for heard in standing.workers]
    findings += [*_checkpoint_findings(traces), _metrics_finding(traces)]
    if traces.launch is not None:
        findings.append(_launch_finding(traces.launch, traces.now))
    if traces.hangs:
        findings.append(_hang_finding(traces, state))
    return Diagnosis(
        traces.run,
        state,
        _step(traces, answer),
        traces.steps,
        None if state == "finished" else traces.resumes_from,
        workers,
        findings,
    )


def _traces(run: RunDir, steps: int) -> Traces:
    from mimray.trainers.bundles import CARD
    from mimray.trainers.engine.checkpoints import damages
    from mimray.trainers.engine.metrics import read_metrics
    from mimray.trainers.recorder import HANG_LOG, read_launch

    rows = read_metrics(run)
    log = run.read(HANG_LOG).decode(errors="replace") if run.exists(HANG_LOG) else ""
    return Traces(
        run=str(run),
        steps=steps,
        row=rows[-1] if rows else {},
        num_rows=len(rows),
        damages=damages(run),
        exported=run.exists(f"bundle/{CARD}"),
        launch=read_launch(run),
        hangs=_HANG.findall(log),
        now=time.time(),
    )


def _ask(launch: Launch | None, address: str | None) -> Answer:
    """Ask the recorder of a run's newest launch."""
    if launch is None:
        return Answer(problem="nothing in its directory tells where it was launched")
    if launch.status:
        return Answer()
    places = [address] if address else [launch.address, os.environ.get("RAY_ADDRESS")]
    problems = []
    for place in dict.fromkeys(filter(None, places)):
        reason = unreachable(place)
        if reason and place == launch.address and launch.host == socket.gethostname():
            return Answer()  # it was launched on a Ray of this machine, which is gone
        try:
            if reason:
                raise ResourceError(reason)
            return Answer(_standing(launch, place))
        except ResourceError as error:
            problems.append(f"{place}: {error.args[0]}")
    return Answer(problem="; ".join(problems))


def _standing(launch: Launch, address: str) -> Standing | None:
    """Ask for a launch's recorder at a cluster; None if it has none.

    Raises:
        ResourceError: the cluster cannot be joined, or the recorder does not answer.
    """
    from mimray.trainers.recorder import NAMESPACE

    ours = address == launch.address and is_loopback(address.rpartition(":")[0])
    with connected(address, own=ours and launch.host == socket.gethostname()):
        import ray

        try:
            recorder = ray.get_actor(launch.launch_id, namespace=NAMESPACE)
            standing: Standing = ray.get(recorder.standing.remote(), timeout=ANSWER_TIMEOUT_S)
        except (ValueError, ray.exceptions.RayActorError):  # none of this name, or it is gone
            return None
        except ray.exceptions.GetTimeoutError:
            raise ResourceError(f"its recorder gives no answer in {ANSWER_TIMEOUT_S:g} s") from None
        return standing


def _state(traces: Traces, answer: Answer) -> State:
    if answer.standing is not None:
        if answer.standing.hung:
            return "hung"
        return "starting" if answer.standing.state.started_at is None else "running"
    if traces.exported and traces.step >= traces.steps:
        return "finished"
    if traces.resumes_from is None:
        return "damaged"
    return "unknown" if answer.problem else "stopped"


def _step(traces: Traces, answer: Answer) -> int:
    if answer.standing is None:
        return traces.step
    state = answer.standing.state
    return max(int(state.row.get("step", 0)), state.started_at or 0)


def _run_finding(state: State, traces: Traces, answer: Answer) -> Finding:
    step = _step(traces, answer)
    at = f"step {step} of {traces.steps}"
    goes_on = f"{traces.again} goes on from step {traces.resumes_from}"
    if answer.standing is not None:
        return _live_finding(state, at, traces, answer.standing)
    if state == "finished":
        return Finding("run", "ok", f"finished: {at}; bundle in {traces.run}/bundle")
    if state == "damaged":
        return Finding(
            "run",
            "fail",
            f"damaged: {at}, and none of {len(traces.damages)} checkpoints can be loaded",
            f"restore {traces.run}/checkpoints from a backup, go on with the mimray that wrote "
            "them, or start over with --fresh",
        )
    if state == "unknown":
        return Finding(
            "run",
            "warn",
            f"unknown: {at}{_age(traces)}, and its cluster was not asked: {answer.problem}",
            "ask on the machine that launched it, or name its cluster by --address; if it is not "
            f"under way, {goes_on}",
        )
    launch = traces.launch
    if launch is None or not launch.status:
        reason = "its driver was killed, no end is recorded"
    else:
        reason = launch.reason or "it ended"
    hint = launch.cure if launch is not None and launch.status == "FAILED" else ""
    cure = f"{hint}; {goes_on}" if hint else goes_on
    return Finding("run", "warn", f"stopped: {at}{_age(traces)}: {reason}", cure)


def _live_finding(state: State, at: str, traces: Traces, standing: Standing) -> Finding:
    told = standing.state
    if state == "hung":
        return Finding(
            "run",
            "fail",
            f"hung: {at}: {standing.hung}",
            "its driver ends all workers within seconds, and they start again from step "
            f"{traces.resumes_from or 0}; the stacks of each are in {traces.run}/hang.log",
        )
    if state == "starting":
        waited_s = traces.now - traces.launch.began if traces.launch is not None else 0.0
        detail = f"starting for {duration(waited_s)}: no worker has begun to train"
        if waited_s < LONG_START_S:
            return Finding("run", "ok", detail)
        return Finding("run", "warn", detail, "`ray status` tells what it waits for")
    parts = [f"running: {at}", f"{told.workers} worker{'' if told.workers == 1 else 's'}"]
    if told.attempts > 1:
        parts.append(f"start {told.attempts} of this launch")
    if told.row.get("images_per_s"):
        each_s = told.row["samples"] / told.row["step"] / told.row["images_per_s"]
        left_s = (traces.steps - told.row["step"]) * each_s
        parts.append(f"{told.row['images_per_s']:.0f} pictures/s, about {duration(left_s)} to go")
    if told.phase:
        parts.append(told.phase)
    if told.stopping:
        parts.append(f"asked to stop by {told.stopping}")
    return Finding("run", "ok", ", ".join(parts))


def _worker(standing: Standing, beat: Heartbeat, silent_s: float) -> dict[str, Any]:
    begun = standing.state.started_at
    return {
        "rank": beat.rank,
        "host": beat.host,
        "node_id": beat.node_id,
        "pid": beat.pid,
        "update": begun + beat.steps if begun is not None and beat.steps else None,
        "since_s": round(beat.since_s + silent_s, 1),
        "slowest_s": round(beat.slowest_s, 1),
        "pause": beat.pause,
        "silent_s": round(silent_s, 1),
    }


def _worker_finding(standing: Standing, beat: Heartbeat, silent_s: float) -> Finding:
    facts = _worker(standing, beat, silent_s)
    if facts["update"] is None:
        doing = f"starting for {facts['since_s']:g} s"
    elif beat.pause:
        doing = f"{beat.pause} after update {facts['update']}, begun {facts['since_s']:g} s ago"
    else:
        doing = f"update {facts['update']}, begun {facts['since_s']:g} s ago"
    if beat.slowest_s:
        doing += f" (the slowest took {facts['slowest_s']:g} s)"
    detail = f"{doing}; process {beat.pid} on {beat.host}, node {beat.node_id[:6]}"
    name = f"rank {beat.rank}"
    if standing.hung.startswith(f"{name} "):
        return Finding(name, "fail", detail, f"look at {beat.host}: memory, disk, network, GPU")
    if silent_s < QUIET_S:
        return Finding(name, "ok", detail)
    return Finding(
        name,
        "warn",
        f"{detail}; no heartbeat for {silent_s:.0f} s",
        "it is lost and will be started again, or counts as hung after resources.hang_timeout_s",
    )


def _checkpoint_findings(traces: Traces) -> list[Finding]:
    """One on the checkpoints that are whole, and one on each that is damaged."""
    whole = [name for name, damage in traces.damages.items() if not damage]
    findings = [
        Finding(
            "checkpoint",
            "warn" if whole else "fail",
            f"{name} is damaged: {damage}",
            f"nothing, it is passed over for {whole[0]}; look after the disk" if whole
            else "restore it from a backup",
        )
        for name, damage in traces.damages.items()
        if damage
    ]  # fmt: skip
    if whole:
        older = f", and {len(whole) - 1} before it" if len(whole) > 1 else ""
        findings.insert(0, Finding("checkpoints", "ok", f"{whole[0]} is whole{older}"))
    if not traces.damages:
        findings.append(Finding("checkpoints", "ok", "none yet"))
    return findings


def _metrics_finding(traces: Traces) -> Finding:
    if not traces.row:
        return Finding("metrics", "ok", "no row yet")
    loss = f", loss {traces.row['loss']:.4f}" if "loss" in traces.row else ""
    return Finding(
        "metrics", "ok", f"{traces.num_rows} rows to step {traces.step}{loss}{_age(traces)}"
    )


def _age(traces: Traces) -> str:
    """`, 3 s ago`: the time since the newest row."""
    time_s = traces.row.get("time")
    return f", {duration(max(0.0, traces.now - time_s))} ago" if time_s else ""


def _launch_finding(launch: Launch, now: float) -> Finding:
    ago = duration(max(0.0, now - launch.began))
    by = f" by `{launch.command}`" if launch.command else ""
    end = f", which ended as {launch.status}" if launch.status else ""
    return Finding("launch", "ok", f"{ago} ago on {launch.host}, Ray at {launch.address}{by}{end}")


def _hang_finding(traces: Traces, state: State) -> Finding:
    number = len(traces.hangs)
    return Finding(
        "hangs",
        "ok" if state == "finished" else "warn",
        f"{number} so far, the last one {traces.hangs[-1]}",
        "" if state == "finished" else f"the stacks of each worker are in {traces.run}/hang.log",
    )


def _never_started(storage: RunDir, name: str) -> Diagnosis:
    """The diagnosis of a name under which there is no run."""
    from mimray.tuning.record import SWEEP

    run = storage / name
    if run.exists(SWEEP):
        detail, cure = "a sweep and no run", f"--run {name}/trials/0000 asks for one of its trials"
    elif run.exists():
        detail, cure = f"never started: {run} has no plan.json", "the command that was to start it"
    else:
        others = storage.folders()
        near = difflib.get_close_matches(name, others, n=3) or others[:5]
        detail = f"never started: there is no {run}"
        cure = f"`mimray pretrain … --name {name}` starts it"
        if near:
            cure += f"; there are: {', '.join(near)}"
    return Diagnosis(str(run), "never started", findings=[Finding("run", "fail", detail, cure)])
