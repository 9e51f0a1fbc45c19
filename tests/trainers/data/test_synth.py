from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mimray.trainers.data.scenes import SHAPES, draw_scene
from mimray.trainers.data.sources import open_source
from mimray.trainers.data.synth import VOID, write_scenes
from mimray.trainers.errors import DataError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "scenes"
    write_scenes(out, num_train=10, num_val=6, image_size=(64, 80), num_classes=4, seed=3)
    return out


def _read(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_synth__same_seed_same_bytes_and_another_seed_others(scenes: Path, tmp_path: Path) -> None:
    size: dict[str, Any] = {"num_train": 10, "num_val": 6, "image_size": (64, 80)}
    write_scenes(tmp_path / "again", **size, num_classes=4, seed=3)
    write_scenes(tmp_path / "other", **size, num_classes=4, seed=4)
    files = [file.relative_to(scenes) for file in scenes.rglob("*") if file.is_file()]
    assert len(files) > 60
    for file in files:
        assert (scenes / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    first = "train/images/000000.jpg"
    assert (scenes / first).read_bytes() != (tmp_path / "other" / first).read_bytes()


def test_synth__a_longer_set_begins_with_the_shorter(scenes: Path) -> None:
    scene = draw_scene(3, 0, image_size=(64, 80), num_classes=4, held_out=False)
    stored = np.asarray(Image.open(scenes / "train/images/000000.jpg"))
    assert np.abs(scene.image.astype(int) - stored).mean() < 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_synth__every_kind_of_label_says_the_same(scenes: Path, split: str) -> None:
    folder = scenes / split
    names = (folder / "classes.txt").read_text().split()
    assert names == ["background", *SHAPES[:4]]
    coco = COCO(str(folder / "instances.json"))
    panoptic = json.loads((folder / "panoptic.json").read_text())
    seen = set()
    for image, record in zip(coco.dataset["images"], panoptic["annotations"], strict=True):
        stem = Path(image["file_name"]).stem
        picture = _read(folder / "images" / image["file_name"])
        semantic = _read(folder / "masks" / f"{stem}.png")
        assert picture.shape == (image["height"], image["width"], 3) == (64, 80, 3)
        drawn = np.zeros_like(semantic)
        for thing in coco.loadAnns(coco.getAnnIds(image["id"])):
            mask = coco.annToMask(thing).astype(bool)
            rows, columns = np.nonzero(mask)
            left, top, width, height = thing["bbox"]
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert thing["area"] == mask.sum() > 0
            assert not drawn[mask].any(), "visible masks do not overlap"
            drawn[mask] = thing["category_id"]
            seen.add(thing["category_id"])
        known = semantic != VOID
        assert 0.0 < (~known).mean() < 0.12
        assert (drawn[known] == semantic[known]).all()

        ids = _read(folder / "panoptic" / record["file_name"]).astype(int) @ [1, 256, 65536]
        assert ((ids == 0) == ~known).all()
        assert set(np.unique(ids)) - {0} == {part["id"] for part in record["segments_info"]}
        for part in record["segments_info"]:
            assert part["area"] == (ids == part["id"]).sum()
            assert (semantic[ids == part["id"]] == part["category_id"]).all()
    assert seen == {1, 2, 3, 4}, "every class occurs"


def test_synth__crops_are_a_class_folder_dataset(scenes: Path) -> None:
    source = open_source(str(scenes / "crops"), split="val")
    objects = json.loads((scenes / "val/instances.json").read_text())["annotations"]
    assert source.facts.class_names == tuple(sorted(SHAPES[:4]))
    assert len(source) == len(objects)


def test_scene__a_shape_is_seen_well_enough_to_be_told() -> None:
    for index in range(40):
        scene = draw_scene(0, index, image_size=(48, 64), num_classes=8, held_out=True)
        assert scene.image.shape == (48, 64, 3)
        areas = np.bincount(scene.owners.ravel(), minlength=len(scene.labels) + 1)[1:]
        assert 1 <= len(areas) <= 5
        assert areas.min() >= 12


def test_synth__refuses_what_it_cannot_do(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        write_scenes(scenes)
    with pytest.raises(DataError, match="exists already"):
        write_scenes(tmp_path, overwrite=True)  # not a set of scenes
    with pytest.raises(DataError, match="9 classes"):
        write_scenes(tmp_path / "a", num_classes=9)
    with pytest.raises(DataError, match="64x31 pixels are too small"):
        write_scenes(tmp_path / "a", image_size=(64, 31))
    write_scenes(tmp_path / "b", num_train=1, num_val=1, image_size=(32, 32))
    write_scenes(tmp_path / "b", num_train=2, num_val=1, image_size=(32, 32), overwrite=True)
    assert len(list((tmp_path / "b/train/images").iterdir())) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"b"}, "nothing is left beside"
    (tmp_path / "b/notes.txt").write_text("a user's own")
    with pytest.raises(DataError, match="exists already"):
        write_scenes(tmp_path / "b", overwrite=True)
