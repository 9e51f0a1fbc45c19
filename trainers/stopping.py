"""Signals to a driver: the first asks for a checkpoint and an end, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mimray.trainers.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "the same command goes on from the last checkpoint"
_WAKE_S = 0.2


@contextmanager
def signals_handled_by(handler: signal.Handlers | Callable[[int, Any], object]) -> Iterator[None]:
    """Handle SIGINT and SIGTERM for a while; outside the main thread nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def in_background(
    work: Callable[[], None], name: str
) -> tuple[threading.Thread, list[BaseException]]:
    """Make a thread of some work, which does not keep this process from ending.

    Args:
        work: the work.
        name: name of the thread.

    Returns:
        The thread, not started, and a list that gets the error that the work ended with.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    return threading.Thread(target=run, name=name, daemon=True), errors


def interruptible(work: Callable[[], None], ask: Callable[[str], bool]) -> None:
    """Run the work of a driver, and hand on the signals that it gets meanwhile.

    Args:
        work: returns when the training is over; it runs in a thread, as Ray Train would otherwise
            put a handler of its own in place.
        ask: asks the workers to stop for the signal named; False if there are none to hear it.

    Raises:
        StoppedError: at the second signal, or at the first if no worker hears it; the work is left
            to end with the process.
    """
    caught: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    thread, errors = in_background(work, "training")
    with signals_handled_by(on_signal):
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(_WAKE_S)
            if len(caught) <= asked:
                continue
            name = signal.Signals(caught[-1]).name
            if asked or len(caught) > 1 or not ask(name):
                error = StoppedError(f"ended by {name} before a checkpoint was written", hint=AGAIN)
                error.exit_code = 128 + caught[-1]
                raise error
            asked = True
    if errors:
        raise errors[0]
