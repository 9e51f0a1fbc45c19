"""Phases of work in other processes, gathered by one actor."""

from __future__ import annotations

import time
from typing import Any

Phase = tuple[str, int, int]  # name, units done, units in all

REPORT_EVERY_S = 0.3


class PhaseRecorder:
    """An actor that knows the present phase of each of several tasks."""

    def __init__(self) -> None:
        self._phases: dict[int, Phase] = {}

    def tell(self, number: int, phase: Phase) -> None:
        """Record the phase of one task."""
        self._phases[number] = phase

    def phases(self) -> dict[int, Phase]:
        """The latest phase of each task, by its number."""
        return self._phases


class PhaseLink:
    """A task's end of the recorder: tells it now and then, and of every end of a phase.

    Args:
        recorder: the actor's handle.
        number: the task's number among those recorded.
    """

    def __init__(self, recorder: Any, number: int) -> None:
        self._recorder = recorder
        self._number = number
        self._next_s = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Report the units done of a phase."""
        now = time.monotonic()
        if done == total or now >= self._next_s:
            self._recorder.tell.remote(self._number, (phase, done, total))
            self._next_s = now + REPORT_EVERY_S
