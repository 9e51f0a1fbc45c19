"""Fine-tuning as a task: the recipe it makes, and one real run on Ray that learns two colours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mimray.service.cli.main import cli
from mimray.service.commands.finetune import evaluate, recipe_for
from mimray.service.commands.tasks import TASKS
from mimray.trainers import load_bundle, load_method
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.evaluation.finetune import FinetuneTask
from mimray.trainers.config.finetune import FinetuneConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Plan
from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.selection import open_training
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.probes.classifier import classify
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.evaluation.splits import open_splits
from mimray.trainers.evaluation.tasks import task_config
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.models import build_encoder

SIZE = (16, 16)
PLAIN = (
    "data.num_workers=0", "data.auto_augment=''", "method.mixup=0", "method.label_smoothing=0",
    "optim.batch_size=8", "optim.steps=30", "optim.warmup_steps=3", "optim.warmup_epochs=null",
    "optim.base_lr=0.03", "optim.layer_decay=0.9", "logging.pictures_every_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures of two colours, 8 of each to learn from and 5 of each to score on."""
    folder, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 5)):
        for name, colour in {"blue": (60, 60, 190), "red": (190, 60, 60)}.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.array(colour) + rng.integers(0, 60, (20, 24, 3))
                file = folder / split / name / f"{number}.png"
                Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> EncoderRef:
    """An encoder at hand; it has learnt nothing."""
    config = ViTConfig(name="vit", width=16, depth=2, num_heads=2, patch_size=8)
    card = BundleCard(
        name="tiny", encoder=config, image_size=SIZE, channels=3, mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4), interpolation="bilinear",
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    save_bundle(folder, card, build_encoder(config, SIZE).state_dict())
    return EncoderRef.parse(str(folder))


@pytest.fixture
def setting(colours: Path, tmp_path: Path) -> Setting:
    return Setting(
        data=str(colours), val=None, limit=None, seed=3, skip_invalid=False, device="auto",
        folder=tmp_path, progress=lambda phase, done, total: None,
    )  # fmt: skip


def test_recipe__is_the_named_one_with_the_encoder_of_the_bundle(ref: EncoderRef, setting: Setting):
    config = FinetuneTask(epochs=5, overrides=("optim.base_lr=1e-3", "method.cutmix=0.5"))

    recipe = recipe_for(ref, replace(setting, limit=7), config, 2)

    shape = recipe.encoder.model_dump(include={"width", "depth", "patch_size"})
    assert shape == {"width": 16, "depth": 2, "patch_size": 8}
    assert (recipe.encoder.positions, recipe.encoder.drop_path) == ("learned", 0.05)
    assert (recipe.data.image_size, recipe.data.mean) == (SIZE, (0.5, 0.4, 0.3))
    assert (recipe.data.interpolation, recipe.data.limit, recipe.seed) == ("bilinear", 7, 3)
    assert (recipe.optim.epochs, recipe.optim.warmup_epochs) == (5, 0.5)  # a tenth, as it was
    assert (recipe.optim.base_lr, recipe.optim.layer_decay) == (1e-3, 0.75)
    method = recipe.method
    assert isinstance(method, FinetuneConfig)
    assert (method.bundle, method.num_classes, method.cutmix) == (ref.bundle, 2, 0.5)


def test_recipe__an_untrained_encoder_begins_afresh(ref: EncoderRef, setting: Setting):
    fresh = EncoderRef.parse(f"untrained:{ref.text}")

    recipe = recipe_for(fresh, setting, FinetuneTask(image_size=24), 2)

    assert recipe.method.bundle == ""
    assert recipe.data.image_size == (24, 24)


def test_task__one_override_needs_no_list(ref: EncoderRef, setting: Setting):
    config = task_config(TASKS["finetune"], ["overrides=method.mixup=0.4"], epochs=3)
    assert isinstance(config, FinetuneTask)

    recipe = recipe_for(ref, setting, config, 2)

    assert (recipe.method.mixup, recipe.optim.epochs) == (0.4, 3)


def test_recipe__of_another_method_is_refused(ref: EncoderRef, setting: Setting):
    with pytest.raises(ConfigError, match="recipe mae-tiny is of method mae"):
        recipe_for(ref, setting, FinetuneTask(recipe="mae-tiny"), 2)


