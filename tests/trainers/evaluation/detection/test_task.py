from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.detection import DetectionConfig
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.errors import ConfigError, DataError, EmptyDatasetError
from mimray.trainers.evaluation.detection.detector import load_head
from mimray.trainers.evaluation.detection.task import evaluate
from mimray.trainers.evaluation.features.map_cache import CachedEncoder
from mimray.trainers.evaluation.score import Setting

Make = Callable[..., FrozenEncoder]
MakeSetting = Callable[..., Setting]
FEW = {"epochs": 2, "batch_size": 2, "pyramid_width": 8, "warmup_epochs": 0, "lr": 3e-3}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task") / "scenes"
    write_scenes(folder, num_train=4, num_val=3, image_size=(48, 64), num_classes=2)
    return folder


@pytest.fixture
def spoilt(scenes: Path, tmp_path: Path) -> Callable[[str, Callable[[dict], object]], Path]:
    """Copies the scenes with one file changed."""

    def make(split: str, change: Callable[[dict], object]) -> Path:
        for name in ("train", "val"):
            (tmp_path / "spoilt" / name).mkdir(parents=True)
            (tmp_path / "spoilt" / name / "images").symlink_to(scenes / name / "images")
            tree = json.loads((scenes / name / "instances.json").read_text())
            if name == split:
                change(tree)
            (tmp_path / "spoilt" / name / "instances.json").write_text(json.dumps(tree))
        return tmp_path / "spoilt"

    return make


@pytest.mark.parametrize(
    "kind",
    [
        "retinanet",
        pytest.param("faster_rcnn", marks=pytest.mark.slow),
        pytest.param("mask_rcnn", marks=pytest.mark.slow),
    ],
)
def test_training__learns_four_pictures_by_heart(
    vit: Make, scenes: Path, setting: MakeSetting, tmp_path: Path, kind: str
) -> None:
    encoder = CachedEncoder(vit(width=48), "vit", tmp_path / "maps")
    train = scenes / "train" / "instances.json"
    config = DetectionConfig.model_validate(
        {"detector": kind, "epochs": 70, "pyramid_width": 32, "lr": 3e-3, "num_views": 1}
    )
    score = evaluate(lambda: encoder, setting(train, val=str(train)), config)
    assert score.metric == "AP"
    assert score.metrics["AP50"] > 0.9
    assert score.headline == score.metrics["AP"] > 0.5
    assert (score.num_train, score.num_val) == (4, 4)
    assert encoder.misses == 4  # each picture was encoded once
    name = "classification" if kind == "retinanet" else "loss_classifier"
    losses = score.metrics["training"]
    assert losses[-1][name] < losses[0][name] / 3
    # The files find the same again, on a picture of one's own.
    (tmp_path / "head").mkdir()
    for name, content in score.files.items():
        (tmp_path / "head" / name).write_bytes(content)
    detector = load_head(tmp_path / "head", encoder)
    picture = Image.open(scenes / "train" / "images" / "000000.jpg").convert("RGB")
    tree = json.loads(train.read_text())
    here = [thing for thing in tree["annotations"] if thing["image_id"] == 1]
    best = detector.detect([picture])[0].labels[: len(here)]
    categories = {category["id"]: category["name"] for category in tree["categories"]}
    wanted = sorted(categories[thing["category_id"]] for thing in here)
    assert sorted(detector.class_names[label] for label in best) == wanted


