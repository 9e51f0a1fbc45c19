from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimray.trainers.errors import ConfigError, DataError, MimrayError
from mimray.tuning.config import Asha, Choice, ScoreConfig, SweepConfig, Uniform
from mimray.tuning.plan import (
    SweepPlan,
    load_sweep,
    make_plan,
    parse_sweep,
    rung_steps,
    shipped_sweeps,
)
from mimray.tuning.record import TrialRecord
from mimray.tuning.score import without_held_out
from mimray.tuning.space import combinations, drawn, listed

Configured = Callable[..., SweepConfig]
RANDOM = [
    "searcher={name: random}", "budget.trials=64", "space.method.mask_ratio={uniform: [0.2, 0.9]}",
    "space.method.decoder_depth={int: [1, 4]}", "space.optim.base_lr={loguniform: [1e-4, 1e-2]}",
    "space.method.norm_pix_loss={choice: [true, false]}",
]  # fmt: skip


def test_shipped__covers_the_grid_of_the_issue(configured: Configured) -> None:
    found = combinations(configured())
    assert len(found) == 24
    assert {p["method.mask_ratio"] for p in found} == {0.15, 0.4, 0.5, 0.6, 0.75, 0.9}
    assert {p["method.decoder_depth"] for p in found} == {1, 2, 4, 8}
    assert all(load_sweep(name).about is not None for name in shipped_sweeps())


def test_drawn__stays_inside_and_depends_on_seed_and_number_alone(configured: Configured) -> None:
    config = configured(*RANDOM)
    found = listed(config)
    assert found == listed(configured(*RANDOM))
    assert found == [drawn(config, number) for number in range(64)]
    assert found != listed(configured(*RANDOM, "seed=1"))
    ratios = [p["method.mask_ratio"] for p in found or ()]
    assert 0.2 <= min(ratios) < 0.35
    assert 0.75 < max(ratios) <= 0.9
    assert {p["method.decoder_depth"] for p in found or ()} == {1, 2, 3, 4}
    assert {p["method.norm_pix_loss"] for p in found or ()} == {True, False}
    # As many below the middle of the exponents as above.
    below = np.mean([p["optim.base_lr"] < 1e-3 for p in found or ()])
    assert 0.3 < below < 0.7


