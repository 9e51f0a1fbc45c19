"""Progress of work in phases, perhaps several at once, perhaps in other processes."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mimray.service.terminal.progress import LINE_EVERY_S, duration

State = tuple[str, int, int]

REPORT_EVERY_S = 0.3


class PhaseProgress:
    """A bar for each piece of work and its present phase; takes (work, phase, done, total).

    Args:
        console: where to; off a terminal a line now and then.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, tuple[str, float, int]] = {}
        self._next_line: dict[str, float] = {}

    def __enter__(self) -> PhaseProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, work: str, phase: str, done: int, total: int) -> None:
        """Take how far a piece of work is."""
        now = time.monotonic()
        if work not in self._began or self._began[work][0] != phase:
            self._began[work] = phase, now, done
        _, began, first = self._began[work]
        rate = (done - first) / max(now - began, 1e-9)
        note = f"{duration((total - done) / rate)} left" if rate and done < total else ""
        title = f"{work}: {phase}"
        if not self._console.is_terminal:
            if now >= self._next_line.get(work, 0.0):
                print(f"{title} {done}/{total}  {note}", file=sys.stderr, flush=True)
                self._next_line[work] = now + LINE_EVERY_S
            return
        if work not in self._bars:
            self._bars[work] = self._progress.add_task(title, total=total, note=note)
        self._progress.update(
            self._bars[work], description=title, completed=done, total=total, note=note
        )


class Watch:
    """An actor that knows how far each of several tasks is."""

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def tell(self, number: int, state: State) -> None:
        """Take the state of one task."""
        self._states[number] = state

    def states(self) -> dict[int, State]:
        """The latest of each."""
        return self._states


class Reporter:
    """The worker's end: tells the watch now and then, and of every end of a phase.

    Args:
        watch: handle of the actor.
        number: of this task.
    """

    def __init__(self, watch: Any, number: int) -> None:
        self._watch = watch
        self._number = number
        self._next_s = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Take how far it is."""
        now = time.monotonic()
        if done == total or now >= self._next_s:
            self._watch.tell.remote(self._number, (phase, done, total))
            self._next_s = now + REPORT_EVERY_S
