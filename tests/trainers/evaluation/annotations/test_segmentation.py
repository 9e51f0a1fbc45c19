from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import (
    InvalidLabels,
    LabelledSplits,
    SegmentationSet,
)
from mimray.trainers.evaluation.annotations.segmentation import (
    check_segmentation_splits,
    open_segmentation,
    open_segmentation_splits,
)
from mimray.trainers.evaluation.score import Part, Setting

CONFIG = SegmentationConfig()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("open") / "scenes"
    write_scenes(out, num_train=5, num_val=3, image_size=(32, 40), num_classes=3)
    return out


@pytest.fixture
def scenes(written: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(written, tmp_path / "scenes"))


def _open(uri: Path, split: Any = "train", config: SegmentationConfig = CONFIG, **more: Any) -> Any:
    return open_segmentation(str(uri), split, config, InvalidLabels(skip=False), **more)


def test_panoptic__a_png_outside_the_folder_is_not_read(scenes: Path) -> None:
    file = scenes / "val/panoptic.json"
    tree = json.loads(file.read_text())
    tree["annotations"][0]["file_name"] = f"../panoptic/{tree['annotations'][0]['file_name']}"
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"'\.\./panoptic/.*' leads out of .*/val/panoptic"):
        _open(file, "val")[0]


def test_open__all_formats_say_the_same(scenes: Path) -> None:
    pairs = _open(scenes, "val", shared=True)
    panoptic = _open(scenes / "val/panoptic.json", "val")
    instances = _open(scenes / "val/instances.json", "val")
    assert len(pairs) == len(panoptic) == len(instances) == 3
    assert pairs.class_names == panoptic.class_names == instances.class_names
    assert pairs.class_names == ("background", "disc", "rectangle", "triangle")
    for a, b, c in zip(
        *((s[i] for i in range(3)) for s in (pairs, panoptic, instances)), strict=True
    ):
        void = a.mask == pairs.ignore_index
        np.testing.assert_array_equal(void, b.mask == panoptic.ignore_index)
        np.testing.assert_array_equal(a.mask[~void], b.mask[~void])
        np.testing.assert_array_equal(a.mask[~void], c.mask[~void])
        assert a.image.tobytes() == b.image.tobytes() == c.image.tobytes()


def test_open__takes_the_split_that_is_meant(scenes: Path) -> None:
    assert len(_open(scenes)) == 5
    assert len(_open(scenes, "val")) == 3
    assert len(_open(scenes / "val", "val")) == 3, "a place that is not split is taken whole"
    for name in ("images", "masks"):
        shutil.copytree(scenes / "val" / name, scenes / "test" / name)
    (scenes / "test/images/000000.jpg").unlink()
    assert len(_open(scenes, "val")) == 3
    assert len(_open(scenes, "val", SegmentationConfig(val_split="test"))) == 2
    shutil.rmtree(scenes / "val")
    assert len(_open(scenes, "val", shared=True)) == 2
    shutil.rmtree(scenes / "test")
    with pytest.raises(DataError, match="no validation or test split of its own"):
        _open(scenes, "val", shared=True)
    with pytest.raises(DataError, match="no val or valid or .* split .splits found: train"):
        _open(scenes, "val")
    with pytest.raises(DataError, match="no validation or test split of its own"):
        _open(scenes / "train", "val", shared=True)


def test_open__the_other_formats_where_there_are_no_index_masks(scenes: Path) -> None:
    shutil.rmtree(scenes / "train/masks")
    shutil.rmtree(scenes / "val/masks")
    assert _open(scenes).uri.endswith("train/panoptic.json")
    assert _open(scenes, "val", shared=True).uri.endswith("val/panoptic.json")
    (scenes / "train/panoptic.json").unlink()
    assert _open(scenes).uri.endswith("train/instances.json")
    (scenes / "train/instances.json").unlink()
    (scenes / "val/instances.json").unlink()
    (scenes / "val/panoptic.json").unlink()
    with pytest.raises(DataError, match=r"no masks for train .*train/images beside train/\{masks"):
        _open(scenes)
    with pytest.raises(DataError, match="no annotation file at .*nothing.json"):
        _open(scenes / "nothing.json")


def test_open__limit_takes_some_evenly_and_the_fingerprint_follows(scenes: Path) -> None:
    some = _open(scenes, limit=2)
    assert [Path(some.name(i)).stem for i in range(len(some))] == ["000000", "000002"]
    whole = _open(scenes)
    assert whole.fingerprint != some.fingerprint
    assert whole.fingerprint == _open(scenes).fingerprint
    mask = np.asarray(Image.open(scenes / "train/masks/000003.png")).copy()
    mask[0, 0] = 1
    Image.fromarray(mask).save(scenes / "train/masks/000003.png")
    assert _open(scenes).fingerprint != whole.fingerprint