def test_mask_rcnn__scores_boxes_and_masks_and_draws_them(
    vit: Make, scenes: Path, setting: MakeSetting
) -> None:
    shown: list[tuple[str, int, int]] = []
    told = replace(setting(scenes), progress=lambda *state: shown.append(state))
    config = DetectionConfig.model_validate(
        {
            "detector": "mask_rcnn",
            "score_threshold": 0.0,
            "shown_score": 0.0,
            "max_detections": 8,
            **FEW,
        }
    )
    score = evaluate(vit, told, config)
    assert 0 <= score.metrics["mask"]["AP50"] <= 1
    assert set(score.metrics["mask"]["per_class"]) == {"disc", "rectangle"}
    assert "loss_mask" in score.metrics["training"][0]
    assert score.metrics["image_size"] == [48, 64]
    assert score.metrics["layers"] == [1]
    assert json.loads(json.dumps(score.metrics)) == score.metrics
    for content in score.pictures.values():
        assert content.startswith(b"\x89PNG")
    assert set(score.pictures) == {"detection.png", "detection_curves.png"}
    assert {phase for phase, _, _ in shown} == {
        "checking pictures",
        "training the detector",
        "finding objects",
    }
    assert shown[-1] == ("finding objects", 3, 3)


def test_same_seed__same_figures_even_after_a_kill(
    vit: Make, scenes: Path, setting: MakeSetting, tmp_path: Path
) -> None:
    config = DetectionConfig.model_validate({"score_threshold": 0.0, "num_views": 4, **FEW})
    first = evaluate(vit, setting(scenes, folder=tmp_path / "a"), config)

    def stops(phase: str, done: int, total: int) -> None:
        if phase == "training the detector" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(vit, setting(scenes, folder=tmp_path / "b", progress=stops), config)
    again = evaluate(vit, setting(scenes, folder=tmp_path / "b"), config)
    assert again.metrics == first.metrics
    assert again.files == first.files
    other = evaluate(vit, setting(scenes, folder=tmp_path / "c", seed=1), config)
    assert other.files["head.safetensors"] != first.files["head.safetensors"]


def test_finetune__changes_the_encoder_and_keeps_it(
    vit: Make, scenes: Path, setting: MakeSetting
) -> None:
    encoder = vit()
    before = copy.deepcopy(encoder.state_dict())
    config = DetectionConfig.model_validate({"finetune": True, **FEW})
    score = evaluate(lambda: encoder, setting(scenes), config)
    after = encoder.state_dict()
    assert not torch.equal(
        before["encoder.blocks.0.mlp.fc1.weight"], after["encoder.blocks.0.mlp.fc1.weight"]
    )
    assert b"encoder.blocks.0.mlp.fc1.weight" in score.files["head.safetensors"]


def test_limit__takes_so_many_of_each(vit: Make, scenes: Path, setting: MakeSetting) -> None:
    score = evaluate(vit, setting(scenes, limit=2), DetectionConfig.model_validate(FEW))
    assert (score.num_train, score.num_val) == (2, 2)


def test_class_missing_from_validation__is_noted_and_in_no_mean(
    vit: Make, setting: MakeSetting, spoilt: Callable[..., Path]
) -> None:
    def without_rectangles(tree: dict) -> None:
        tree["annotations"] = [t for t in tree["annotations"] if t["category_id"] == 1]

    config = DetectionConfig.model_validate({"score_threshold": 0.0, **FEW})
    score = evaluate(vit, setting(spoilt("val", without_rectangles)), config)
    assert score.metrics["per_class"]["rectangle"] == {"AP": None, "AP50": None}
    assert score.headline == score.metrics["per_class"]["disc"]["AP"]
    assert any("no object of rectangle" in note for note in score.notes)


def test_validation_with_its_own_numbers__is_matched_by_name(
    vit: Make, setting: MakeSetting, spoilt: Callable[..., Path], scenes: Path
) -> None:
    def renumber(tree: dict) -> None:
        for category in tree["categories"]:
            category["id"] = 10 - category["id"]  # so that the order turns
        for thing in tree["annotations"]:
            thing["category_id"] = 10 - thing["category_id"]

    config = DetectionConfig.model_validate({"score_threshold": 0.0, **FEW})
    turned = evaluate(vit, setting(spoilt("val", renumber)), config)
    plain = evaluate(vit, setting(scenes), config)
    assert turned.metrics["per_class"] == plain.metrics["per_class"]


def _nothing(tree: dict) -> None:
    tree["annotations"] = []


