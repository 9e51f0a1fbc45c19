"""Progress of long work: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from mimray.trainers.recorder import DeskState

LINE_EVERY_S = 10.0


class TrainingProgress:
    """Shows a run's step, loss, pictures a second and time left.

    Args:
        steps: length of the run.
        console: where to; standard error by default, so that results stay alone on stdout.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.steps = steps
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._next_line = 0.0
        self._last_step = -1
        self._first: tuple[float, int] | None = None
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=steps, note="starting workers…")

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, state: DeskState) -> None:
        """Take how the run stands."""
        for note in state.notes:
            self.console.print(f"warning: {note}", style="yellow", markup=False)
        row = state.row
        if not row or row["step"] == self._last_step:
            if not row and not self.console.is_terminal:
                self._line("starting workers")
            return
        self._last_step = row["step"]
        if self._first is None:
            self._first = time.monotonic(), row["step"]
        note = (
            f"loss {row['loss']:.4f}  {row['images_per_s']:.0f} images/s  {self._left(row['step'])}"
        )
        self._progress.update(self._task, completed=row["step"], note=note)
        if not self.console.is_terminal:
            self._line(f"step {row['step']}/{self.steps}  {note}", last=row["step"] == self.steps)

    def _left(self, step: int) -> str:
        assert self._first is not None
        began, first = self._first
        if step <= first or step >= self.steps:
            return ""
        seconds = (time.monotonic() - began) / (step - first) * (self.steps - step)
        return f"{duration(seconds)} left"

    def _line(self, text: str, last: bool = False) -> None:
        now = time.monotonic()
        if last or now >= self._next_line:
            print(text, file=sys.stderr, flush=True)
            self._next_line = now + LINE_EVERY_S


def duration(seconds: float) -> str:
    """A length of time for people: 42 s, 3 min 10 s, 5 h 2 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class CountingProgress:
    """Shows done of total, a rate and the time left; takes (done, total[, rejected])."""

    def __init__(self, title: str, unit: str, console: Console) -> None:
        self.title, self.unit, self.console = title, unit, console
        self._began = time.monotonic()
        self._next_line = 0.0
        self._progress = Progress(
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(title, total=None, note="")

    def __enter__(self) -> CountingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int, rejected: int = 0) -> None:
        """Take how far it is."""
        if done == 0:
            self._began = time.monotonic()
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = done / elapsed
        note = f"{rate:.0f} {self.unit}/s"
        if rate and done < total:
            note += f"  {duration((total - done) / rate)} left"
        if rejected:
            note += f"  {rejected} rejected"
        self._progress.update(self._task, completed=done, total=total, note=note)
        now = time.monotonic()
        if not self.console.is_terminal and now >= self._next_line and done:
            print(f"{self.title} {done}/{total}  {note}", file=sys.stderr, flush=True)
            self._next_line = now + LINE_EVERY_S
