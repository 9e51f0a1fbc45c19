"""Heartbeats of workers to their driver, and the requests that they get in return.

Each worker tells the recorder's actor once a second where it stands, in a thread beside the
training, and hears what it is asked for. A worker without a heartbeat, or without a step, for
longer than `resources.hang_timeout_s` hangs: the stacks of all are kept, and all are ended, which
Ray Train takes for a loss and starts them again from the last checkpoint. The first update of a
start may take any time: it compiles, connects and opens data.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mimray.trainers.types import Notice

BEAT_S = 1.0
STACKS_WITHIN_S = 5.0
_LOOKS_EVERY_S = 3.0
_SILENT_S = 20.0


class Lifeline:
    """Progress reports of a training, and requests to it; without a driver, as here, none."""

    def step(self) -> Notice:
        """Say that an update is about to be made; returns what is asked for, a SAVE once."""
        return Notice.NONE

    @contextmanager
    def pause(self, work: str) -> Iterator[None]:
        """Do work between two updates, however long it takes.

        Args:
            work: a word or two for it.
        """
        yield


@dataclass(frozen=True)
class Heartbeat:
    """Heartbeat of a worker: its place and its progress.

    Attributes:
        rank: its rank in the training.
        node_id: Ray's id of its node.
        host: the node's name.
        pid: its process id there.
        steps: updates begun since this start.
        since_s: seconds since it began the last one.
        slowest_s: seconds of its slowest update so far.
        pause: the work under way between two updates; empty while one is made.
        saved: True once the checkpoint that was asked for is written.
    """

    rank: int
    node_id: str
    host: str
    pid: int
    steps: int = 0
    since_s: float = 0.0
    slowest_s: float = 0.0
    pause: str = ""
    saved: bool = False

    @property
    def where(self) -> str:
        """The worker's place, for people."""
        doing = self.pause or (f"update {self.steps} of this start" if self.steps else "starting")
        return f"rank {self.rank} (process {self.pid} on {self.host}, {doing})"


class WorkerLifeline(Lifeline):
    """Sends a worker's heartbeats while it is entered as a context manager.

    Args:
        recorder: the handle of the `RunRecorder`'s actor.
        rank: the worker's rank.
    """

    def __init__(self, recorder: Any, rank: int) -> None:
        import ray

        self._get, self._gone = ray.get, ray.exceptions.RayError
        context = ray.get_runtime_context()
        self._recorder, self._actor = recorder, context.current_actor
        self._identity = (rank, context.get_node_id(), socket.gethostname(), os.getpid())
        self._notice, self._asked, self._saved = Notice.NONE, False, False
        self._steps, self._began, self._slowest_s, self._pause = 0, time.monotonic(), 0.0, ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lifeline", daemon=True)

    def __enter__(self) -> WorkerLifeline:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._recorder.leave.remote(self._identity[0])

    def step(self) -> Notice:
        """Say that an update is about to be made; returns what is asked for, a SAVE once."""
        self._end_step()
        self._steps, self._began = self._steps + 1, time.monotonic()
        self._saved = self._asked  # it was, before the loop came here again
        if self._notice is Notice.SAVE:
            self._asked = True
            return Notice.NONE if self._saved else Notice.SAVE
        return self._notice

    @contextmanager
    def pause(self, work: str) -> Iterator[None]:
        """Do work between two updates, however long it takes.

        Args:
            work: a word or two for it.
        """
        self._end_step()
        self._pause = work
        try:
            yield
        finally:
            # It counts for no update's time.
            self._pause, self._began = "", time.monotonic()

    def _end_step(self) -> None:
        if self._steps:
            self._slowest_s = max(self._slowest_s, time.monotonic() - self._began)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            since_s = time.monotonic() - self._began
            beat = Heartbeat(
                *self._identity, self._steps, since_s, self._slowest_s, self._pause, self._saved
            )
            try:
                self._notice, stack = self._get(self._recorder.beat.remote(beat, self._actor))
                if stack:
                    self._recorder.stack.remote(beat, stacks())
            except self._gone:
                return  # the driver is gone, and this worker with it


def stacks() -> str:
    """The stacks of all threads of this process, the one that asks aside."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(number, number)}\n" + "".join(traceback.format_stack(frame))
        for number, frame in sys._current_frames().items()
        if number != threading.get_ident()
    )


class Roster:
    """The workers of a run as its driver hears of them.

    Args:
        timeout_s: seconds without a heartbeat, or without a step beyond the slowest seen, after
            which a worker hangs; 0 for never.

    Attributes:
        wants_stacks: the reason why stacks are asked for; empty while all is well.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.wants_stacks = ""
        self._beats: dict[int, tuple[float, Heartbeat, Any]] = {}
        self._asked_at = 0.0
        self._looked_at: float | None = None
        self._given: set[int] = set()

    def beat(self, beat: Heartbeat, actor: Any, now_s: float) -> bool:
        """Take a heartbeat; returns True if the worker is to give its stacks.

        Args:
            beat: the heartbeat.
            actor: the worker's handle, by which it can be ended.
            now_s: the time by this process's monotonic clock.
        """
        self._beats[beat.rank] = now_s, beat, actor
        if not self.wants_stacks or beat.rank in self._given:
            return False
        self._given.add(beat.rank)
        return True

    def hung(self, now_s: float) -> str:
        """Reason why a worker counts as hung, in a sentence; empty if none does."""
        if not self.timeout_s:
            return ""
        for heard_at, beat, _ in self._beats.values():
            silent_s = now_s - heard_at
            if silent_s > self.timeout_s:
                return f"{beat.where} has given no sign of life for {silent_s:.0f} s"
        # Then the others, which may only be waiting for one that is silent.
        for _, beat, _ in self._beats.values():
            allowed_s = self.timeout_s + beat.slowest_s
            if beat.steps > 1 and not beat.pause and beat.since_s > allowed_s:
                return (
                    f"{beat.where} has made no step for {beat.since_s:.0f} s, the slowest so far "
                    f"took {beat.slowest_s:.1f} s"
                )
        return ""

    def due(self, now_s: float) -> list[Any]:
        """Find hanging workers; returns the handles to end, once there was time for stacks."""
        deaf_s = 0.0 if self._looked_at is None else now_s - self._looked_at
        self._looked_at = now_s
        if deaf_s > _LOOKS_EVERY_S:  # the recorder had other work: nobody was silent meanwhile
            self._beats = {
                rank: (heard_at + deaf_s, beat, actor)
                for rank, (heard_at, beat, actor) in self._beats.items()
            }
        if not self.wants_stacks:
            self.wants_stacks, self._asked_at = self.hung(now_s), now_s
            return []
        if now_s - self._asked_at < STACKS_WITHIN_S:
            return []
        actors = [actor for _, _, actor in self._beats.values()]
        self.forget()
        return actors

    def saved(self, now_s: float) -> bool:
        """True if every worker that is still heard of has written what it was asked for."""
        return all(
            beat.saved or now_s - heard_at > _SILENT_S for heard_at, beat, _ in self._beats.values()
        )

    def standing(self, now_s: float) -> list[tuple[Heartbeat, float]]:
        """The last heartbeat of each worker, by rank, and seconds since it was heard."""
        return [(beat, now_s - at) for _, (at, beat, _) in sorted(self._beats.items())]

    def leave(self, rank: int) -> None:
        """Expect nothing more of a worker."""
        self._beats.pop(rank, None)

    def forget(self) -> None:
        """Begin anew, with the workers of the next start."""
        self._beats.clear()
        self._given.clear()
        self.wants_stacks = ""
