from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.bundles import BundleCard, FrozenEncoder
from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels
from mimray.trainers.evaluation.annotations.segmentation import open_segmentation
from mimray.trainers.evaluation.features.encoders import untrained
from mimray.trainers.evaluation.features.map_cache import CachedEncoder
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.segmentation.inference import default_size
from mimray.trainers.evaluation.segmentation.segmenter import load_head
from mimray.trainers.evaluation.segmentation.task import evaluate

Make = Callable[[], FrozenEncoder]
CONFIG = SegmentationConfig(head="fpn", head_width=16, epochs=2, batch_size=8)


@pytest.fixture
def run(setting: Callable[..., Setting], scenes: Path) -> Callable[..., Score]:
    def start(make: Any, config: SegmentationConfig = CONFIG, **changes: Any) -> Score:
        data = changes.pop("data", scenes)
        return evaluate(make, setting(data, **changes), config)

    return start


def _same(one: Score, other: Score) -> None:
    assert one.metrics == other.metrics
    assert one.files == other.files


def test_evaluate__learns_far_beyond_the_commonest_class(
    run: Callable[..., Score], make_vit: Make, scenes: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int, int]] = []

    def make() -> Any:
        return CachedEncoder(make_vit(), "vit", tmp_path / "maps")

    config = CONFIG.model_copy(update={"epochs": 20, "lr": 3e-3, "batch_size": 4, "num_views": 1})
    score = run(make, config, val=str(scenes / "train"), progress=lambda *args: seen.append(args))
    val = open_segmentation(str(scenes), "train", config, InvalidLabels(skip=False))
    masks = [val[i].mask for i in range(len(val))]
    known = sum((mask != 255).sum() for mask in masks)
    background = sum((mask == 0).sum() for mask in masks) / known / 3
    assert score.metric == "mIoU"
    assert score.headline == score.metrics["mIoU"] > background + 0.15
    assert (score.num_train, score.num_val) == (24, 24)
    assert score.metrics["training"][-1]["cross_entropy"] < 0.4
    assert {phase for phase, _, _ in seen} == {"checking masks", "training the head", "scoring"}
    json.dumps(score.metrics)
    for name in ("segmentation.png", "segmentation_classes.png"):
        assert Image.open(io.BytesIO(score.pictures[name])).width > 500


@pytest.mark.parametrize("head", ["linear", "fpn", "upernet"])
def test_evaluate__the_same_seed_gives_the_same_figures(
    run: Callable[..., Score], make_vit: Make, tmp_path: Path, head: str
) -> None:
    config = CONFIG.model_copy(update={"head": head, "epochs": 1})
    one = run(make_vit, config, folder=tmp_path / "a")
    _same(one, run(make_vit, config, folder=tmp_path / "b"))
    assert one.files != run(make_vit, config, folder=tmp_path / "c", seed=1).files


def test_evaluate__interrupted_and_started_again_gives_the_same_figures(
    run: Callable[..., Score], make_vit: Make, tmp_path: Path
) -> None:
    whole = run(make_vit, folder=tmp_path / "whole")

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "training the head" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make_vit, folder=tmp_path / "broken", progress=stop)
    _same(whole, run(make_vit, folder=tmp_path / "broken"))


def test_evaluate__a_swin_and_windows_at_full_resolution(
    run: Callable[..., Score], make_swin: Make
) -> None:
    config = CONFIG.model_copy(update={"image_size": (32, 32), "scale": 1.0, "epochs": 1})
    score = run(make_swin, config)
    assert score.metrics["image_size"] == [32, 32]
    assert np.sum(score.metrics["confusion"]) > 0.9 * 8 * 48 * 64, "every pixel but void is scored"


def test_evaluate__frozen_stays_and_finetuned_moves(
    run: Callable[..., Score], make_vit: Make, scenes: Path, tmp_path: Path
) -> None:
    fresh = {name: value.clone() for name, value in make_vit().encoder.state_dict().items()}
    config = CONFIG.model_copy(update={"epochs": 1})
    for finetune in (False, True):
        encoder = make_vit()
        score = run(
            lambda encoder=encoder: encoder,
            config.model_copy(update={"finetune": finetune}),
            folder=tmp_path / str(finetune),
        )
        moved = [
            name
            for name, value in encoder.encoder.state_dict().items()
            if (value != fresh[name]).any()
        ]
        assert bool(moved) == finetune
        assert not any(p.requires_grad for p in encoder.parameters())
        for name, content in score.files.items():
            (tmp_path / name).write_bytes(content)
        picture = Image.open(next((scenes / "val/images").iterdir()))
        again = load_head(tmp_path, make_vit())
        trained = load_head(tmp_path, encoder)
        np.testing.assert_array_equal(again([picture])[0], trained([picture])[0])
        assert again.class_names == ("background", "disc", "rectangle")


