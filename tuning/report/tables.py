"""The tables of a report as text, for page and Markdown alike."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from mimray.trainers.data.files import join, parent
from mimray.trainers.evaluation.uncertainty import Difference, described
from mimray.tuning.config import METHOD, SweepConfig
from mimray.tuning.record import SweepRecord, TrialRecord
from mimray.tuning.report.summary import Cell, Heatmap, SweepSummary, rungs_of
from mimray.tuning.report.values import duration, params_text, score_text, short_names, shown

MAX_ROWS = 100
LONG_CELL_CHARS = 24


class Table(NamedTuple):
    """Cells as text.

    Attributes:
        title: the table's title.
        head: the columns' headings.
        rows: the rows' cells, of which the first names the row.
        numeric: the columns whose cells are numbers.
    """

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numeric: frozenset[int] = frozenset()

    @property
    def long(self) -> frozenset[int]:
        """Columns with a cell so long that it is broken into lines."""
        return frozenset(
            column
            for row in self.rows
            for column, text in enumerate(row)
            if len(text) > LONG_CELL_CHARS
        )


def leaderboard(summary: SweepSummary) -> Table:
    """Trials in the order of their rank.

    Args:
        summary: the sweep's summary.
    """
    names = short_names(summary.record.keys)
    # Records of earlier versions know neither errors nor numbers of pictures.
    known = any(trial.rungs[-1].num_pictures is not None for trial in summary.ranked)
    head = (
        "rank",
        "trial",
        *names.values(),
        "rung",
        "samples",
        "score",
        *(("on pictures", "less the best") if known else ()),
        *(("other seeds",) if summary.seeds else ()),
        "loss",
        "device-s",
        "state",
    )
    rows = [
        (
            str(rank),
            str(trial.number),
            *(shown(trial.params.get(key)) for key in names),
            f"{rungs_of(trial)}/{summary.rungs}",
            f"{trial.rungs[-1].samples:,}",
            score_text(trial.score, trial.rungs[-1].standard_error),
            *((count_text(trial), less_text(summary, trial.number)) if known else ()),
            *((seeds_text(summary, trial.number),) if summary.seeds else ()),
            score_text(trial.loss),
            f"{trial.device_seconds:,.0f}",
            trial.state,
        )
        for rank, trial in enumerate(summary.ranked[:MAX_ROWS], start=1)
    ]
    texts = {"less the best", "state"}
    numeric = frozenset(i for i, name in enumerate(head) if name not in texts)
    return Table("Leaderboard", head, rows, numeric)


def count_text(trial: TrialRecord) -> str:
    """The number of pictures that a trial's last score is of; a dash where it is not known."""
    count = trial.rungs[-1].num_pictures
    return "–" if count is None else f"{count:,}"


def less_text(summary: SweepSummary, number: int) -> str:
    """A trial's score less the best one's, with the verdict; empty at another rung.

    Args:
        summary: the sweep's summary.
        number: the trial's number.
    """
    found = summary.against.get(number)
    if found is None:
        return "the best" if summary.best and summary.best.number == number else ""
    return Difference(**found.model_dump()).text()


def seeds_text(summary: SweepSummary, number: int) -> str:
    """The mean and the standard deviation of a trial's repeats; empty without any.

    Args:
        summary: the sweep's summary.
        number: the trial's number.
    """
    found = summary.seeds.get(number)
    if found is None:
        return ""
    spread = "" if found.deviation is None else f", sd {score_text(found.deviation)}"
    return f"{score_text(found.mean)}{spread} ({len(found.scores)})"


def final_text(summary: SweepSummary) -> str:
    """The winner's score on pictures kept from the choice; empty before it is known."""
    final = summary.record.final
    if final is None:
        return ""
    count = f" on {final.num_val:,} pictures kept from the choice: {final.place}"
    return score_text(final.headline, final.standard_error) + count


def chosen_text(summary: SweepSummary) -> str:
    """The figure that the best trial was chosen by; empty before there is one."""
    return "" if summary.chosen_by is None else described(summary.chosen_by)


def heatmap_table(heatmap: Heatmap) -> Table:
    """The heatmap as a table.

    Args:
        heatmap: the scores over two keys.
    """
    names = short_names(heatmap.keys)
    across, down = (names[key] for key in heatmap.keys)
    rows = [
        (shown(row), *(cell_text(cell, heatmap.rungs) for cell in cells))
        for row, cells in zip(heatmap.rows, heatmap.cells, strict=True)
    ]
    head = (f"{down} \\ {across}", *map(shown, heatmap.columns))
    return Table(f"Score by {across} and {down}", head, rows, frozenset(range(1, len(head))))


def cell_text(cell: Cell | None, rungs: int, *, gap: str = " ") -> str:
    """A square's score, and the rung that an unfinished trial reached.

    Args:
        cell: the square; None where no trial has a score.
        rungs: rungs of a whole trial.
        gap: the text between score and rung.
    """
    if cell is None:
        return ""
    part = f"{gap}▸{cell.rungs}/{rungs}" if cell.rungs < rungs else ""
    if cell.standard_error is not None:
        return f"{score_text(cell.score)}{gap}± {score_text(cell.standard_error)}{part}"
    return score_text(cell.score) + part