def _spoil(scenes: Path, split: str = "train") -> None:
    mask = np.zeros((32, 40), np.uint8)
    mask[3, 4] = 9
    Image.fromarray(mask).save(scenes / split / "masks/000001.png")


def test_open__a_value_outside_the_classes_is_named_with_its_place(scenes: Path) -> None:
    _spoil(scenes)
    with pytest.raises(
        DataError,
        match=r"000001.jpg: .*masks/000001.png has 9 at row 3, column 4; "
        r"classes are 0 to 3, void is 255",
    ):
        _open(scenes)
    with pytest.raises(DataError, match=r"000000.png has 255 .* void is 9"):
        _open(scenes, config=SegmentationConfig(ignore_index=9))


def test_open__skipped_pictures_are_counted_and_listed(scenes: Path) -> None:
    _spoil(scenes)
    (scenes / "train/masks/000002.png").unlink()
    Image.new("L", (40, 31)).save(scenes / "train/masks/000003.png")
    invalid_labels = InvalidLabels(skip=True)
    seen = []
    kept = open_segmentation(
        str(scenes), "train", CONFIG, invalid_labels, progress=lambda *args: seen.append(args)
    )
    assert [Path(kept.name(i)).stem for i in range(len(kept))] == ["000000", "000004"]
    assert kept[1].image.size == (40, 32)
    first, *rest = invalid_labels.notes()
    assert first.startswith("3 invalid")
    assert ["row 3" in rest[0], "no mask" in rest[1], "40x31" in rest[2]] == [True] * 3
    assert seen[-1] == ("checking masks", 5, 5)


def test_open__nothing_left_is_an_error(scenes: Path) -> None:
    for mask in (scenes / "val/masks").iterdir():
        Image.new("L", (3, 3)).save(mask)
    with pytest.raises(EmptyDatasetError, match="no picture with a mask that can be used"):
        open_segmentation(str(scenes), "val", CONFIG, InvalidLabels(skip=True))
    for mask in (scenes / "val/masks").iterdir():
        Image.new("L", (40, 32), 255).save(mask)
    with pytest.raises(DataError, match="every pixel of .* is void"):
        _open(scenes, "val")


def test_open__a_picture_that_is_broken(scenes: Path) -> None:
    (scenes / "train/images/000002.jpg").write_bytes(b"\xff\xd8\xff and no more")
    with pytest.raises(DataError, match=r"000002\.jpg"):
        _open(scenes)


def test_classes__named_numbered_or_found(scenes: Path) -> None:
    with pytest.raises(DataError, match="has 4 classes, num_classes is 5"):
        _open(scenes, config=SegmentationConfig(num_classes=5))
    (scenes / "train/classes.txt").unlink()
    assert _open(scenes).class_names == ("0", "1", "2", "3")
    assert _open(scenes, config=SegmentationConfig(num_classes=6)).class_names[-1] == "5"
    named = SegmentationConfig(class_names=("a", "b", "c", "d"))
    assert _open(scenes, config=named).class_names == ("a", "b", "c", "d")
    (scenes / "train/classes.txt").write_text("a\nb\nb\nc\n")
    with pytest.raises(DataError, match="two classes are called 'b'"):
        _open(scenes)
    with pytest.raises(DataError, match="has classes background, disc, .* trained on a, b"):
        _open(scenes, "val", class_names=("a", "b"))
    with pytest.raises(ValueError, match="num_classes 3 and 2 class_names"):
        SegmentationConfig(num_classes=3, class_names=("a", "b"))


def _paint_binary(scenes: Path) -> None:
    for split in ("train", "val"):
        (scenes / split / "classes.txt").unlink(missing_ok=True)
        for mask in (scenes / split / "masks").iterdir():
            values = np.asarray(Image.open(mask))
            Image.fromarray((255 * (values == 1)).astype(np.uint8)).save(mask)


def test_classes__masks_of_0_and_255_alone_are_two_classes(scenes: Path) -> None:
    want = _open(scenes)[0].mask == 1
    _paint_binary(scenes)
    invalid_labels = InvalidLabels(False)
    train = open_segmentation(str(scenes), "train", CONFIG, invalid_labels)
    assert train.binary
    assert train.class_names == ("0", "255")
    np.testing.assert_array_equal(train[0].mask, want)
    assert invalid_labels.notes() == (
        "masks of 0 and 255 alone read as two classes, 255 as the second: 5",
    )
    val = _open(scenes, "val", class_names=train.class_names, binary=True)
    assert set(np.unique(val[0].mask)) <= {0, 1}
    named = SegmentationConfig(class_names=("ground", "disc"))
    assert _open(scenes, config=named).binary
    mask = np.full((32, 40), 7, np.uint8)
    Image.fromarray(mask).save(scenes / "val/masks/000001.png")
    with pytest.raises(DataError, match="holds other values than 0 and 255"):
        _open(scenes, "val", class_names=train.class_names, binary=True)


