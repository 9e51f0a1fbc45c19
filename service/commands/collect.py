"""MLflow runs, made again from the run directories of a storage."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mimray.trainers.config.run import parse_plan
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.errors import ConfigError
from mimray.trainers.recorder import RECONSTRUCTION, read_launch
from mimray.trainers.storage import RunDir
from mimray.trainers.tracking import track

logger = logging.getLogger(__name__)


def collect(storage: str, uri: str, on_run: Callable[[str], None]) -> int:
    """Bring MLflow up to the runs that lie in a storage, whatever machine launched them.

    What MLflow has of a run stays, and what it lacks is written: run again, it adds what is new. A
    run whose plan cannot be read is left out, with a warning.

    Args:
        storage: the directory or URI of all runs.
        uri: MLflow's tracking URI.
        on_run: called with the name of each run, before it is read.

    Returns:
        Number of runs that MLflow now shows.

    Raises:
        StorageError: the storage, or MLflow, cannot be reached.
    """
    place, count = RunDir(storage), 0
    for name in place.folders():
        run = place / name
        if run.exists("plan.json"):
            on_run(name)
            try:
                _bring(run, place.uri, uri)
                count += 1
            except ConfigError as error:
                logger.warning("%s is left out: %s", run, error)
    return count


def _bring(run: RunDir, storage: str, uri: str) -> None:
    hint = "use the mimray that wrote it"
    plan = parse_plan(run.read("plan.json"), f"{run}/plan.json", hint)
    launch = read_launch(run)
    command = launch.command if launch else ""
    tracker = track(run, plan, storage=storage, command=command, uri=uri)
    rows = read_metrics(run)
    if tracker.rows(rows) and run.exists(RECONSTRUCTION):
        tracker.picture("reconstruction", run.read(RECONSTRUCTION), rows[-1]["step"])
    if launch and launch.status:
        tracker.finish(launch.status)
