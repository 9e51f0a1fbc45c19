"""The average of weights that `optim.ema` keeps of any method: exact, resumed, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimray.service.commands.export import export_run
from mimray.trainers.bundles import load_bundle, read_card
from mimray.trainers.config.advice import advice
from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.cost import estimate
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine import average, checkpoints, reshard
from mimray.trainers.engine.average import check_average, chosen_weights, with_average
from mimray.trainers.engine.deepspeed import (
    fixed_weights,
    full_state,
    initialize,
    master_weights,
)
from mimray.trainers.engine.export import read_checkpoint, write_bundle
from mimray.trainers.engine.loop import Trained, _update
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.load import load_method
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Batch, DatasetFacts
from tests.trainers.runs import Observer, run_of

MAE = {"name": "mae", "decoder_width": 8, "decoder_depth": 1, "decoder_num_heads": 1}
FACTS = DatasetFacts(uri="x", num_samples=100, fingerprint="x")


def tree_of(method: dict[str, Any] = MAE, *, stage: int = 1, **optim: Any) -> dict[str, Any]:
    return {
        "encoder": {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 4},
        "method": method,
        "data": {"image_size": 8, "num_workers": 0},
        "optim": {"batch_size": 2, "steps": 6, "base_lr": 0.1, **optim},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 1},
    }


def plan_of(method: dict[str, Any] = MAE, *, precision: str = "fp32", **changes: Any) -> Plan:
    tree = tree_of(method, **changes)
    tree["engine"]["precision"] = precision
    return resolve(parse_recipe(tree), FACTS, 1)


def learn(
    place: Path, data: Path, observer: Observer, **changes: Any
) -> tuple[RunDir, Plan, Trained]:
    recipe = parse_recipe(tree_of(**changes))
    plan, run = resolve(recipe, open_training(str(data), recipe).facts, 1), RunDir(str(place))
    run.create()
    run.write("plan.json", plan.model_dump_json().encode())
    return run, plan, run_of(plan, place, observer)


@pytest.mark.parametrize("name", ["mae", "simmim", "dvae"])
def test_average__holds_everything_that_is_trained(name: str):
    methods = {
        "mae": MAE,
        "simmim": {"name": "simmim", "mask_unit_px": None},  # a mask token of the method's own
        "dvae": {"name": "dvae", "codebook_size": 8, "decoder_widths": [8, 8], "code_dim": 4},
    }
    plan = plan_of(methods[name], ema=0.9)
    method = with_average(build_method(plan.recipe))

    assert method.ema is not None
    assert list(method.ema.parameters()) == []
    state = method.state_dict()
    trained = {n for n, p in method.named_parameters() if p.requires_grad}
    assert trained
    assert {f"ema.{name}" for name in trained} <= state.keys()
    assert chosen_weights(state, "raw").keys() == build_method(plan.recipe).state_dict().keys()
    assert with_average(build_method(plan_of(methods[name]).recipe)).ema is None


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *((1, "bf16_weights"), (3, "bf16_weights")),
        *(pytest.param(s, p, marks=pytest.mark.slow) for s, p in ((0, "bf16"), (2, "bf16"))),
    ],
)
def test_average__of_bf16_steps_is_that_in_double_precision(stage: int, precision: str):
    steps = 25
    method = {"name": "simmim", "mask_unit_px": None}
    schedule = {"start": 0.9, "end": 1.0, "warmup_start": 0.5, "warmup_steps": 5}
    plan = plan_of(method, stage=stage, precision=precision, ema=schedule, steps=steps)
    torch.manual_seed(0)
    made = with_average(build_method(plan.recipe))
    fixed, inputs = fixed_weights(made), inputs_of(plan.recipe)
    # Before the engine rounds them to its precision.
    exact = {n: p.detach().double() for n, p in made.named_parameters() if p.requires_grad}
    engine = initialize(made, plan, precision)
    momentum = plan.recipe.optim.ema
    assert momentum is not None
    rng = torch.Generator().manual_seed(0)

    for step in range(steps):
        pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=rng)
        mask = torch.tensor([[True, False, True, True]] * 2)
        batch = Batch({"images": pixels, "mask": mask}, np.arange(2), np.zeros(2))
        _update(engine, plan, iter([batch]), inputs, step, torch.device("cpu"))
        m = momentum.at(step, steps)
        for name, value in master_weights(engine):
            exact[name].mul_(m).add_(value.double(), alpha=1 - m)

    state = full_state(engine, fixed)
    found, raw = chosen_weights(state, "average"), chosen_weights(state, "raw")
    assert "mask_token" in exact
    for name, value in exact.items():
        assert (found[name].double() - value).norm() <= 1e-6 * value.norm(), name
        assert not torch.equal(found[name], raw[name]), name


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_checkpoint__holds_the_average_and_so_it_does_resharded(
    labelled: Path, tmp_path: Path, stage: int
):
    run, plan, trained = learn(tmp_path / "run", labelled, Observer(), stage=stage, ema=0.5)
    found = checkpoints.newest_whole(run)
    assert found is not None
    folder = tmp_path / "run/checkpoints" / found.name

    read = read_checkpoint(run, folder, found, plan)
    reshard.convert(folder / "state", tmp_path / "whole" / "state")
    torch.manual_seed(1)
    method = with_average(build_method(plan.recipe))
    fixed = fixed_weights(method)
    engine = initialize(method, plan, "fp32")
    reshard.load(engine, tmp_path / "whole", "state")

    assert any(name.startswith("ema.residuals.") and v.any() for name, v in read.items())
    for state in (read, full_state(engine, fixed)):
        assert state.keys() == trained.state.keys()
        assert all(torch.equal(state[name], v) for name, v in trained.state.items())


@pytest.mark.usefixtures("process_group")
def test_train__with_an_average_learns_the_same_and_continues_it(labelled: Path, tmp_path: Path):
    plain, whole, cut = Observer(), Observer(), Observer(cut_at=5)
    learn(tmp_path / "plain", labelled, plain)
    run, plan, wanted = learn(tmp_path / "whole", labelled, whole, ema=0.5)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", labelled, cut, ema=0.5)
    cut.cut_at = None
    _, _, found = learn(tmp_path / "cut", labelled, cut, ema=0.5)

    assert plain.losses == whole.losses == cut.losses
    assert all(torch.equal(found.state[n], v) for n, v in wanted.state.items())

    card = write_bundle(run, plan, wanted.state, step=6, name="it", command="test")
    assert card.weights == "average"
    _assert_encoder(run / "bundle", chosen_weights(wanted.state, "average"))
    decoder = load_method(tmp_path / "whole").state_dict()
    assert torch.equal(decoder["decoder.pred.weight"], wanted.state["ema.decoder.pred.weight"])

    export_run(str(tmp_path / "whole"), None, "bundle", "raw")
    assert read_card(tmp_path / "whole/bundle-raw").weights == "raw"
    _assert_encoder(run / "bundle-raw", chosen_weights(wanted.state, "raw"))
    out = tmp_path / "out"
    export_run(str(tmp_path / "whole"), out, "bundle", "average")
    _assert_encoder(RunDir(str(out)), chosen_weights(wanted.state, "average"))
    with pytest.raises(BundleError, match="averaged weights alone"):
        export_run(str(out), None, "bundle", "raw")


def _assert_encoder(bundle: RunDir, state: dict[str, Tensor]) -> None:
    for name, value in load_bundle(bundle.uri).encoder.state_dict().items():
        assert torch.equal(value, state[f"encoder.{name}"]), name


@pytest.mark.usefixtures("process_group")
def test_export__of_a_run_without_an_average_says_how_to_keep_one(labelled: Path, tmp_path: Path):
    run, plan, trained = learn(tmp_path / "run", labelled, Observer(), steps=1)
    card = write_bundle(run, plan, trained.state, step=1, name="it", command="test")

    assert "weights" not in card.model_dump()  # as cards have always been
    export_run(str(tmp_path / "run"), None, "bundle", "raw")
    with pytest.raises(BundleError, match="no average") as refused:
        export_run(str(tmp_path / "run"), None, "bundle", "average")
    assert "optim.ema" in refused.value.hint


@pytest.mark.parametrize(
    "value",
    [1.0, 1.5, -0.1, True, "0.9", {"start": 0.9, "end": 1.2}, {"start": 0.9, "warmup_start": -1}],
)
def test_recipe__refuses_what_is_no_momentum(value: Any):
    with pytest.raises(ConfigError, match=r"ema|momentum") as refused:
        parse_recipe(tree_of(ema=value))
    assert "\n" not in str(refused.value)


def test_plan__without_an_average_is_as_before_and_with_one_is_another():
    plain = plan_of()

    assert plan_of(ema=None).hash == plain.hash
    assert "ema" not in plain.model_dump_json()
    assert plan_of(ema=0.9).hash != plain.hash
    assert Plan.model_validate_json(plan_of(ema=0.9).model_dump_json()) == plan_of(ema=0.9)


def test_check__a_method_that_exports_an_average_needs_no_other(monkeypatch: pytest.MonkeyPatch):
    class Teacher(Method):
        result = "averages.encoder"

    recipe = plan_of(ema=0.9).recipe
    check_average(recipe)
    monkeypatch.setattr(average, "method_class", lambda name: Teacher)
    with pytest.raises(ConfigError, match="exports an average of it already"):
        check_average(recipe)
    check_average(plan_of().recipe)


def test_advice__an_average_longer_than_the_run_keeps_its_start():
    (said,) = (w for w in advice(plan_of(ema=0.999, steps=200)) if "optim.ema" in w)

    assert "82%" in said  # .999 to the 200th
    assert "optim.ema=0.95" in said
    assert not [w for w in advice(plan_of(ema=0.95, steps=200)) if "optim.ema" in w]


@pytest.mark.parametrize("stage", [0, 3])
def test_cost__counts_the_average_at_every_stage(stage: int):
    plain, averaged = (estimate(plan_of(ema=ema), "fp32") for ema in (None, 0.9))
    trained = averaged.trained

    assert plain.average_bytes == 0
    assert 6 * trained <= averaged.average_bytes <= 6 * trained + 4 * 8 * 64  # fixed positions
    peaks = [cost.memory[stage, False].peak for cost in (plain, averaged)]
    assert peaks[1] - peaks[0] == averaged.average_bytes