def _only_crowds(tree: dict) -> None:
    for thing in tree["annotations"]:
        thing["iscrowd"] = 1


def _no_pictures(tree: dict) -> None:
    tree["annotations"], tree["images"] = [], []


@pytest.mark.parametrize(
    ("split", "change", "kind", "message"),
    [
        ("val", _nothing, DataError, "has no annotations: is this a test list"),
        ("val", _only_crowds, EmptyDatasetError, "none of 3 pictures has an object to score on"),
        ("val", _no_pictures, DataError, r"val/instances\.json"),
        (
            "train",
            _only_crowds,
            EmptyDatasetError,
            "none of 4 pictures has an object to learn from",
        ),
        (
            "val",
            lambda tree: tree["categories"].append({"id": 9, "name": "blob"}),
            DataError,
            "has class 'blob', which",
        ),
        (
            "train",
            lambda tree: [thing.pop("segmentation") for thing in tree["annotations"]],
            ConfigError,
            "not every object of .* has a mask",
        ),
    ],
)
def test_data_that_cannot_be_used__is_refused_before_training(
    setting: MakeSetting,
    spoilt: Callable[..., Path],
    split: str,
    change: Callable[[dict], object],
    kind: type[Exception],
    message: str,
) -> None:
    def never() -> FrozenEncoder:
        raise AssertionError("the encoder was loaded")

    with pytest.raises(kind, match=message):
        evaluate(never, setting(spoilt(split, change)), DetectionConfig(detector="mask_rcnn"))


def test_invalid_labels__are_listed_when_skipped(
    vit: Make, setting: MakeSetting, spoilt: Callable[..., Path]
) -> None:
    def squash(tree: dict) -> None:
        tree["annotations"][0]["bbox"][2] = 0

    data = spoilt("train", squash)
    config = DetectionConfig.model_validate(FEW)
    with pytest.raises(DataError, match=r"train/instances\.json: annotation 1: the box .* no area"):
        evaluate(vit, setting(data), config)
    score = evaluate(vit, setting(data, skip_invalid=True), config)
    assert score.notes[-2] == "1 invalid label left out (boxes without area: 1):"
    assert score.metrics["labels"]["left_out"] == {"boxes without area": 1}


def test_input__that_the_stride_does_not_divide_is_refused(
    vit: Make, scenes: Path, setting: MakeSetting
) -> None:
    with pytest.raises(ConfigError, match="not a multiple of the encoder's stride 8"):
        evaluate(vit, setting(scenes), DetectionConfig(image_size=(48, 60)))


def test_anchor_sizes__are_one_a_level() -> None:
    with pytest.raises(ValueError, match="names 3 sizes, there are 4 levels"):
        DetectionConfig(anchor_sizes=(8, 16, 32))


def test_views__of_an_epoch_are_counted(vit: Make, scenes: Path) -> None:
    from mimray.trainers.evaluation.annotations.base import InvalidLabels
    from mimray.trainers.evaluation.annotations.detection import open_detection
    from mimray.trainers.evaluation.detection.batches import TrainingViews
    from mimray.trainers.evaluation.detection.detector import build_detector

    train = open_detection(str(scenes), "train", InvalidLabels(False))
    settled = {"image_size": (48, 64), "layers": (1,), "anchor_sizes": (8, 16, 32, 64)}
    config = DetectionConfig.model_validate({**FEW, **settled, "num_views": 4})
    detector = build_detector(vit(), config, train.class_names, device="cpu", seed=0)
    views = TrainingViews(detector, train, np.array([1, 3]), config, seed=0)
    both = views(2, np.array([0, 1]))
    alone = views(2, np.array([1]))
    assert torch.equal(both.images[1], alone.images[0])
    assert torch.equal(both.targets[1]["boxes"], alone.targets[0]["boxes"])
    later = views(6, np.array([1]))  # four epochs on, the same version again
    assert torch.equal(later.images, alone.images)
    assert not torch.equal(views(3, np.array([1])).images, alone.images)
