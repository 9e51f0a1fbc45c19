"""Hyperparameter importance, by functional analysis of variance (fANOVA).

Source: Hutter et al. 2014, as Optuna implements it.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any

from pydantic import Field

from mimray.trainers.config.base import Config
from mimray.tuning.record import SweepRecord, TrialRecord
from mimray.tuning.report.values import distinct, frozen, is_number, shown

MIN_TRIALS = 4


class Importance(Config):
    """Shares of the variance of scores that each key explains by itself.

    Attributes:
        rung: the number, from 0, of the rung whose scores were taken; None without one.
        trials: trials with a score at that rung.
        shares: the share of each key, the largest first; they add up to 1.
        reason: the reason why there are no shares.
    """

    rung: int | None = None
    trials: int = 0
    shares: dict[str, float] = Field(default_factory=dict)
    reason: str = ""


def importance_of(record: SweepRecord) -> Importance:
    """Importances at the last rung that at least `MIN_TRIALS` trials have reached.

    Args:
        record: the record of a sweep at any stage.

    Returns:
        Shares by key, or the reason why there are none.
    """
    rung, trials = _last_common_rung(record)
    if rung is None:
        return Importance(
            trials=len(trials),
            reason=f"it takes {MIN_TRIALS} trials with a score at the same rung, and there are "
            f"{len(trials)}",
        )
    scores = tuple(score for _, score in trials)
    rows = tuple(tuple(frozen(t.params.get(key)) for key in record.keys) for t, _ in trials)
    if len(record.keys) == 1:
        reason = "only one key is searched"
    elif len(set(scores)) == 1:
        reason = f"all {len(trials)} trials have the same score"
    elif all(len(set(column)) == 1 for column in zip(*rows, strict=True)):
        reason = f"all {len(trials)} trials tried the same values"
    else:
        return _analysed(rung, record.keys, rows, scores, record.seed)
    return Importance(rung=rung, trials=len(trials), reason=reason)


def _last_common_rung(record: SweepRecord) -> tuple[int | None, list[tuple[TrialRecord, float]]]:
    """The last rung with enough scores, and these; else None, and the most that any rung has."""
    at: dict[int, list[tuple[TrialRecord, float]]] = {}
    for trial in record.trials:
        for rung in trial.rungs:
            if trial.state != "failed" and math.isfinite(rung.score):
                at.setdefault(rung.number, []).append((trial, rung.score))
    enough = [number for number, found in at.items() if len(found) >= MIN_TRIALS]
    if enough:
        return max(enough), at[max(enough)]
    return None, max(at.values(), key=len, default=[])


# The report is written more often than a score comes in.
@functools.lru_cache(maxsize=4)
def _analysed(
    rung: int,
    keys: tuple[str, ...],
    rows: tuple[tuple[Any, ...], ...],
    scores: tuple[float, ...],
    seed: int,
) -> Importance:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    columns = list(zip(*rows, strict=True))
    numeric = [all(map(is_number, column)) for column in columns]
    distributions = {key: _distribution(column) for key, column in zip(keys, columns, strict=True)}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize")
        for row, score in zip(rows, scores, strict=True):
            values = [v if n else shown(v) for v, n in zip(row, numeric, strict=True)]
            study.add_trial(
                optuna.create_trial(
                    params=dict(zip(keys, values, strict=True)),
                    distributions=distributions,
                    value=score,
                )
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
    except (RuntimeError, ValueError) as error:
        # fANOVA fails where its forest sees no variance.
        return Importance(rung=rung, trials=len(rows), reason=f"fANOVA: {error}")
    finally:
        optuna.logging.set_verbosity(verbosity)
    shares = {key: float(share) for key, share in found.items()}
    return Importance(rung=rung, trials=len(rows), shares=shares)


def _distribution(column: tuple[Any, ...]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    # Numbers keep their order; a forest needs no other knowledge of the space.
    if all(map(is_number, column)):
        return FloatDistribution(min(column), max(column))
    # Two long values may be shown alike, and a choice must not be listed twice.
    return CategoricalDistribution(list(dict.fromkeys(map(shown, distinct(column)))))