@given(steps=st.integers(1, 400), count=st.integers(1, 6), factor=st.integers(2, 4))
def test_rungs__grow_by_the_factor_and_end_with_the_whole(
    steps: int, count: int, factor: int
) -> None:
    scheduler = {"name": "asha", "reduction_factor": factor, "num_rungs": count}
    config = load_sweep("mae-mask-depth").model_copy(update={"scheduler": Asha(**scheduler)})
    if steps < factor ** (count - 1):
        with pytest.raises(ConfigError, match="smaller than"):
            rung_steps(config, steps)
        return
    found = rung_steps(config, steps)
    assert found[-1] == steps
    assert [math.floor(steps / factor**k) for k in reversed(range(count))] == list(found)
    # Ray's own rungs begin at the first of ours and must not lie beyond a later one.
    assert all(found[0] * factor**k <= step for k, step in enumerate(found))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("space.method.mask_rate={grid: [0.5]}", "did you mean 'method.mask_ratio'"),
        ("space.method.mask_ratio={grid: [0.5, 1.5]}", "less than 1"),
        ("space.method.mask_ratio={grid: []}", "at least 1 item"),
        ("space.method.mask_ratio={choise: [0.5]}", "one of grid"),
        ("space.method.mask_ratio={uniform: [0.5, 0.7]}", "searcher grid goes through grids alone"),
        ("searcher={name: optuna}", "is a grid; make it a choice"),
        ("space.optim.steps={grid: [10, 20]}", "budget.steps sets it for all"),
        ("space.resources.num_workers={grid: [1, 2]}", "cannot be searched"),
        ("budget.steps=3", "smaller than 3 rungs"),
        ("budget.samples=10", "less than one rung"),
        ("score.task=guess", "knn"),
        ("score.options={kk: 3}", "kk"),
        ("base.recipe=mae-tyny", "did you mean 'mae-tiny'"),
        ("bugdet.trials=3", "unknown key"),
        ("space.method.mask_ratio={grid: [0.5, 0.5]}", "twice"),
    ],
)
def test_bad_sweeps__are_refused_with_the_reason(
    small: Callable[..., SweepPlan], override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        small(override)


def test_bounds__of_a_range_are_checked_too(small: Callable[..., SweepPlan]) -> None:
    with pytest.raises(ConfigError, match=r"space\.method\.mask_ratio"):
        small(
            "searcher={name: random}", "budget.trials=2",
            "space.method.mask_ratio={uniform: [0.2, 1.2]}", "space.method.decoder_depth=null",
        )  # fmt: skip


def test_values_that_do_not_go_together__are_found_before_the_start(
    small: Callable[..., SweepPlan],
) -> None:
    # Each is fine alone: a head a width of 16, or 3 heads with the base's width of 48.
    with pytest.raises(MimrayError, match="decoder_num_heads"):
        small(
            "space.method.decoder_width={grid: [16, 48]}",
            "space.method.decoder_num_heads={grid: [4, 16, 32]}",
        )


def test_score__needs_labels_unless_it_is_a_stand_in(
    small: Callable[..., SweepPlan], flat: Path
) -> None:
    with pytest.raises(DataError, match="rankme"):
        small(data=flat)
    plan = small("score.task=rankme", data=flat)
    assert plan.config.score.task == "rankme"


def test_steps__follow_the_batch_so_that_all_trials_see_as_many_pictures(
    small: Callable[..., SweepPlan],
) -> None:
    plan = small("space.optim.batch_size={grid: [4, 8]}")
    assert plan.rung_samples == (16, 32, 64)
    params = {"method.mask_ratio": 0.5, "method.decoder_depth": 1}
    for batch in (4, 8):
        trial = plan.trial({**params, "optim.batch_size": batch})
        assert trial.num_samples == 64
        assert list(plan.pauses(trial)) == [16 // batch, 32 // batch, 64 // batch]


def test_sets__reach_single_keys_of_the_space(configured: Configured) -> None:
    config = configured(
        "space.method.decoder_depth=null", "space.encoder.depth={grid: [2, 4]}", "seed=3"
    )
    assert list(config.space) == ["method.mask_ratio", "encoder.depth"]
    assert config.seed == 3


def test_round_trip__a_config_written_down_is_the_same(configured: Configured) -> None:
    config = configured(*RANDOM)
    assert parse_sweep(config.model_dump(mode="json"), "again") == config


def test_plan__needs_a_sweep_that_exists(labelled: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mae-mask-depth'"):
        load_sweep("mae-mask-dept")
    with pytest.raises(ConfigError, match="no sweep file"):
        load_sweep("nowhere.yaml")


def test_make_plan__starts_and_writes_nothing(small: Callable[..., SweepPlan]) -> None:
    plan = small()
    assert not plan.directory.exists()


def test_without_held_out__trains_on_no_picture_that_is_scored(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/b.png", "dog/a.png"):
        (tmp_path / "plain" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / name).touch()
    for name in ("train/a.png", "val/a.png"):
        (tmp_path / "split" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "split" / name).touch()
    tree = {"data": {"limit": 5}}
    plain, split = str(tmp_path / "plain"), str(tmp_path / "split")
    score = ScoreConfig(val_share=0.3, val_seed=2, label="kind")
    held_out = {"limit": 5, "val_share": 0.3, "val_seed": 2, "label": "kind"}
    assert without_held_out(tree, score, plain) == {"data": held_out}
    assert without_held_out(tree, score, split) == tree
    assert without_held_out(tree, ScoreConfig(task="rankme"), plain) == tree
    assert without_held_out(tree, ScoreConfig(val="elsewhere"), plain) == tree
    assert without_held_out(tree, ScoreConfig(data=split), plain) == tree
    for same in (plain, plain + "/", str(tmp_path / "split/../plain")):
        named = score.model_copy(update={"data": same})
        assert without_held_out(tree, named, plain) == {"data": held_out}


PAIRS = [[0.2, 1.0], [0.6, 1.0]]


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.crop_scale", PAIRS),
        ("optim.betas", [[0.9, 0.95], [0.9, 0.999]]),
        ("data.image_size", [32, [32, 64]]),
        ("optim.clip_grad_norm", [None, 1.0, "5e-1"]),
        ("optim.weight_decay", [0.05, {"start": 0.04, "end": 0.4}]),
        ("method", [{"name": "mae", "mask_ratio": 0.5}, {"name": "mae", "decoder_depth": 2}]),
    ],
)
def test_values__any_that_the_key_takes_can_be_searched(
    labelled: Path, tmp_path: Path, key: str, values: list[Any]
) -> None:
    tree = {
        "base": {"recipe": "mae-tiny", "set": {"data.image_size": 32, "optim.batch_size": 8}},
        "space": {key: {"choice": values}},
        "searcher": {"name": "random"},
        "budget": {"trials": 6, "steps": 2},
        "score": {"task": "rankme"},
    }
    config = parse_sweep(tree, "sweep")
    assert parse_sweep(json.loads(config.model_dump_json()), "again") == config
    plan = make_plan(config, data=str(labelled), name="s", storage=str(tmp_path), command="")
    tried = [params[key] for params in listed(config) or ()]
    assert {repr(value) for value in tried} == {repr(v) for v in config.space[key].choice}  # type: ignore[union-attr]
    hashes = {plan.trial({key: value}).hash for value in tried}
    assert len(hashes) == len(values)
    # As a later launch reads it from the trial's record.
    record = TrialRecord(number=0, params={key: tried[0]})
    read = TrialRecord.model_validate_json(record.model_dump_json())
    assert plan.trial(read.params).hash == plan.trial({key: tried[0]}).hash


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("space.data.crop_scale={grid: [[0.2, 1.0], [0.6]]}", "data.crop_scale"),
        ("space.optim.betas={grid: [[0.9]]}", "betas"),
        ("space.optim.betas={grid: [[0.9, .nan]]}", "nan is no value of a recipe"),
        ("space.data.crop_scale={grid: [[0.2, 1.0], [0.2, 1.0]]}", "twice"),
        ("space.optim={grid: [{steps: 3}]}", "space.optim.steps cannot be searched"),
    ],
)
def test_values__that_a_key_does_not_take_are_refused(
    small: Callable[..., SweepPlan], override: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        small(override)


def test_choice__keeps_texts_that_python_would_take_for_numbers() -> None:
    values = ("nan", "inf", "-Infinity", "1_0", "1e-4", "7")
    assert Choice(choice=values).choice == (*values[:4], 1e-4, 7.0)
    with pytest.raises(ValueError, match="finite number"):
        Uniform(uniform=("0", "inf"))
