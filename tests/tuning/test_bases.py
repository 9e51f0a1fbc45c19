"""The method as a dimension of a sweep: recipes, lengths and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mimray.trainers.config.recipes import shipped_recipes
from mimray.trainers.errors import ConfigError, MimrayError, RunConflictError
from mimray.tuning.compute import training_flops
from mimray.tuning.config import SweepConfig
from mimray.tuning.plan import SweepPlan, check_continues, load_sweep, make_plan, new_record
from mimray.tuning.report import tables
from mimray.tuning.report.summary import summarise
from mimray.tuning.space import listed

ENCODER = ("encoder.depth=1", "encoder.width=32", "encoder.num_heads=2", "data.image_size=32")
METHODS = "space.method.name={choice: [mae, simmim, maskfeat]}"
Planned = Callable[..., SweepPlan]


@pytest.fixture
def planned(labelled: Path, tmp_path: Path) -> Planned:
    """A plan of a sweep over methods of one small encoder; further `a.b=c` after that."""
    tree = {"base": {"recipe": "mae-tiny"}, "space": {"optim.base_lr": {"choice": [1e-3]}}}
    file = tmp_path / "methods.yaml"
    file.write_text(yaml.safe_dump(tree))

    def make(*overrides: str) -> SweepPlan:
        shared = [f"base.set.{item}" for item in (*ENCODER, "optim.batch_size=8")]
        search = ["searcher={name: random}", "budget.trials=6", "budget.steps=40", METHODS]
        config = load_sweep(str(file), [*shared, *search, *overrides])
        return make_plan(
            config, data=str(labelled), name="sweep", storage=str(tmp_path), command="test"
        )

    return make


def test_methods__begin_with_recipes_of_their_own(planned: Planned) -> None:
    plan = planned()
    recipes = {
        name: plan.trial({"method.name": name, "optim.base_lr": 1e-3}).recipe
        for name in plan.config.methods
    }
    assert recipes["mae"].method.model_dump()["decoder_width"] == 64  # mae-tiny's, not 512
    assert recipes["maskfeat"].method.model_dump()["min_block_patches"] == 5  # maskfeat-tiny's
    assert recipes["simmim"].optim.clip_grad_norm == 5.0  # simmim-tiny's, which mae-tiny lacks
    assert recipes["mae"].optim.clip_grad_norm is None
    assert recipes["simmim"].data.crop_scale == (0.67, 1.0)
    # What the sweep sets is alike in all.
    assert {recipe.encoder.model_dump()["depth"] for recipe in recipes.values()} == {1}
    assert {recipe.optim.base_lr for recipe in recipes.values()} == {1e-3}
    assert plan.config.base.methods["simmim"].recipe == "simmim-tiny"
    assert [line.split(",")[0] for line in plan.methods_text()] == [
        "method mae: recipe mae-tiny",
        "method simmim: recipe simmim-tiny",
        "method maskfeat: recipe maskfeat-tiny",
    ]


def test_methods__are_drawn_as_any_value(planned: Planned) -> None:
    plan = planned("budget.trials=64")
    found = [params["method.name"] for params in listed(plan.config) or ()]
    assert set(found) == {"mae", "simmim", "maskfeat"}
    assert [plan.trial(p).recipe.method.name for p in listed(plan.config) or ()] == found


def test_methods__have_sets_of_their_own(planned: Planned) -> None:
    plan = planned("base.methods.mae.set.method.decoder_depth=2", "base.set.data.hflip=0.0")
    mae, simmim = (plan.trial({"method.name": name}).recipe for name in ("mae", "simmim"))
    assert mae.method.model_dump()["decoder_depth"] == 2
    assert mae.data.hflip == simmim.data.hflip == 0.0


def test_recipes__of_methods_that_are_not_searched_change_nothing(planned: Planned) -> None:
    plan = planned("base.methods.beit.recipe=beit-tiny")
    assert plan.config == planned().config


def test_equal_flops__give_methods_steps_by_their_cost(planned: Planned) -> None:
    plan = planned("budget.unit=flops", "budget.steps=400")
    trials = {name: plan.trial({"method.name": name}) for name in plan.config.methods}
    spent = {name: training_flops(trial) * trial.num_samples for name, trial in trials.items()}
    assert trials["mae"].steps == 400
    assert trials["simmim"].steps != 400
    for name, flops in spent.items():
        assert flops == pytest.approx(spent["mae"], rel=1 / trials[name].steps)
    # The warm-up keeps its share of the length: a tenth.
    for trial in trials.values():
        assert trial.warmup_steps == pytest.approx(trial.steps / 10, abs=1)


def test_equal_pictures__whatever_batch_a_methods_recipe_has(planned: Planned) -> None:
    plan = planned("base.methods.simmim.set.optim.batch_size=4")
    trials = [plan.trial({"method.name": name}) for name in plan.config.methods]
    assert {trial.num_samples for trial in trials} == {320}
    assert [trial.steps for trial in trials] == [40, 80, 40]
    assert [trial.warmup_steps for trial in trials] == [4, 8, 4]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["space.method.name={choice: [mae, simim]}"], "'simim' is no method, did you mean 'simmi"),
        (["space.method.name={choice: [mae, [simmim]]}"], "is no method"),
        (["space.method.name={choice: [mae, finetune]}"], "has the labels already"),
        (["space.method.name={int: [1, 2]}"], "methods are listed"),
        (["space.method.decoder_depth={choice: [1, 2]}"], "simmim has no such key.*mae"),
        (["space.method.mask_ratios={choice: [0.5]}"], "did you mean 'method.mask_ratio'"),
        (["base.set.method.decoder_depth=2"], "base.set.method.decoder_depth: method simmim has"),
        (["base.set.method.name=simmim"], "both choose the method"),
        (["space.method={choice: [{name: mae}]}"], "both choose the method"),
        (["base.methods.biet.recipe=beit-tiny"], "'biet' is no method, did you mean 'beit'"),
        (["space.method.name=null", "base.methods.mae.recipe=mae-tiny"], "goes with space.method"),
        (["base.methods.mae.recipe=simmim-tiny"], "a recipe of simmim, not of mae"),
        (["base.methods.mae.recipes=mae-tiny"], "unknown key"),
        (["base.methods.simmim.set.data.limit=10"], "unlike data cannot be ranked"),
        (["base.set.data.stream=ray", "base.set.data.num_workers=1"], "decodes beside its workers"),
        (["base.methods.mae.set.method.mask_ratio=2"], "less than 1"),
        (["base.methods.mae.set.method.mask_ratio"], "not of the form a.b=value"),
        (["base.recipe=mae-vit-s", "space.method.name={choice: [mae, vae]}"], "vae-tiny"),
        (["space.method.name={choice: [mae, beit]}"], "dvae-tiny"),
        (["space.method.name={choice: [mae, mae]}"], "twice"),
        ([METHODS.replace("choice", "grid")], "is a grid; make it a choice"),
    ],
)
def test_bad_sweeps__are_refused_with_the_reason(
    planned: Planned, overrides: list[str], said: str
) -> None:
    with pytest.raises(MimrayError, match=said):
        planned(*overrides)


def test_recipes_of_ones_own__need_names(planned: Planned, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    recipe = shipped_recipes()["mae-tiny"].read_text()
    own.write_text(recipe)
    with pytest.raises(ConfigError, match="method simmim needs a recipe to begin with"):
        planned(f"base.recipe={own}")
    plan = planned(
        f"base.recipe={own}",
        "base.methods.simmim.recipe=simmim-tiny",
        "base.methods.maskfeat.recipe=maskfeat-tiny",
    )
    assert plan.trial({"method.name": "mae"}).recipe.method.name == "mae"


def test_another_recipe__is_another_sweep(planned: Planned) -> None:
    plan = planned()
    record = new_record(plan, ("study", "sqlite://"))
    check_continues(plan, record)
    other = planned("base.methods.simmim.set.method.mask_ratio=0.5")
    with pytest.raises(RunConflictError, match="another sweep: base.methods.simmim: "):
        check_continues(other, record)


def test_report__says_what_trials_had_in_common(planned: Planned) -> None:
    for overrides, said in (((), "as many pictures"), (("budget.unit=flops",), "as many FLOPs")):
        record = new_record(planned("budget.steps=400", *overrides), ("study", "sqlite://"))
        (note,) = [one for one in tables.notes(summarise(record)) if "simmim of simmim-tiny" in one]
        assert said in note


def test_shipped__compares_one_encoder(labelled: Path, tmp_path: Path) -> None:
    config: SweepConfig = load_sweep("methods-tiny", ["base.set.optim.batch_size=8"])
    plan = make_plan(
        config, data=str(labelled), name="sweep", storage=str(tmp_path), command="test"
    )
    recipes = [plan.trial(params).recipe for params in listed(config) or ()]
    assert len({recipe.encoder.model_dump_json() for recipe in recipes}) == 1
    assert len({recipe.data.model_dump_json() for recipe in recipes}) == 1
    assert {recipe.method.name for recipe in recipes} == {"mae", "simmim", "maskfeat", "ae"}