def test_classes__255_is_void_where_that_is_said_or_other_classes_are_there(scenes: Path) -> None:
    assert not _open(scenes).binary
    _paint_binary(scenes)
    with pytest.raises(DataError, match="no class but 0 and void"):
        _open(scenes, config=SegmentationConfig(ignore_index=255))


def test_classes__unnamed_numbers_that_occur_nowhere_are_counted(scenes: Path) -> None:
    (scenes / "train/classes.txt").unlink()
    mask = np.zeros((32, 40), np.uint16)
    mask[3, 4] = 40
    Image.fromarray(mask).save(scenes / "train/masks/000001.png")
    invalid_labels = InvalidLabels(False)
    found = open_segmentation(str(scenes), "train", CONFIG, invalid_labels)
    assert len(found.class_names) == 41
    assert invalid_labels.notes() == ("class numbers below 41 that occur in no mask: 36",)
    mask[3, 4] = 26_001  # an instance's number
    Image.fromarray(mask).save(scenes / "train/masks/000001.png")
    with pytest.raises(DataError, match=r"hold 5 values up to 26001, which would be 26002 classes"):
        _open(scenes)


def test_masks__as_jpeg_are_refused(scenes: Path) -> None:
    for mask in list((scenes / "train/masks").iterdir()):
        Image.open(mask).convert("L").save(mask.with_suffix(".jpg"))
        mask.unlink()
    with pytest.raises(DataError, match=r"masks/000000\.jpg is stored as JPEG"):
        _open(scenes)


def test_instances__later_ones_lie_on_top_and_crowds_are_void(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/a.png")

    def thing(number: int, category: int, box: list[int], crowd: int = 0) -> dict[str, Any]:
        x, y, w, h = box
        outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        return {
            "id": number,
            "image_id": 1,
            "category_id": category,
            "bbox": box,
            "segmentation": outline,
            "iscrowd": crowd,
        }

    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}],
        "categories": [{"id": 10, "name": "x"}, {"id": 20, "name": "y"}],
        "annotations": [
            thing(1, 10, [0, 0, 3, 3]),
            thing(2, 20, [2, 2, 2, 2]),
            thing(3, 10, [0, 0, 1, 1], crowd=1),
        ],
    }
    (tmp_path / "instances.json").write_text(json.dumps(content))
    found = _open(tmp_path / "instances.json")
    void = found.ignore_index
    assert found.class_names == ("background", "x", "y")
    np.testing.assert_array_equal(
        found[0].mask, [[void, 1, 1, 0], [1, 1, 1, 0], [1, 1, 2, 2], [0, 0, 2, 2]]
    )
    for record in content["annotations"]:
        del record["segmentation"]  # type: ignore[attr-defined]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="boxes only, no masks"):
        _open(tmp_path / "instances.json")


PART = Part("choice", 0.5, 0)


def _setting(place: Path, share: float = 0.4) -> Setting:
    return Setting(
        data=str(place),
        val=None,
        limit=None,
        seed=0,
        skip_invalid=False,
        device="cpu",
        folder=place,
        progress=lambda phase, done, total: None,
        hold_out=HoldOut(share),
    )


def _splits(place: Path) -> LabelledSplits[SegmentationSet]:
    return open_segmentation_splits(_setting(place), CONFIG, InvalidLabels(skip=False))


def test_splits__pictures_are_held_out_where_there_is_no_split(scenes: Path) -> None:
    train, val, rule, _ = _splits(scenes)
    assert (len(train), len(val), rule) == (5, 3, None)
    for place in (
        scenes / "train",
        scenes / "train/panoptic.json",
        scenes / "train/instances.json",
    ):
        train, val, rule, _ = _splits(place)
        assert rule == HoldOut(0.4)
        names = [part.name(i) for part in (train, val) for i in range(len(part))]
        assert (len(train), len(val), len(set(names))) == (3, 2, 5)
    shutil.rmtree(scenes / "val")
    train, val, rule, _ = _splits(scenes)
    assert (len(train), len(val), rule) == (3, 2, HoldOut(0.4))