@pytest.mark.usefixtures("ray_session")
def test_evaluate__learns_colours_keeps_the_bundle_and_answers_again(
    ref: EncoderRef, setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    told: set[str] = set()
    setting = replace(setting, progress=lambda phase, done, total: told.add(phase))
    config = FinetuneTask(storage=str(tmp_path / "runs"), name="it", overrides=PLAIN)

    score = evaluate(ref, setting, config)

    assert (score.metric, score.headline, score.metrics["accuracy"]) == ("accuracy", 1.0, 1.0)
    assert score.metrics["per_class_accuracy"] == {"blue": 1.0, "red": 1.0}
    assert score.metrics["confusion"]["true_by_predicted"] == [[5, 0], [0, 5]]
    assert (score.num_train, score.num_val, score.metrics["steps"]) == (16, 10, 30)
    assert told == {"fine-tuning", "scoring"}
    assert score.pictures["finetune.png"].startswith(b"\x89PNG")
    json.dumps(score.metrics)

    # The run is a run like any other, and its bundle a bundle.
    run = tmp_path / "runs/it"
    plan = Plan.model_validate_json((run / "plan.json").read_bytes())
    assert plan.recipe.method.bundle_sha256 == ref.card().weights_sha256
    card = read_card(run)
    assert (card.method, card.pooling, card.image_size) == ("finetune", "mean", SIZE)
    assert load_bundle(run)(torch.zeros(1, 3, *SIZE)).tokens.shape == (1, 4, 16)
    method = load_method(run)
    moved = method.encoder.state_dict()["patch_embed.proj.weight"]
    assert not torch.equal(moved, ref.load().encoder.state_dict()["patch_embed.proj.weight"])
    refusal = CliRunner().invoke(
        cli, ["reconstruct", str(run), str(next(Path(setting.data).rglob("*.png"))), "--out",
              str(tmp_path / "x.png")]
    )  # fmt: skip
    assert refusal.exit_code == 2
    assert "predicts classes" in refusal.stderr

    # Asked again, what is there is scored: the same figures and no new step.
    written = (run / "metrics.jsonl").read_bytes()
    assert evaluate(ref, setting, config).metrics == score.metrics
    assert (run / "metrics.jsonl").read_bytes() == written


def test_classify__a_broken_picture_is_named_or_left_out(
    ref: EncoderRef, setting: Setting, tmp_path: Path
):
    method = build_method(recipe_for(ref, setting, FinetuneTask(), 2))
    for name in ("blue", "red"):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(tmp_path / f"val/{name}/0.png")
    (tmp_path / "val/red/1.png").write_bytes(b"no picture")
    setting = replace(setting, val=str(tmp_path / "val"), device="cpu")
    splits = open_splits(setting)

    with pytest.raises(DataError, match=r"red/1\.png: not a picture.*--skip-invalid"):
        classify(method, splits, setting, batch_size=2)
    found = classify(method, splits, replace(setting, skip_invalid=True), batch_size=2)

    assert found.num_pictures == 2
    assert "red/1.png" in found.notes[0]


def test_classify__a_class_that_is_not_there_is_reported(
    ref: EncoderRef, setting: Setting, tmp_path: Path
):
    for split, names in {"train": ("ant", "bee", "cat"), "val": ("bee", "cat")}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / "0.png")
    setting = replace(setting, data=str(tmp_path), device="cpu")
    method = build_method(recipe_for(ref, setting, FinetuneTask(), 3))
    with torch.no_grad():
        method.head.bias[2] = 1  # it says cat, whatever it sees

    found = classify(method, open_splits(setting), setting, batch_size=2)

    # The labels of the split are 0 and 1, for it does not know the first class.
    assert found.metrics["per_class_accuracy"] == {"ant": None, "bee": 0.0, "cat": 1.0}
    assert found.metrics["confusion"]["true_by_predicted"] == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]
    assert (found.accuracy, found.metrics["top5_accuracy"]) == (0.5, None)
    assert found.notes == ("no picture of ant to score on",)


def test_classify__a_class_without_training_pictures_counts_as_wrong(
    ref: EncoderRef, setting: Setting, tmp_path: Path
):
    for split, names in {"train": ("ant", "bee"), "val": ("ant", "bee", "cow")}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(tmp_path / split / name / "0.png")
    setting = replace(setting, data=str(tmp_path), device="cpu")
    splits = open_splits(setting)
    method = build_method(recipe_for(ref, setting, FinetuneTask(), len(splits.learnt_names)))

    found = classify(method, splits, setting, batch_size=2)

    assert found.accuracy == pytest.approx(1 / 3)
    assert found.metrics["per_class_accuracy"]["cow"] == 0
    assert np.isfinite(found.metrics["loss"])


def test_recipe__leaves_out_what_is_held_out_to_score_on(
    ref: EncoderRef, setting: Setting, colours: Path
):
    setting = replace(setting, data=str(colours / "train"), hold_out=HoldOut(0.25, seed=1))
    splits = open_splits(setting)
    recipe = recipe_for(ref, setting, FinetuneTask(), 2, held_out=splits.hold_out is not None)

    source = open_training(setting.data, recipe)

    assert source.facts.fingerprint == splits.train.facts.fingerprint
    assert not set(source.identities()) & set(splits.val.identities())
    assert recipe_for(ref, setting, FinetuneTask(), 2).data.val_share == 0
