"""Sweeps made by hand, at any stage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimray.tuning.record import Rung, SweepRecord, TrialRecord

RATIO, DEPTH = "method.mask_ratio", "method.decoder_depth"
SAMPLES = (100, 200, 400)


def make_trial(number: int, params: dict[str, Any], scores: Sequence[float], **kept: Any) -> Any:
    rungs = tuple(
        Rung(number=i, step=SAMPLES[i] // 10, samples=SAMPLES[i], score=s, train_s=10, score_s=2.5)
        for i, s in enumerate(scores)
    )
    return TrialRecord(number=number, params=params, rungs=rungs, **kept)


def make_record(trials: Sequence[TrialRecord], **kept: Any) -> SweepRecord:
    about: dict[str, Any] = {
        "name": "sweep",
        "uri": "/runs/sweep",
        "config": {},
        "keys": tuple(dict.fromkeys(key for trial in trials for key in trial.params)),
        "metric": "accuracy",
        "rung_samples": SAMPLES,
        "data": "/data",
        "data_fingerprint": "f00d",
        "score_data": "/data",
        "seed": 0,
        "command": "mimray tune mae-mask-depth --data /data",
        "trials": tuple(trials),
    }
    return SweepRecord.model_validate({**about, **kept})


@pytest.fixture
def trial() -> Callable[..., TrialRecord]:
    """A trial of a number, params and the scores of its rungs; every rung took 12.5 s."""
    return make_trial


@pytest.fixture
def record() -> Callable[..., SweepRecord]:
    """A sweep of some trials; its keys are theirs."""
    return make_record


@pytest.fixture
def grid() -> SweepRecord:
    """Mask ratio by depth while it runs: finished, stopped, failed, running and waiting trials."""
    ratios, depths = (0.15, 0.4, 0.5, 0.6, 0.75, 0.9), (1, 2, 4, 8)
    states = {13: "failed", 22: "running", 23: "waiting"}
    trials = []
    for number, (ratio, depth) in enumerate(itertools.product(ratios, depths)):
        state = states.get(number, ("stopped", "stopped", "finished")[number % 3])
        count = {"failed": 1, "running": 2, "waiting": 0, "finished": 3}.get(state, 1 + number % 2)
        peak = 0.7 - (ratio - 0.7) ** 2 - 0.01 * abs(math.log2(depth) - 2)
        trials.append(
            make_trial(
                number,
                {RATIO: ratio, DEPTH: depth},
                [peak - 0.1 / (i + 1) for i in range(count)],
                state=state,
                samples=SAMPLES[count - 1] if count else 0,
                loss=ratio if count else None,
                failures=int(number == 5),
                reason="loss is not finite at step 7" if state == "failed" else "",
            )
        )
    space = {RATIO: {"grid": list(ratios)}, DEPTH: {"grid": list(depths)}}
    config = {"base": {"recipe": "mae-tiny"}, "space": space}
    return make_record(trials, config=config, elapsed_s=3700.0)


@pytest.fixture
def draw() -> Callable[[Path, int], None]:
    """Puts a reconstruction into the directory of a trial."""

    def drawn(sweep: Path, number: int, size: tuple[int, int] = (1200, 600)) -> None:
        place = sweep / "trials" / f"{number:04d}"
        place.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (6, 12, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size).save(place / "reconstruction.png")

    return drawn
