"""A sweep as it runs: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mimray.service.terminal.progress import Pace, Progress
from mimray.trainers.evaluation.uncertainty import figure_text

if TYPE_CHECKING:
    from mimray.tuning.plan import SweepPlan
    from mimray.tuning.record import SweepRecord, TrialRecord

_SHOWN_TRIALS = 24
_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "stopped": "bright_black"}


class SweepTable:
    """A live table of trials on a terminal; elsewhere a line for each score, and now and then.

    Args:
        progress: the display.
        plan: the sweep's plan.
    """

    def __init__(self, progress: Progress, plan: SweepPlan) -> None:
        from mimray.tuning.space import num_trials

        self._progress, self._plan = progress, plan
        self._total = num_trials(plan.config)
        self._told: set[tuple[int, int]] = set()
        self._pace = Pace()

    def __call__(
        self, record: SweepRecord, rows: dict[int, dict[str, Any]], notes: list[str]
    ) -> None:
        """Show the sweep as it stands.

        Args:
            record: the sweep's record.
            rows: the newest row of metrics of each trial, by number.
            notes: warnings since the last call.
        """
        for note in notes:
            self._progress.warn(note)
        summary = self._summary(record, self._left(record, rows))
        if self._progress.live:
            self._progress.view(Group(self._table(record, rows), Text(summary)))
            return
        for trial in record.trials:
            for rung in trial.rungs:
                if (trial.number, rung.number) not in self._told:
                    self._told.add((trial.number, rung.number))
                    shown = " ".join(f"{k.split('.')[-1]}={v}" for k, v in trial.params.items())
                    self._progress.line(
                        f"trial {trial.name} {shown}: {record.metric} "
                        f"{figure_text(rung.score, rung.standard_error)} after "
                        f"{rung.samples:,} pictures",
                        trial.name,
                        at_once=True,
                    )
        self._progress.line(summary)

    def _summary(self, record: SweepRecord, left: str) -> str:
        searched = [t for t in record.trials if t.repeats is None]
        done = sum(t.state in ("finished", "stopped", "failed") for t in searched)
        repeats = len(record.trials) - len(searched)
        again = f", {repeats} with other seeds" if repeats else ""
        running = sum(t.state == "running" for t in record.trials)
        best = record.best
        shown = "" if best is None else f", best {record.metric} {_figure(best)} ({best.name})"
        summary = f"{done}/{self._total} trials done{again}, {running} running{shown}"
        return f"{summary}  {left}" if left else summary

    def _left(self, record: SweepRecord, rows: dict[int, dict[str, Any]]) -> str:
        """Time left, if every trial ran to its end: stopped ones bring it nearer."""
        whole = self._plan.rung_samples[-1]
        seen = {t.number: max(t.samples, rows.get(t.number, {}).get("samples", 0))
                for t in record.trials}  # fmt: skip
        ended = sum(t.state in ("finished", "stopped", "failed") for t in record.trials)
        open_ = sum(whole - seen[t.number] for t in record.trials if t.state == "running")
        waiting = max(0, (self._total or 0) - ended - sum(
            t.state == "running" for t in record.trials))  # fmt: skip
        if ended:
            each = sum(t.samples for t in record.trials if t.state in ("finished", "stopped"))
            open_ += int(waiting * each / ended)
        else:
            open_ += waiting * whole
        samples = sum(seen.values())
        self._pace.report(samples)
        left = self._pace.left(samples + open_)
        return f"about {left}" if left else ""

    def _table(self, record: SweepRecord, rows: dict[int, dict[str, Any]]) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("trial")
        for key in record.keys:
            table.add_column(key.rpartition(".")[2], justify="right")
        for heading in ("rung", "pictures", "loss", record.metric, "device-s"):
            table.add_column(heading, justify="right")
        table.add_column("")
        best = record.best
        running = [t for t in record.trials if t.state == "running"]
        others = [t for t in record.ranked() if t.state != "running"]
        failed = [t for t in record.trials if t.state == "failed"]
        shown = [*running, *others, *failed][:_SHOWN_TRIALS]
        for trial in shown:
            row = rows.get(trial.number, {})
            loss = row.get("loss", trial.loss)
            table.add_row(
                trial.name,
                *(_short(trial.params.get(key)) for key in record.keys),
                f"{len(trial.rungs)}/{len(record.rung_samples)}",
                f"{max(trial.samples, row.get('samples', 0)):,}",
                "" if loss is None else f"{loss:.4f}",
                _figure(trial),
                f"{trial.device_seconds:.0f}",
                "best" if best is trial else trial.reason[:60] if trial.state == "failed"
                else trial.state,
                style=_COLOURS.get(trial.state, ""),
            )  # fmt: skip
        return table


def _figure(trial: TrialRecord) -> str:
    """A trial's newest score with its standard error; empty before the first."""
    if not trial.rungs:
        return ""
    return figure_text(trial.rungs[-1].score, trial.rungs[-1].standard_error)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
