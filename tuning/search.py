"""The searcher: lists in order, or Optuna. Every sweep is a study that Optuna can open.

Trials that were begun and not finished come first. A study holds values and scores only;
checkpoints and bundles lie in the trials' directories.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterable
from itertools import count
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from mimray.trainers.errors import ConfigError, MimrayError
from mimray.tuning.bases import Params
from mimray.tuning.config import (
    Choice,
    Domain,
    Grid,
    Int,
    LogUniform,
    OptunaSearch,
    SweepConfig,
    Uniform,
)
from mimray.tuning.record import ENDED, SweepRecord, TrialRecord, repeat_number
from mimray.tuning.space import listed, word_of

if TYPE_CHECKING:
    import optuna

SAMPLES, SCORE = "samples", "score"
NUMBER = "mimray.number"

logger = logging.getLogger(__name__)


class Suggestions(Searcher):  # type: ignore[misc]
    """A searcher of Tune's that suggests trials as `{"number": …, "params": …}`.

    Args:
        config: the sweep's configuration.
        study: Optuna's study, from `study.open_study`.
        before: the trials of earlier launches.
        may_start: called before each new trial; False once a budget is spent.
        check: called with a trial's values; raises a MimrayError where they cannot run.
    """

    def __init__(
        self,
        config: SweepConfig,
        study: optuna.Study,
        before: Iterable[TrialRecord],
        may_start: Callable[[], bool],
        check: Callable[[Params], object],
    ) -> None:
        super().__init__(metric=SCORE, mode="max")
        self._config = config
        self._study = study
        self._list = listed(config)
        self._may_start = may_start
        self._check = check
        before = [trial for trial in before if trial.repeats is None]
        self._unfinished = [trial for trial in before if trial.state not in ENDED]
        self._given = {trial.number for trial in before}
        self._live: dict[str, int] = {}  # Tune's id -> our number
        _catch_up(study, config, before)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial, or `FINISHED`."""
        if self._unfinished:
            trial = self._unfinished.pop(0)
            number, params = trial.number, dict(trial.params)
        elif self.exhausted or not self._may_start():
            finished: Any = Searcher.FINISHED
            return finished  # type: ignore[no-any-return]
        else:
            number = self._next
            self._given.add(number)
            params = self._new(number)
        self._live[trial_id] = number
        return {"number": number, "params": params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report a rung as an intermediate value of Optuna's trial."""
        if SCORE in result:
            found = _of_number(self._study, self._live[trial_id])
            assert found is not None
            with contextlib.suppress(RuntimeError, ValueError):  # told already, or by a twin
                import optuna

                trial = optuna.trial.Trial(self._study, found._trial_id)
                trial.report(result[SCORE], result[SAMPLES])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Forget a trial; `ended` tells the study how it ended, which only the driver knows."""
        self._live.pop(trial_id, None)

    def ended(self, trial: TrialRecord) -> None:
        """Tell the study how a trial ended."""
        _tell(self._study, trial)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the state lies in the sweep's directory and the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""

    @property
    def _next(self) -> int:
        """The lowest free number; trials that run at once may be recorded out of order."""
        return next(number for number in count() if number not in self._given)

    @property
    def exhausted(self) -> bool:
        """True if every trial of the sweep has been handed out."""
        if self._unfinished:
            return False
        most = self._config.budget.trials if self._list is None else len(self._list)
        return most is not None and self._next >= most

    def _new(self, number: int) -> Params:
        known = _of_number(self._study, number)
        if known is not None and not known.state.is_finished():
            # Asked for by a driver that was killed before the trial began.
            params = _internal(self._config, known.params)
        else:
            params = self._asked(number)
        try:
            self._check(params)
        except MimrayError as error:
            logger.warning("trial %d cannot run: %s", number, error)
        return params

    def _asked(self, number: int) -> Params:
        domains = _distributions(self._config)
        if self._list is not None:
            self._study.enqueue_trial(_external(self._config, self._list[number]))
        else:
            # The seed follows from the number, so that a suggestion does not depend on how often
            # the sweep was started.
            self._study.sampler = sampler(self._config, number)
        trial = self._study.ask(domains)
        trial.set_user_attr(NUMBER, number)
        return _internal(self._config, trial.params)


class Repeated(Searcher):  # type: ignore[misc]
    """A searcher of Tune's that goes through repeats of the best trials; no study knows them.

    Args:
        config: the sweep's configuration.
        record: the sweep's record after the search.
    """

    def __init__(self, config: SweepConfig, record: SweepRecord) -> None:
        super().__init__(metric=SCORE, mode="max")
        done = {trial.number for trial in record.trials if trial.state in ENDED}
        wanted = [
            {"number": number, "params": {**trial.params, "seed": _seed(config, trial) + seed}}
            for trial in _distinct(record.found())[: config.repeats.best]
            for seed in range(1, config.repeats.seeds + 1)
            if (number := repeat_number(trial.number, seed)) not in done
        ]
        self._wanted = wanted

    @property
    def exhausted(self) -> bool:
        """True if every repeat has been handed out."""
        return not self._wanted

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next repeat, or `FINISHED`."""
        finished: Any = Searcher.FINISHED
        return self._wanted.pop(0) if self._wanted else finished

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the order is fixed."""

    def ended(self, trial: TrialRecord) -> None:
        """Tell nobody: a repeat is no trial of the study."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the state lies in the sweep's directory."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


def _distinct(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Trials without those whose values an earlier one has: a draw may come twice."""
    first: dict[str, TrialRecord] = {}
    for trial in trials:
        first.setdefault(json.dumps(trial.params, sort_keys=True), trial)
    return list(first.values())


def _seed(config: SweepConfig, trial: TrialRecord) -> int:
    """The seed that a trial was trained with; it may be a key of the space itself."""
    return int(trial.params.get("seed", config.seed))


def sampler(config: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of a sweep, seeded for the trial of a number."""
    import optuna

    if not isinstance(config.searcher, OptunaSearch):
        return optuna.samplers.RandomSampler(seed=config.seed)
    return optuna.samplers.TPESampler(
        seed=config.seed * 100_003 + number,
        n_startup_trials=config.searcher.num_startup_trials,
        multivariate=config.searcher.multivariate,
        constant_liar=True,  # keeps trials that run at once apart
    )


def _distributions(config: SweepConfig) -> dict[str, optuna.distributions.BaseDistribution]:
    return {key: _distribution(domain) for key, domain in config.space.items()}


def _distribution(domain: Domain) -> optuna.distributions.BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    match domain:
        case Grid() | Choice():
            values = domain.grid if isinstance(domain, Grid) else domain.choice
            return CategoricalDistribution([word_of(value) for value in values])
        case Uniform():
            return FloatDistribution(*domain.uniform)
        case LogUniform():
            return FloatDistribution(*domain.loguniform, log=True)
        case Int():
            return IntDistribution(*domain.int)


def _external(config: SweepConfig, params: Params) -> Params:
    return {key: word_of(params[key]) for key in config.space}


def _internal(config: SweepConfig, params: Params) -> Params:
    """Values as the sweep writes them, from Optuna's."""
    found = {}
    for key, domain in config.space.items():
        if isinstance(domain, Grid | Choice):
            values = domain.grid if isinstance(domain, Grid) else domain.choice
            by_word = {word_of(value): value for value in values}
            found[key] = by_word[params[key]]
        else:
            found[key] = params[key]
    return found


def _of_number(study: optuna.Study, number: int) -> optuna.trial.FrozenTrial | None:
    trials = reversed(study.get_trials(deepcopy=False))
    return next((t for t in trials if t.user_attrs.get(NUMBER) == number), None)


def _catch_up(study: optuna.Study, config: SweepConfig, before: Iterable[TrialRecord]) -> None:
    """Add to a study what the sweep's directory has, which was written first."""
    import optuna

    known = {t.user_attrs.get(NUMBER) for t in study.get_trials(deepcopy=False)}
    for trial in before:
        if trial.number not in known:
            study.add_trial(
                optuna.create_trial(
                    state=optuna.trial.TrialState.RUNNING,
                    params=_external(config, trial.params),
                    distributions=_distributions(config),
                    user_attrs={NUMBER: trial.number},
                )
            )
        if trial.state in ENDED:
            _tell(study, trial)


def _tell(study: optuna.Study, trial: TrialRecord) -> None:
    import optuna

    found = _of_number(study, trial.number)
    assert found is not None
    if found.state.is_finished():
        return
    live = optuna.trial.Trial(study, found._trial_id)
    for rung in trial.rungs:
        if rung.place not in found.intermediate_values:
            live.report(rung.score, rung.place)
    live.set_user_attr("mimray.reason", trial.reason)
    states = {
        "finished": optuna.trial.TrialState.COMPLETE,
        "stopped": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }
    state = states[trial.state]
    value = trial.score if state == optuna.trial.TrialState.COMPLETE else None
    study.tell(live, value, state=state)


def check_storable(config: SweepConfig) -> None:
    """Refuse values that Optuna cannot keep apart.

    Raises:
        ConfigError: a value is listed twice.
    """
    for key, domain in config.space.items():
        if isinstance(domain, Grid | Choice):
            values = domain.grid if isinstance(domain, Grid) else domain.choice
            words = [word_of(value) for value in values]
            twice = [word for i, word in enumerate(words) if word in words[:i]]
            if twice:
                raise ConfigError(f"space.{key} has {twice[0]!r} twice")
