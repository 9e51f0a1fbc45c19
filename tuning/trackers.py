"""A sweep in MLflow (a parent run with a child a trial) and TensorBoard (curves and HParams)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mimray.trainers.config.run import Plan
from mimray.trainers.storage import RunDir
from mimray.trainers.tracking import Tracker
from mimray.tuning.record import Rung, SweepRecord, TrialRecord, trial_dir, trial_name
from mimray.tuning.space import word_of

EXPERIMENT = "mimray"
PARENT_TAG = "mlflow.parentRunId"


def event_folder(record_uri: str, name: str) -> Path:
    """The folder of TensorBoard's event files: in the sweep, or in `./runs` if that is remote."""
    local = RunDir(record_uri).local
    return (local or Path("runs").absolute() / name) / "tensorboard"


class SweepTrackers:
    """Writes a sweep to MLflow and TensorBoard; for use by one thread.

    Args:
        record: the sweep's record.
        storage: the directory or URI of all runs and sweeps.

    Raises:
        StorageError: MLflow cannot be reached or refuses.
    """

    def __init__(self, record: SweepRecord, storage: str) -> None:
        self._record, self._storage = record, storage
        self._folder = event_folder(record.uri, record.name)
        self._trackers: dict[int, Tracker] = {}
        self._writers: dict[int, Any] = {}
        self._parent = Tracker.open(
            None,
            experiment=EXPERIMENT,
            run_name=record.name,
            storage=storage,
            params={k: record.config[k] for k in ("base", "space", "searcher", "scheduler")}
            | {"score": record.config["score"], "seed": record.seed, "data_uri": record.data},
            tags={
                "mimray.run_dir": record.uri,
                "mimray.kind": "sweep",
                "mimray.data_fingerprint": record.data_fingerprint,
                "mimray.command": record.command,
            },
        )

    def begin(self, number: int, params: dict[str, Any], plan: Plan) -> None:
        """Open a trial's MLflow run and event file, or go on with them."""
        self._tracker(number, params, plan)
        self._writer(number)

    def metrics(self, number: int, row: dict[str, Any]) -> None:
        """Write a row of a trial's metrics."""
        values = {k: v for k, v in row.items() if k not in ("step", "time")}
        if number in self._trackers:
            self._trackers[number].log(row["step"], values)
        writer = self._writer(number)
        for key, value in values.items():
            writer.add_scalar(f"training/{key}", value, row["samples"], walltime=row["time"])

    def picture(self, number: int, step: int, sheet: bytes) -> None:
        """Write a sheet of reconstructions, a PNG."""
        import io

        import numpy as np
        from PIL import Image

        if number in self._trackers:
            self._trackers[number].picture("reconstruction", sheet, step)
        pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
        self._writer(number).add_image("reconstruction", pixels, step, dataformats="HWC")

    def score(self, number: int, rung: Rung) -> None:
        """Write the score at a rung."""
        scores: dict[str, float] = {f"score/{self._record.metric}": rung.score}
        if rung.standard_error is not None:
            scores["score/standard_error"] = rung.standard_error
        if rung.num_pictures is not None:
            scores["score/num_pictures"] = float(rung.num_pictures)
        if number in self._trackers:
            seconds = {"train_s": rung.train_s, "score_s": rung.score_s}
            self._trackers[number].log(rung.step, {**scores, **seconds})
        for name, value in scores.items():
            self._writer(number).add_scalar(name, value, rung.samples)

    def end(self, number: int, trial: TrialRecord) -> None:
        """Close a trial, with its last score as HParams."""
        from tensorboardX.summary import hparams

        if trial.score is not None:
            words = {k: "null" if v is None else word_of(v) for k, v in trial.params.items()}
            metrics = {f"score/{self._record.metric}": trial.score, "samples": trial.samples}
            writer = self._writer(number)
            for summary in hparams(words, metrics):
                writer.file_writer.add_summary(summary)
            writer.add_scalar("samples", trial.samples, trial.samples)
        if number in self._writers:
            self._writers.pop(number).close()
        tracker = self._trackers.pop(number, None)
        if tracker is not None:
            ends: dict[str, Literal["FINISHED", "FAILED", "KILLED"]] = {
                "failed": "FAILED", "cut": "KILLED",
            }  # fmt: skip
            tracker.finish(ends.get(trial.state, "FINISHED"))

    def close(self, record: SweepRecord, status: Literal["FINISHED", "KILLED"]) -> None:
        """Close the parent run of this launch, with the best score."""
        best = record.best
        if best is not None and best.score is not None:
            figures = {f"best/{record.metric}": best.score, "best/trial": float(best.number)}
            reported = record.reported
            if reported is not None:
                figures[f"report/{record.metric}"] = reported.headline
            if reported is not None and reported.standard_error is not None:
                figures["report/standard_error"] = reported.standard_error
            self._parent.score(best.rungs[-1].step, figures)
        self._parent.finish(status)
        for writer in self._writers.values():
            writer.close()

    def _tracker(self, number: int, params: dict[str, Any], plan: Plan) -> None:
        place = trial_dir(RunDir(self._record.uri), number)
        self._trackers[number] = Tracker.open(
            None,
            experiment=EXPERIMENT,
            run_name=f"{self._record.name}/{place.name}",
            storage=self._storage,
            params=plan.recipe.model_dump(mode="json", exclude={"about"})
            | {"lr": plan.lr, "steps": plan.steps, "data_uri": plan.data.uri},
            tags={
                "mimray.run_dir": place.uri,
                "mimray.plan_hash": plan.hash,
                "mimray.data_fingerprint": plan.data.fingerprint,
                "mimray.sweep": self._record.name,
                **{f"mimray.space.{key}": str(word_of(value)) for key, value in params.items()},
                PARENT_TAG: self._parent.run_id,
            },
        )

    def _writer(self, number: int) -> Any:
        if number not in self._writers:
            from tensorboardX import SummaryWriter

            folder = self._folder / trial_name(number)
            self._writers[number] = SummaryWriter(str(folder), flush_secs=10)
        return self._writers[number]