def front_table(summary: SweepSummary, cost: str, title: str) -> Table:
    """The trials on a Pareto front.

    Args:
        summary: the sweep's summary.
        cost: `samples` or `device_seconds`.
        title: the table's title.
    """
    names = short_names(summary.record.keys)
    unit = "samples" if cost == "samples" else "device-s"
    rows = [
        (
            str(point.trial),
            params_text(summary.trial(point.trial).params, names),
            f"{point.rung + 1}/{summary.rungs}",
            f"{getattr(point, cost):,.0f}",
            score_text(point.score, point.standard_error),
        )
        for point in summary.fronts[cost]
    ]
    return Table(title, ("trial", "tried", "rung", unit, "score"), rows, frozenset({0, 2, 3, 4}))


def importance_table(summary: SweepSummary) -> Table:
    """Shares of the score's variance by key.

    Args:
        summary: the sweep's summary.
    """
    rows = [(key, f"{share:.1%}") for key, share in summary.importance.shares.items()]
    return Table("Importance of the keys", ("key", "share"), rows, frozenset({1}))


def speed_table(summary: SweepSummary) -> Table:
    """The encoder's speed over the full sequence.

    Args:
        summary: the sweep's summary.
    """
    head = ("mask ratio", "measured", "bound by tokens", "often quoted")
    rows = [
        (
            f"{row.mask_ratio:.4g}",
            _times(row.measured),
            _times(row.bound),
            _times(row.quoted, digits=0),
        )
        for row in summary.speed
    ]
    return Table("Encoder, times faster than the full sequence", head, rows, frozenset({1, 2, 3}))


def failure_table(summary: SweepSummary) -> Table:
    """Trials that failed for good, with the reasons.

    Args:
        summary: the sweep's summary.
    """
    names = short_names(summary.record.keys)
    rows = [
        (
            str(trial.number),
            params_text(trial.params, names),
            f"{trial.samples:,}",
            str(trial.failures),
            trial.reason or "no reason was recorded",
        )
        for trial in summary.failed
    ]
    head = ("trial", "tried", "samples", "losses", "reason")
    return Table("Failed trials", head, rows, frozenset({0, 2, 3}))


def commands(record: SweepRecord, best: TrialRecord | None) -> list[tuple[str, str]]:
    """The commands to type next, each with its purpose.

    Args:
        record: the sweep's record.
        best: the best trial; None before the first score.
    """
    name = shlex.quote(record.name)
    where = f" --storage {shlex.quote(parent(record.uri))}"
    logs = shlex.quote(join(record.uri, "tensorboard"))
    found = [("Make it again", record.command)] if record.command else []
    found.append(("Go on where it ended", f"mimray tune --resume {name}{where}"))
    if best is not None:
        promoted = shlex.quote(f"{record.name}:best")
        found += [
            (
                "Promote the best trial",
                f"mimray models register {promoted} --name MODEL --alias champion{where}",
            ),
            ("Serve it", "mimray serve MODEL@champion"),
        ]
    return [
        *found,
        ("Look at the trials", f"mimray ui --sweep {name}{where}"),
        ("Look at their curves", f"tensorboard --logdir {logs}"),
    ]


def _methods_note(record: SweepRecord) -> str:
    """The recipes that methods began with, and what their trials had in common."""
    config = SweepConfig.model_validate(record.config)
    recipes = (f"{name} of {base.recipe}" for name, base in config.base.methods.items())
    alike = (
        "as many FLOPs of training, a tokenizer's or teacher's own training not counted"
        if config.budget.unit == "flops"
        else "as many pictures, which cost each method another time; device-s is that of each"
    )
    return f"Methods begin with recipes of their own: {', '.join(recipes)}. Trials had {alike}."


def notes(summary: SweepSummary) -> list[str]:
    """Caveats of the figures.

    Args:
        summary: the sweep's summary.
    """
    record = summary.record
    found = []
    if record.proxy:
        found.append(
            f"The score ({record.metric}) is a proxy, found without labels. "
            f"{record.proxy.rstrip('.')}. Score the first few trials on labelled pictures, where "
            "there are any, before choosing one."
        )
    found.append(
        "Trials are ranked by the score and never by the loss: at another mask ratio the network "
        "solves another task, so that reconstruction losses cannot be compared."
    )
    if METHOD in record.keys:
        found.append(_methods_note(record))
    if summary.ranked and record.final is None:
        found.append(
            f"The best {record.metric} is the largest of {len(summary.ranked)} scores on the "
            "pictures that they were chosen by, and so too high on average"
            + ("." if record.ended else "; the winner's own score comes at the end of the sweep.")
        )
    if summary.tied:
        named = ", ".join(str(trial.number) for trial in summary.tied)
        trials = "trial" if len(summary.tied) == 1 else "trials"
        found.append(
            f"Not told apart from the best: {trials} {named}. Chance over the pictures scored on "
            "explains the difference in at least one of twenty cases."
        )
    if record.config.get("budget", {}).get("unit") == "flops":
        found.append(
            "Trials are compared at equal FLOPs of training, so that a cheaper one has seen more "
            "pictures."
        )
    return found


def outcome(summary: SweepSummary) -> str:
    """The sweep in one line: trials, their states, time elapsed."""
    states = ", ".join(f"{number} {state}" for state, number in summary.states.items())
    total = len(summary.record.trials)
    trials = f"{total} {'trial' if total == 1 else 'trials'}" + (f" ({states})" if states else "")
    return f"{trials}, {duration(summary.record.elapsed_s)}"


def _times(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}×"
