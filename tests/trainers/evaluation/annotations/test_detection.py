from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import DetectionSet, InvalidLabels
from mimray.trainers.evaluation.annotations.detection import (
    Split,
    open_detection,
    open_detection_splits,
)
from mimray.trainers.evaluation.score import Setting


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detection") / "scenes"
    write_scenes(folder, num_train=3, num_val=2, image_size=(48, 48), num_classes=2)
    return folder


def _open(place: Path, split: Split, *, shared: bool = False) -> DetectionSet:
    return open_detection(str(place), split, InvalidLabels(False), shared=shared)


def test_synth__both_splits_are_found(scenes: Path) -> None:
    train, val = _open(scenes, "train"), _open(scenes, "val", shared=True)
    assert (len(train), len(val)) == (3, 2)
    assert train.class_names == val.class_names == ("disc", "rectangle")
    assert train.fingerprint != val.fingerprint


def test_json__is_opened_as_it_is(scenes: Path) -> None:
    file = scenes / "val" / "instances.json"
    assert len(_open(file, "train")) == len(_open(file, "val")) == 2
    with pytest.raises(DataError, match="no validation or test split of its own"):
        _open(file, "val", shared=True)


def _lay_out(scenes: Path, out: Path, files: dict[str, str], pictures: dict[str, str]) -> Path:
    for split, name in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scenes / split / "instances.json", out / name)
    for split, name in pictures.items():
        shutil.copytree(scenes / split / "images", out / name, dirs_exist_ok=True)
    return out


@pytest.mark.parametrize(
    ("train", "val", "train_pictures", "val_pictures"),
    [
        (  # COCO's own releases
            "annotations/instances_train2017.json",
            "annotations/instances_val2017.json",
            "train2017",
            "val2017",
        ),
        (  # CVAT
            "annotations/instances_train.json",
            "annotations/instances_validation.json",
            "images/train",
            "images/validation",
        ),
        ("train/_annotations.coco.json", "valid/_annotations.coco.json", "train", "valid"),
        ("instances_train.json", "instances_test.json", "images", "images"),
    ],
)
def test_layouts__that_tools_write_are_found(
    scenes: Path, tmp_path: Path, train: str, val: str, train_pictures: str, val_pictures: str
) -> None:
    files, pictures = {"train": train, "val": val}, {"train": train_pictures, "val": val_pictures}
    out = _lay_out(scenes, tmp_path, files, pictures)
    assert len(_open(out, "train")) == 3
    found = _open(out, "val", shared=True)
    assert len(found) == 2
    assert found[0].image.size == (48, 48)


def test_whole__is_taken_unless_it_was_trained_on(scenes: Path, tmp_path: Path) -> None:
    files = {"train": "annotations/instances_default.json"}
    out = _lay_out(scenes, tmp_path, files, {"train": "images"})
    assert len(_open(out, "train")) == len(_open(out, "val")) == 3
    with pytest.raises(DataError, match="no validation or test split of its own"):
        _open(out, "val", shared=True)


def test_nothing__says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no annotation file for train .*instances_train\.json"):
        _open(tmp_path, "train")
    with pytest.raises(DataError, match=r"no annotation file at .*gone\.json"):
        _open(tmp_path / "gone.json", "train")


@pytest.mark.parametrize("name", ["", "instances.json"])
def test_splits__pictures_are_held_out_where_there_is_no_split(scenes: Path, name: str) -> None:
    setting = Setting(
        data=str(scenes / "train" / name),
        val=None,
        limit=None,
        seed=0,
        skip_invalid=False,
        device="cpu",
        folder=scenes,
        progress=lambda phase, done, total: None,
    )
    whole = _open(scenes / "train", "train")
    train, val, rule, notes = open_detection_splits(setting, InvalidLabels(False))
    assert "1 of its 3 pictures are held out (20%, seed 0)" in notes[0]
    learnt, scored = (set().union(*(p.labels(i) for i in range(len(p)))) for p in (train, val))
    assert (len(notes) == 2) == bool(scored - learnt)
    assert (len(train), len(val), rule) == (2, 1, HoldOut())
    names = {whole.name(i): whole.labels(i).tolist() for i in range(3)}
    told = {
        part.name(i): part.labels(i).tolist() for part in (train, val) for i in range(len(part))
    }
    assert told == names
    assert len({train.fingerprint, val.fingerprint, whole.fingerprint}) == 3
    train, val, rule, _ = open_detection_splits(
        replace(setting, data=str(scenes)), InvalidLabels(False)
    )
    assert (len(train), len(val), rule) == (3, 2, None)