def test_load_head__says_the_scored_figures_again(
    run: Callable[..., Score], make_vit: Make, scenes: Path, tmp_path: Path
) -> None:
    score = run(make_vit)
    for name, content in score.files.items():
        (tmp_path / name).write_bytes(content)
    model = load_head(tmp_path, make_vit())
    val = open_segmentation(str(scenes), "val", CONFIG, InvalidLabels(skip=False))
    right = known = 0
    for example in (val[index] for index in range(len(val))):
        there = example.mask != val.ignore_index
        right += (model([example.image])[0] == example.mask)[there].sum()
        known += there.sum()
    assert right / known == pytest.approx(score.metrics["pixel_accuracy"], abs=2e-3)
    other = make_vit().card.model_copy(update={"name": "other"})
    with pytest.raises(DataError, match="was trained on vit, not on other"):
        load_head(tmp_path, untrained(other, seed=1))
    with pytest.raises(DataError, match=r"holds no head\.json"):
        load_head(tmp_path / "maps", make_vit())


def test_evaluate__a_class_missing_from_the_validation_is_named_and_not_averaged(
    run: Callable[..., Score], make_vit: Make, scenes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    for file in (data / "val/masks").iterdir():
        mask = np.asarray(Image.open(file)).copy()
        mask[mask == 2] = 255
        Image.fromarray(mask).save(file)
    score = run(make_vit, data=data)
    iou = score.metrics["IoU"]
    rectangles = np.array(score.metrics["confusion"]).sum(axis=0)[2]
    assert iou["rectangle"] == (0 if rectangles else None)
    labelled = (iou["background"] + iou["disc"]) / 2
    assert score.metrics["mIoU_labelled"] == pytest.approx(labelled)
    assert score.headline == pytest.approx(labelled * (2 / 3 if rectangles else 1))
    assert any("rectangle" in note for note in score.notes)


def test_evaluate__skips_and_lists_what_is_invalid(
    run: Callable[..., Score], make_vit: Make, scenes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(scenes, tmp_path / "scenes"))
    Image.new("L", (9, 9)).save(data / "val/masks/000003.png")
    with pytest.raises(DataError, match=r"masks/000003.png is 9x9 pixels, its picture 64x48"):
        run(make_vit, data=data)
    score = run(make_vit, data=data, skip_invalid=True)
    assert score.num_val == 7
    assert score.notes[0].startswith("1 invalid")
    assert score.metrics["labels"]["left_out"] == {"masks or pictures that cannot be used": 1}


def test_evaluate__an_input_that_the_stride_does_not_divide(
    run: Callable[..., Score], make_vit: Make
) -> None:
    config = CONFIG.model_copy(update={"image_size": (50, 64)})
    with pytest.raises(ConfigError, match=r"50x64 .* stride 8.*image_size=\[48, 64\]"):
        run(make_vit, config)


def test_default_size__near_the_pictures_and_within_bounds(card: BundleCard) -> None:
    class Masks:
        def __init__(self, *sizes: tuple[int, int]) -> None:
            self.sizes = sizes

        def __len__(self) -> int:
            return len(self.sizes)

        def __getitem__(self, index: int) -> Any:
            return type("", (), {"mask": np.zeros(self.sizes[index])})

    assert default_size(Masks((96, 96)), 16) == (96, 96)  # type: ignore[arg-type]
    assert default_size(Masks((90, 130), (90, 130), (400, 400)), 16) == (96, 128)  # type: ignore[arg-type]
    assert default_size(Masks((1000, 2000)), 16) == (256, 512)  # type: ignore[arg-type]
    height, width = default_size(Masks((360, 480)), 8)  # type: ignore[arg-type]
    assert (height, width) == (224, 296)
    assert default_size(Masks((5, 5)), 16) == (16, 16)  # type: ignore[arg-type]
