"""The running probe: figures of the encoder on the way, and a training that does not feel it."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mimray.trainers.config.evaluation.knn import KnnConfig
from mimray.trainers.config.run import Plan, differences, parse_plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.engine.loop import Trained
from mimray.trainers.engine.metrics import probe_curve, read_metrics
from mimray.trainers.errors import ConfigError, DataError, MimrayError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.probes.knn import evaluate
from mimray.trainers.evaluation.running import (
    RunningProbe,
    check_probe,
    figure_name,
    placed_probe,
)
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.storage import RunDir
from tests.trainers.runs import CPU, Observer, group_of_two, run_of, write_noise

pytestmark = pytest.mark.usefixtures("process_group", "without_ray")
STEPS = 5


def tree_of(stage: int = 1, ema: float | None = None, **probe: Any) -> dict[str, Any]:
    return {
        "encoder": {
            "name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8,
            "drop_path": 0.2,
        },
        "method": {
            "name": "mae", "decoder_width": 8, "decoder_depth": 1, "decoder_num_heads": 2,
        },
        "data": {"image_size": 16, "num_workers": 0},
        "optim": {"batch_size": 4, "steps": STEPS, "base_lr": 0.1, "ema": ema},
        "engine": {"zero_stage": stage, "precision": "fp32", "micro_batch_size": 2},
        "checkpoint": {"every_steps": 2},
        "logging": {"every_steps": 1},
        "evaluation": probe,
    }  # fmt: skip


def plan_of(pictures: Path, world_size: int = 1, **changes: Any) -> Plan:
    recipe = parse_recipe(tree_of(**changes))
    return resolve(recipe, open_training(str(pictures), recipe).facts, world_size)


def learn(plan: Plan, place: Path, observer: Observer | None = None) -> Trained:
    probe = None
    if plan.recipe.evaluation.every_steps:
        probe = RunningProbe(plan, RunDir(str(place)), CPU, lambda phase, done, total: None)
    return run_of(plan, place, observer, probe)


def rows_of(place: Path) -> list[dict[str, Any]]:
    """The rows of a run without clocks and speeds."""
    measured = ("time", "images_per_s", "data_wait", "memory_mib", "probe_seconds")
    rows = read_metrics(RunDir(str(place)))
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


def curve_of(place: Path) -> dict[int, float]:
    curve = probe_curve(read_metrics(RunDir(str(place))))
    assert curve is not None
    return {point.step: point.value for point in curve.points}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_probe__leaves_the_training_as_it_is(colours: Path, tmp_path: Path, stage: int):
    plain = learn(plan_of(colours, stage=stage), tmp_path / "plain")
    plan = plan_of(colours, stage=stage, every_steps=2, task="knn", data=str(colours), limit=10)
    probed = learn(plan, tmp_path / "probed")

    without = [
        {k: v for k, v in row.items() if not k.startswith("probe")}
        for row in rows_of(tmp_path / "probed")
    ]
    assert without == rows_of(tmp_path / "plain")
    assert all(torch.equal(probed.state[n], v) for n, v in plain.state.items())
    assert list(curve_of(tmp_path / "probed")) == [2, 4, 5]  # at the end, too
    assert probed.last["probe_seconds"] > 0
    assert 0 < probed.last["probe_knn_accuracy_standard_error"] < 0.5


@pytest.mark.slow
def test_probe__of_two_ranks_is_one_figure_and_leaves_both_as_they_are(
    colours: Path, tmp_path: Path, run_ranks: Callable[..., None]
):
    run_ranks(__file__, tmp_path, str(colours))

    assert list(curve_of(tmp_path / "probed")) == [2, 4, 5]


def train_as_rank(place: Path, pictures: Path) -> None:
    plain = plan_of(pictures, 2, stage=3, ema=0.5)
    probed = plan_of(
        pictures, 2, stage=3, ema=0.5, every_steps=2, task="knn", data=str(pictures), limit=10
    )
    states = [
        learn(plan, place / name).state for plan, name in ((plain, "plain"), (probed, "probed"))
    ]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


@pytest.mark.parametrize("ema", [None, 0.5])
def test_probe__is_the_score_of_the_bundle_to_come(
    colours: Path, tmp_path: Path, ema: float | None, setting: Callable[..., Setting]
):
    plan = plan_of(colours, ema=ema, every_steps=3, data=str(colours), limit=15)
    trained = learn(plan, tmp_path / "run")
    run = RunDir(str(tmp_path / "run"))
    write_bundle(run, plan, trained.state, step=STEPS, name="it", command="test")

    ref = EncoderRef.parse(str(tmp_path / "run"))
    wanted = evaluate(ref, setting(colours, limit=15), KnnConfig())

    assert curve_of(tmp_path / "run")[STEPS] == wanted.headline
    result = run.read("probe/knn.json").decode()
    assert f'"step": {STEPS}' in result
    assert f'"headline": {wanted.headline}' in result
    assert run.exists("probe/knn.png")


def test_probe__of_a_run_that_is_killed_is_neither_lost_nor_doubled(colours: Path, tmp_path: Path):
    plan = plan_of(colours, every_steps=3, task="rankme", limit=10)
    learn(plan, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):  # after the row of step 3, before a checkpoint
        learn(plan, tmp_path / "cut", Observer(cut_at=3))
    learn(plan, tmp_path / "cut")

    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert list(curve_of(tmp_path / "cut")) == [3, 5]


def test_probe__uses_none_of_the_processes_random_numbers(colours: Path, tmp_path: Path):
    plan = plan_of(colours, every_steps=1, task="rankme", limit=10)
    run = RunDir(str(tmp_path))
    state = learn(plan_of(colours), tmp_path / "run").state
    threads, generator = torch.get_num_threads(), torch.random.get_rng_state()
    calls: list[int] = []
    probe = RunningProbe(plan, run, CPU, lambda phase, done, total: None)

    wanted = {name: value for name, value in state.items() if probe.wants(name)}
    figures = probe(3, wanted, alive=lambda: calls.append(1))

    assert figures["probe_rankme"] > 1
    assert calls  # other ranks hear that this one is at work
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert set(wanted) == {name for name in state if name.startswith("encoder.")}


def test_probe__that_fails_is_told_and_the_training_goes_on(
    colours: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    other = shutil.copytree(colours, tmp_path / "other")
    plan = plan_of(colours, every_steps=2, task="knn", data=str(other))
    shutil.rmtree(other)

    with caplog.at_level(logging.WARNING):
        learn(plan, tmp_path / "run")

    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5]
    assert probe_curve(read_metrics(RunDir(str(tmp_path / "run")))) is None
    assert "no score at step 2: " in caplog.text
    assert "the training goes on" in caplog.text


def test_probe__may_change_when_a_run_is_continued(colours: Path):
    plain = plan_of(colours)
    probed = plan_of(colours, every_steps=2, task="knn", data=str(colours))

    assert differences(plain, probed) == []
    assert probed.hash == plain.hash
    assert parse_plan(probed.model_dump_json(), "plan.json", "") == probed


def test_check__refuses_what_could_not_be_measured(colours: Path, tmp_path: Path):
    bare = write_noise(tmp_path / "bare", 6)
    for probe, error, said in (
        ({"task": "knm"}, ConfigError, r"evaluation.task knm is no task.*knn, rankme"),
        ({"task": "linear"}, ConfigError, "evaluation.task linear trains a head"),
        ({"data": str(bare)}, DataError, "evaluation.task knn needs labels.*has no labels"),
        ({"data": str(tmp_path / "nowhere")}, MimrayError, "nowhere"),
        ({"data": str(colours), "val": str(tmp_path / "gone")}, MimrayError, "gone"),
        ({"data": str(colours), "options": {"q": 3}}, ConfigError, "unknown key 'q'"),
        ({"data": str(colours), "label": "colour"}, DataError, "colour"),
    ):
        with pytest.raises(error, match=said) as refused:
            check(colours, **probe)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        ({"data": "x"}, "evaluation needs 'every_steps'"),
        ({"every_steps": -1}, "every_steps"),
        ({"every_steps": 10, "limit": 0}, "limit"),
        ({"every_steps": 10, "weights": "teacher"}, "'exported' or 'trained'"),
        ({"every": 10}, "every_steps"),
    ],
)
def test_recipe__refuses_a_probe_that_is_none(probe: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        parse_recipe(tree_of(**probe))


def check(pictures: Path, **probe: Any) -> str:
    recipe = placed_probe(parse_recipe(tree_of(**{"every_steps": 2, **probe})))
    return check_probe(recipe, open_training(str(pictures), recipe))


def test_check__says_on_what_it_scores_and_what_was_trained_on(colours: Path, tmp_path: Path):
    assert check(colours, every_steps=0) == ""
    # The dataset's own validation split, which is not trained on.
    assert check(colours) == f"probe every 2 steps: rankme of 18 pictures of {colours}"
    said = check(colours, data=str(colours), limit=16)
    assert said == f"probe every 2 steps: knn of 16 pictures of {colours} by 16 labelled ones"
    bare = write_noise(tmp_path / "bare", 6)
    assert (
        check(bare) == f"probe every 2 steps: rankme of 6 pictures of {bare}, all trained on, too"
    )
    train = colours / "train"
    assert check(train, task="knn").endswith("by 48 labelled ones, all trained on, too")


def test_check__scores_on_the_pictures_that_the_training_leaves_out(colours: Path):
    train = colours / "train"
    tree = tree_of(every_steps=2, data=str(train))
    tree["data"]["val_share"] = 0.3
    recipe = placed_probe(parse_recipe(tree))

    said = check_probe(recipe, open_training(str(train), recipe))

    assert said == f"probe every 2 steps: knn of 18 pictures of {train} by 42 labelled ones"


def test_probe__places_are_absolute(monkeypatch: pytest.MonkeyPatch, colours: Path):
    monkeypatch.chdir(colours)
    recipe = placed_probe(parse_recipe(tree_of(every_steps=2, data="train", val="s3://b/val")))

    assert recipe.evaluation.data == str(colours / "train")
    assert recipe.evaluation.val == "s3://b/val"


def test_figure_name__is_no_word_twice():
    assert figure_name("rankme", "RankMe") == "probe_rankme"
    assert figure_name("knn", "accuracy") == "probe_knn_accuracy"
    assert figure_name("dense-knn", "mIoU") == "probe_dense_knn_miou"


if __name__ == "__main__":
    with group_of_two(Path(sys.argv[1]), int(sys.argv[2])):
        train_as_rank(Path(sys.argv[1]), Path(sys.argv[3]))