def _index_masks(place: Path, values: list[int], kind: str = "uint8") -> Path:
    """Pictures of 4 x 4 pixels, each with a row of one class in its mask."""
    for folder in ("images", "masks"):
        (place / folder).mkdir(parents=True)
    for number, value in enumerate(values):
        mask = np.zeros((4, 4), kind)
        mask[0] = value
        Image.new("RGB", (4, 4), (number, 0, 0)).save(place / "images" / f"{number}.png")
        Image.fromarray(mask).save(place / "masks" / f"{number}.tif")
    return place


@pytest.mark.parametrize("seed", range(4))
def test_splits__classes_of_one_place_are_numbered_whichever_pictures_are_held_out(
    tmp_path: Path, seed: int
) -> None:
    place = _index_masks(tmp_path, [1] * 9 + [2])
    setting = replace(_setting(place), hold_out=HoldOut(0.2, seed))
    train, val, _, notes = open_segmentation_splits(setting, CONFIG, InvalidLabels(False))
    assert train.class_names == val.class_names == ("0", "1", "2")
    assert train.fingerprint != val.fingerprint
    held = any((val[i].mask == 2).any() for i in range(len(val)))
    assert held == (seed in (0, 1))
    unlearnt = "classes without a pixel to learn from, which no head finds: 2"
    assert (unlearnt in notes) == held


def test_splits__the_note_counts_all_pictures_whatever_the_limit_and_the_part(
    scenes: Path,
) -> None:
    setting = _setting(scenes / "train")
    for changed in (setting, replace(setting, limit=1), replace(setting, part=PART)):
        note = open_segmentation_splits(changed, CONFIG, InvalidLabels(False)).notes[0]
        assert "2 of its 5 pictures are held out (40%, seed 0)" in note


def test_splits__masks_are_not_compared_by_the_first_of_each(tmp_path: Path) -> None:
    _index_masks(tmp_path / "train", [1, 2, 3])
    _index_masks(tmp_path / "val", [3, 1])
    setting = _setting(tmp_path)
    learnt, scored = check_segmentation_splits(setting, CONFIG)
    assert (len(learnt), len(scored)) == (3, 2)
    (tmp_path / "val/masks/0.tif").unlink()
    with pytest.raises(DataError, match="no mask of its name"):
        check_segmentation_splits(setting, CONFIG)


def test_open__a_negative_value_is_no_class(tmp_path: Path) -> None:
    _index_masks(tmp_path, [1, -1], "int32")
    with pytest.raises(DataError, match=r"1\.tif has -1 at row 0, column 0; classes are 0, 1, …"):
        _open(tmp_path)


def _coco(place: Path, used: dict[str, list[int]], names: tuple[str, ...]) -> Path:
    """COCO files of an object a picture; the first category is above the others."""
    (place / "annotations").mkdir()
    categories = [
        {"id": number, "name": name, "supercategory": "none" if number == 1 else names[0]}
        for number, name in enumerate(names, start=1)
    ]
    for split, ids in used.items():
        (place / split).mkdir()
        tree: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number, category in enumerate(ids):
            Image.new("RGB", (20, 20), (number, 0, 0)).save(place / split / f"{number}.png")
            tree["images"].append({"id": number, "file_name": f"{number}.png"})
            tree["annotations"].append(
                {"id": number, "image_id": number, "category_id": category,
                 "bbox": [2, 2, 10, 10], "segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]]}
            )  # fmt: skip
        (place / f"annotations/instances_{split}.json").write_text(json.dumps(tree))
    return place


def test_splits__classes_are_matched_by_name(tmp_path: Path) -> None:
    names = ("animal", "cat", "dog")
    place = _coco(tmp_path, {"train": [1, 2, 3], "val": [2, 3]}, names)
    for own in ((), ("ground", "beast", "kitten", "puppy")):
        config = SegmentationConfig(class_names=own or None)
        train, val, _, _ = open_segmentation_splits(
            _setting(place), config, InvalidLabels(skip=False)
        )
        assert train.class_names == val.class_names == (own or ("background", *names))
        assert [set(np.unique(val[i].mask)) for i in (0, 1)] == [{0, 2}, {0, 3}]


def test_splits__classes_that_cannot_be_matched_are_refused(tmp_path: Path) -> None:
    names = ("animal", "cat", "dog")
    place = _coco(tmp_path, {"train": [2, 3], "val": [1, 3]}, names)
    own = SegmentationConfig(class_names=("ground", "kitten", "puppy"))
    for config in (CONFIG, own):
        with pytest.raises(DataError, match=r"instances_val.* has class 'animal'"):
            open_segmentation_splits(_setting(place), config, InvalidLabels(False))
    shifted = SegmentationConfig(class_names=("ground", "beast", "kitten", "puppy"))
    with pytest.raises(DataError, match=r"has 3 classes, background, cat, dog; .* names 4"):
        _open(place, config=shifted)
