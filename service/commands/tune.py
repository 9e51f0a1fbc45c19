"""`mimray tune`: a sweep, checked, shown and reported."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.service.terminal.console import say, warn
from mimray.service.terminal.progress import Progress, duration
from mimray.service.terminal.sweep_table import SweepTable
from mimray.trainers.cluster import connected
from mimray.trainers.errors import ConfigError, MimrayError

if TYPE_CHECKING:
    from mimray.tuning.plan import SweepPlan
    from mimray.tuning.record import SweepRecord, TrialRecord


REPORT_EVERY_S = 15.0


@dataclass(frozen=True)
class TuneRequest:
    """The sweep that the user asked for.

    Attributes:
        sweep: a shipped sweep's name, or the path of one; None with `resume`.
        data: the path or URI of the pictures to train on; None with `resume`.
        name: the sweep's name; the file's by default.
        storage: the directory or URI of all runs and sweeps.
        overrides: assignments `a.b=value` to keys of the sweep.
        concurrent: trials at once; as many as fit by default.
        resume: the name of the sweep to go on with as it was begun.
        fresh: delete what an earlier sweep of this name left.
        command: the command line, for the record.
    """

    sweep: str | None
    data: str | None
    name: str | None
    storage: str
    overrides: tuple[str, ...]
    concurrent: int | None
    resume: str | None
    fresh: bool
    command: str


def shipped() -> dict[str, dict[str, Any] | None]:
    """The `about` of each shipped sweep, by name; None where it has none."""
    from mimray.tuning.plan import load_sweep, shipped_sweeps

    abouts = {name: load_sweep(name).about for name in shipped_sweeps()}
    return {name: about.model_dump() if about else None for name, about in abouts.items()}


def listing(abouts: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Two lines a sweep: its name and summary, its command."""
    lines = []
    for name, about in abouts.items():
        lines.append(f"{name}  {about['summary'] if about else ''}")
        if about:
            lines.append(f"{'':{len(name)}}  {about['command']}")
    return "\n".join(lines)


def run_tune(request: TuneRequest) -> dict[str, Any]:
    """Check everything that can be checked, then search; continues what is there.

    Returns:
        What `--json` prints.

    Raises:
        MimrayError: a mistake of the user's, before a worker starts.
    """
    plan = _plan(request)

    from mimray.tuning.record import curves
    from mimray.tuning.report import write_report
    from mimray.tuning.sweep import Launch, before, run_sweep

    launch = Launch(
        plan, request.storage, request.concurrent, request.fresh, cache_mib=_cache_mib(plan)
    )
    earlier = before(launch)
    _announce(plan, earlier)
    began = time.monotonic()
    with connected(), Progress() as progress:
        table = SweepTable(progress, plan)
        _say_capacity(launch)
        with _Reports(plan) as reports:

            def on_progress(record: SweepRecord, rows: dict[int, Any], notes: list[str]) -> None:
                table(record, rows, notes)
                reports(record)

            final = run_sweep(launch, on_progress)
    if final.ended:
        say("timing the encoder at each mask ratio, for the report")
    files = write_report(
        final,
        plan.directory,
        curves={trial.number: curves(plan.directory, trial.number) for trial in final.trials},
        speed=_speed(plan) if final.ended else None,
    )
    _release(plan)
    took = duration(time.monotonic() - began)
    _print_end(final, took, files, request.storage)
    best = final.best
    return {
        "sweep": final.uri,
        "ended": final.ended,
        "interrupted": _interrupted(final, plan),
        "metric": final.metric,
        "proxy": final.proxy,
        "best": None if best is None else _row(final, best),
        "final": None if final.reported is None else final.reported.model_dump(),
        "trials": [_row(final, trial) for trial in final.trials],
        "study": list(final.study),
        "report": files,
        "seconds": round(final.elapsed_s, 1),
    }


def _plan(request: TuneRequest) -> SweepPlan:
    from mimray.trainers.config.names import check_name
    from mimray.trainers.storage import RunDir
    from mimray.tuning.plan import load_sweep, make_plan, remembered
    from mimray.tuning.record import read_record

    if request.resume is None:
        if request.sweep is None or request.data is None:
            raise ConfigError("a sweep and --data are needed", hint="or --resume NAME")
        return make_plan(
            load_sweep(request.sweep, request.overrides),
            data=request.data,
            name=request.name or Path(request.sweep).stem,
            storage=request.storage,
            command=request.command,
        )
    if request.sweep is not None or request.overrides or request.data is not None:
        raise ConfigError(
            "--resume goes on with a sweep as it was started",
            hint="to give it a larger budget, repeat the whole command with another --set budget.…",
        )
    name = request.name or request.resume
    check_name("sweep", name)
    directory = RunDir(request.storage) / name
    record = read_record(directory)
    return make_plan(
        remembered(directory, record),
        data=record.data,
        name=record.name,
        storage=request.storage,
        command=record.command,
    )


def _announce(plan: SweepPlan, earlier: SweepRecord | None) -> None:
    from mimray.tuning.record import ENDED
    from mimray.tuning.space import num_trials

    config = plan.config
    count = num_trials(config)
    rungs = ", ".join(f"{samples:,}" for samples in plan.rung_samples)
    say(
        f"{plan.uri}: {count} trials of {config.base.recipe} on {plan.facts.num_samples} pictures, "
        f"scored by {config.score.task} after {rungs} pictures; searcher {config.searcher.name}, "
        f"scheduler {config.scheduler.name}"
    )
    for line in plan.methods_text():
        say(line)
    if earlier is not None:
        done = sum(trial.state in ENDED for trial in earlier.trials)
        say(f"goes on: {done} trials are done, {len(earlier.trials) - done} were under way")


