"""A checkpoint before Ray Train ends the workers of an elastic run for another number of them.

Ray Train tells workers nothing of it. The hook that does is for developers of Ray, and may change
with its version.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, TrainControllerState

# Longer than a checkpoint takes; workers that are lost meanwhile are not waited for.
PATIENCE_S = 600.0
_POLL_S = 0.2


class SaveBeforeResizing(ControllerCallback):  # type: ignore[misc]  # Ray has no types
    """Asks the workers for a checkpoint, and waits until it is written.

    Args:
        recorder: the handle of the `RunRecorder`'s actor.
    """

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Called by Ray Train; between `ResizingState` and the end of the workers."""
        if not isinstance(current_state, ResizingState):
            return
        until = time.monotonic() + PATIENCE_S
        try:
            while not ray.get(self._recorder.save.remote()):
                if time.monotonic() > until:
                    self._recorder.note.remote(
                        f"no checkpoint was written in {PATIENCE_S:g} s: what followed the last "
                        "one is made again by another number of workers"
                    )
                    return
                time.sleep(_POLL_S)
        except RayError:
            return  # the driver is gone, and the run with it
