"""Progress of long work: a live view on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from mimray.service.terminal.console import console as standard_error

if TYPE_CHECKING:
    from mimray.trainers.engine.metrics import ProbeCurve
    from mimray.trainers.recorder import RunState

LINE_EVERY_S = 10.0
# A time left is shown once so many steps forward, over so long a time, tell the rate.
KNOWN_AFTER_ADVANCES = 2
KNOWN_AFTER_S = 3.0


class Progress:
    """The progress of pieces of work: bars or a given view, redrawn in place on a terminal.

    Elsewhere lines go to standard error, those of one piece of work `LINE_EVERY_S` apart.

    Args:
        console: the console to draw on.
        elapsed: end each bar with the time since it began.
    """

    def __init__(self, console: Console = standard_error, *, elapsed: bool = False) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            *([TimeElapsedColumn()] if elapsed else []),
            auto_refresh=False,
        )
        self._live = Live(self._bars, console=console, refresh_per_second=10)
        self._bar_of: dict[str, TaskID] = {}
        self._next_line_s: dict[str, float] = {}

    def __enter__(self) -> Progress:
        if self.live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._live.stop()

    @property
    def live(self) -> bool:
        """True on a terminal, where bars and views are drawn and lines are not."""
        return self._console.is_terminal

    def bar(
        self, work: str, done: int, total: int | None, note: str = "", title: str | None = None
    ) -> None:
        """Draw the bar of a piece of work.

        Args:
            work: the name of the piece of work, which has one bar.
            done: units done.
            total: units in all; None while they are not known.
            note: a text behind the bar.
            title: a text before the bar; `work` by default.
        """
        title = title or work
        if work not in self._bar_of:
            self._bar_of[work] = self._bars.add_task(title, total=total, note=note)
        self._bars.update(
            self._bar_of[work], description=title, completed=done, total=total, note=note
        )

    def view(self, renderable: RenderableType) -> None:
        """Draw this in place of the bars."""
        self._live.update(renderable)

    def line(self, text: str, work: str = "", *, at_once: bool = False) -> None:
        """Print a line, unless on a terminal or soon after another one of the same work."""
        now = time.monotonic()
        if self.live or not (at_once or now >= self._next_line_s.get(work, 0.0)):
            return
        print(text, file=sys.stderr, flush=True)
        self._next_line_s[work] = now + LINE_EVERY_S

    def warn(self, text: str) -> None:
        """Print a warning above the view, or among the lines."""
        self._console.print(f"warning: {text}", style="yellow", markup=False)


class Pace:
    """The rate of work, and the time left once enough of it was seen to tell.

    It counts from the first report of something done: what goes before is no work, but the start
    of processes.
    """

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self._last = 0.0
        self._num_advances = 0

    def report(self, done: float) -> None:
        """Take note of the units done; a decrease starts anew."""
        if done <= 0:
            self._began = None
        elif self._began is None or done < self._last:
            self._began = time.monotonic(), done
            self._last, self._num_advances = done, 0
        elif done > self._last:
            self._last = done
            self._num_advances += 1

    @property
    def rate(self) -> float:
        """Units a second since the first report; 0 while it is not known."""
        if self._began is None or not self._num_advances:
            return 0.0
        began_s, first = self._began
        return (self._last - first) / max(time.monotonic() - began_s, 1e-9)

    def left(self, total: float) -> str:
        """The time left, for people; empty while too little was seen, and at the end."""
        if self._began is None or self._last >= total:
            return ""
        seen_s = time.monotonic() - self._began[0]
        if self._num_advances < KNOWN_AFTER_ADVANCES or seen_s < KNOWN_AFTER_S:
            return ""
        return f"{duration((total - self._last) / self.rate)} left"


def show_training(progress: Progress, steps: int) -> Callable[[RunState], None]:
    """Show a run's step, loss, pictures a second and time left.

    Args:
        progress: the display.
        steps: the length of the run.

    Returns:
        A function to call with the run's state, again and again.
    """
    pace, shown, waits, attempts, stopping = Pace(), (-1, ""), False, 1, ""
    progress.bar("training", 0, steps, "starting workers…")

    def show(state: RunState) -> None:
        nonlocal shown, waits, attempts, stopping
        for note in state.notes:
            progress.warn(note)
        if state.attempts > attempts:
            attempts = state.attempts
            progress.warn(
                f"start {attempts}, after a loss or another number of nodes: {state.workers} "
                f"worker{'s' if state.workers > 1 else ''} from step {state.started_at}"
            )
        if state.stopping and not stopping:
            stopping = state.stopping
            progress.warn(f"{stopping}: ending after a checkpoint; the same again ends without one")
        row = state.row
        if not row:
            if not waits:
                progress.line("starting workers", "start")
            waits = True
            return
        step = row["step"]
        if (step, state.phase) == shown:
            return
        shown = step, state.phase
        pace.report(step)
        note = _joined(
            f"loss {row['loss']:.4f}",
            f"{row['images_per_s']:.0f} images/s",
            _probe(state.probe),
            pace.left(steps),
            f"probe: {state.phase}" if state.phase else "",
        )
        progress.bar("training", step, steps, note)
        progress.line(
            _joined(f"step {step}/{steps}", note), at_once=step == steps and not state.phase
        )

    return show


def _probe(curve: ProbeCurve | None) -> str:
    """The newest score of a running probe, and the best one."""
    if curve is None:
        return ""
    from mimray.trainers.evaluation.uncertainty import figure_text

    last, best = curve.last, curve.best
    newest = figure_text(last.value, last.standard_error)
    return f"{curve.figure} {newest} (best {figure_text(best.value, None)} at step {best.step})"


def show_count(progress: Progress, title: str, unit: str) -> Callable[..., None]:
    """Show done of total, a rate and the time left.

    Args:
        progress: the display.
        title: the name of the work.
        unit: the plural of what is counted.

    Returns:
        A function to call with (done, total[, rejected]), again and again.
    """
    pace = Pace()
    progress.bar(title, 0, None)

    def show(done: int, total: int, rejected: int = 0) -> None:
        pace.report(done)
        note = _joined(
            f"{pace.rate:.0f} {unit}/s" if pace.rate else "",
            pace.left(total),
            f"{rejected} rejected" if rejected else "",
        )
        progress.bar(title, done, total, note)
        if done:
            progress.line(_joined(f"{title} {done}/{total}", note))

    return show


def show_phases(progress: Progress) -> Callable[[str, str, int, int], None]:
    """Show pieces of work side by side, each with its present phase and the time left of it.

    Args:
        progress: the display.

    Returns:
        A function to call with (work, phase, done, total), again and again.
    """
    paces: dict[str, tuple[str, Pace]] = {}

    def show(work: str, phase: str, done: int, total: int) -> None:
        if work not in paces or paces[work][0] != phase:
            paces[work] = phase, Pace()
        pace = paces[work][1]
        pace.report(done)
        title, note = f"{work}: {phase}", pace.left(total)
        progress.bar(work, done, total, note, title)
        progress.line(_joined(f"{title} {done}/{total}", note), work)

    return show


def _joined(*parts: str) -> str:
    return "  ".join(filter(None, parts))


def duration(seconds: float) -> str:
    """A length of time for people: 42 s, 3 min 10 s, 5 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