def _say_capacity(launch: Any) -> None:
    from mimray.tuning.capacity import count
    from mimray.tuning.space import num_trials

    config = launch.plan.config
    capacity = count(config.resources, num_trials(config), launch.concurrent)
    say(capacity.arithmetic)


def _cache_mib(plan: SweepPlan) -> int:
    """The bound of the shared decoded pictures, MiB: their size where it fits, else 0."""
    import psutil

    from mimray.trainers.data.decoded import decoded_bytes
    from mimray.trainers.data.selection import open_training

    needed = decoded_bytes(open_training(plan.facts.uri, plan.bases.recipe({})))
    room = psutil.virtual_memory().available // 4
    mib = -(-needed // 2**20) + 1
    if needed > room:
        say(
            f"decoded, the pictures take {mib} MiB, more than a quarter of the free memory: "
            "each trial decodes its own"
        )
        return 0
    return mib


def _release(plan: SweepPlan) -> None:
    from mimray.trainers.data.decoded import release

    release(plan.facts.fingerprint)


def _speed(plan: SweepPlan) -> dict[float, float] | None:
    """The encoder's speed over the full sequence at each searched mask ratio, measured here."""
    from mimray.tuning.config import Choice, Grid
    from mimray.tuning.report.speed import encoder_speed
    from mimray.tuning.report.values import is_number

    domain = plan.config.space.get("method.mask_ratio")
    recipe = plan.bases.recipe({})
    if recipe.method.name != "mae" or not isinstance(domain, Grid | Choice):
        return None
    values = domain.grid if isinstance(domain, Grid) else domain.choice
    return encoder_speed(recipe, [float(value) for value in values if is_number(value)])


def _interrupted(record: SweepRecord, plan: SweepPlan) -> bool:
    """True if the sweep was ended by hand before its budget."""
    hours = plan.config.budget.hours
    in_time = hours is None or record.elapsed_s < hours * 3600
    return in_time and any(trial.state == "cut" for trial in record.trials)


def _row(record: SweepRecord, trial: TrialRecord) -> dict[str, Any]:
    return {
        "trial": trial.name,
        "params": trial.params,
        "state": trial.state,
        "score": trial.score,
        "standard_error": trial.rungs[-1].standard_error if trial.rungs else None,
        "num_pictures": trial.rungs[-1].num_pictures if trial.rungs else None,
        "other_seeds": record.repeated(trial.number),
        "rung": len(trial.rungs),
        "samples": trial.samples,
        "device_seconds": round(trial.device_seconds, 1),
        "failures": trial.failures,
        "reason": trial.reason,
    }


def _print_end(record: SweepRecord, took: str, files: Sequence[str], storage: str) -> None:
    from mimray.tuning.report.summary import summarise
    from mimray.tuning.report.tables import chosen_text, final_text, seeds_text

    states: dict[str, int] = {}
    for trial in record.trials:
        states[trial.state] = states.get(trial.state, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    say(f"{record.name}: {counted}; {took}")
    if record.proxy:
        say(f"note: {record.proxy}", style="yellow")
    best = record.best
    if best is not None:
        shown = ", ".join(f"{key}={value}" for key, value in best.params.items())
        summary = summarise(record)
        say(f"best: trial {best.name}, {shown}: {record.metric} {chosen_text(summary)}")
        if summary.seeds:
            say(f"other seeds: {seeds_text(summary, best.number)}")
        if summary.record.final is not None:
            say(f"report: {record.metric} {final_text(summary)}")
        if summary.tied:
            names = ", ".join(trial.name for trial in summary.tied)
            say(f"not told apart from it: {names}", style="yellow")
    say("\n".join(files))
    name = shlex.quote(record.name)
    where = "" if storage == "runs" else f" --storage {shlex.quote(storage)}"
    if not record.ended:
        say(f"not at its end: mimray tune --resume {name}{where}", style="yellow")
    say(
        f"promote: mimray models register {name}:best --name MODEL --alias champion{where}\n"
        f"look:    mimray ui --sweep {name}{where}"
    )


class _Reports:
    """A thread that writes the report again after each new score."""

    def __init__(self, plan: SweepPlan) -> None:
        self._plan = plan
        self._wanted = threading.Event()
        self._over = threading.Event()
        self._record: SweepRecord | None = None
        self._seen = -1
        self._thread = threading.Thread(target=self._write, daemon=True)

    def __enter__(self) -> _Reports:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._wanted.set()
        self._thread.join()

    def __call__(self, record: SweepRecord) -> None:
        """Write a report of this record soon, if it has a new score."""
        version = sum(len(trial.rungs) + (trial.state == "failed") for trial in record.trials)
        if version != self._seen:
            self._seen, self._record = version, record
            self._wanted.set()

    def _write(self) -> None:
        from mimray.tuning.report import write_report

        while not self._over.is_set():
            self._wanted.wait()
            self._wanted.clear()
            if self._record is not None and not self._over.is_set():
                try:
                    write_report(self._record, self._plan.directory)
                except MimrayError as error:
                    warn(f"no report: {error}")
                self._over.wait(REPORT_EVERY_S)
