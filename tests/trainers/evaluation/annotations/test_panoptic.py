from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels
from mimray.trainers.evaluation.annotations.panoptic import VOID, CocoPanoptic, is_panoptic

IDS = np.array([[0, 7, 7, 7], [0, 7, 300, 300], [70_000, 70_000, 300, 300]])


@pytest.fixture
def panoptic(tmp_path: Path) -> Callable[..., CocoPanoptic]:
    """Writes a picture of three segments, whose content may be changed before it is opened."""
    (tmp_path / "val").mkdir()
    (tmp_path / "annotations/panoptic_val").mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(tmp_path / "val/a.jpg")
    rgb = np.stack([IDS % 256, IDS // 256 % 256, IDS // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "annotations/panoptic_val/a.png")
    content: dict[str, Any] = {
        "images": [{"id": 5, "file_name": "a.jpg", "height": 3, "width": 4}],
        "categories": [{"id": 90, "name": "sky"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {
                "image_id": 5,
                "file_name": "a.png",
                "segments_info": [
                    {"id": 7, "category_id": 90},
                    {"id": 300, "category_id": 3},
                    {"id": 70_000, "category_id": 90},
                ],
            }
        ],
    }

    def opened(change: Callable[[dict[str, Any]], object] = lambda content: None) -> CocoPanoptic:
        change(content)
        file = tmp_path / "annotations/panoptic_val.json"
        file.write_text(json.dumps(content))
        assert is_panoptic(str(file))
        return CocoPanoptic(str(file), InvalidLabels(False))

    return opened


def test_panoptic__segments_become_classes(panoptic: Callable[..., CocoPanoptic]) -> None:
    found = panoptic()
    assert found.class_names == ("cat", "sky"), "in the order of the ids"
    assert len(found) == 1
    expected = [[VOID, 1, 1, 1], [VOID, 1, 0, 0], [1, 1, 0, 0]]
    np.testing.assert_array_equal(found[0].mask, expected)
    assert found.name(0).endswith("panoptic_val.json: image 5")


def _drop_segment(content: dict[str, Any]) -> None:
    del content["annotations"][0]["segments_info"][1]


def _set_segment(content: dict[str, Any]) -> None:
    content["annotations"][0]["segments_info"][1]["category_id"] = 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_segment, "a.png has segment 300, which segments_info lacks"),
        (_set_segment, "segment 300: there is no category 4"),
        (lambda c: c["annotations"][0].update(image_id=6), "there is no image 6"),
        (lambda c: c["annotations"][0].update(file_name="b.png"), "there is no mask .*b.png"),
    ],
)
def test_panoptic__wrong_labels_are_named(
    panoptic: Callable[..., CocoPanoptic], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        panoptic(change)[0]


def test_panoptic__a_png_of_another_size(
    panoptic: Callable[..., CocoPanoptic], tmp_path: Path
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "annotations/panoptic_val/a.png")
    with pytest.raises(DataError, match="a.png is 4x4 pixels, its picture 4x3"):
        panoptic()[0]
    Image.new("L", (4, 3)).save(tmp_path / "annotations/panoptic_val/a.png")
    with pytest.raises(DataError, match="no RGB colours"):
        panoptic()[0]


def test_panoptic__a_file_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotation file at .*none.json"):
        is_panoptic(str(tmp_path / "none.json"))
    (tmp_path / "a.json").write_text('{"images": [], "categories": []}')
    assert not is_panoptic(str(tmp_path / "a.json"))
    with pytest.raises(DataError, match=r"a\.json: annotations: Field required"):
        CocoPanoptic(str(tmp_path / "a.json"), InvalidLabels(False))


def _with_a_root(content: dict[str, Any]) -> None:
    content["categories"].append({"id": 0, "name": "root"})
    content["categories"][0]["supercategory"] = "root"


def test_panoptic__as_tools_write_it(panoptic: Callable[..., CocoPanoptic], tmp_path: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        _with_a_root(content)
        for image in content["images"]:
            del image["height"], image["width"]
            image["file_name"] = ".\\" + image["file_name"]

    want = panoptic()
    found = panoptic(spoil)
    assert found.class_names == want.class_names
    np.testing.assert_array_equal(found[0].mask, want[0].mask)
    assert not found.is_turned(0)


def test_panoptic__masks_as_jpeg_are_refused(
    panoptic: Callable[..., CocoPanoptic], tmp_path: Path
) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "annotations/panoptic_val/a.png", "JPEG")
    with pytest.raises(DataError, match=r"stored as JPEG, which changes indices .*PNG"):
        panoptic()[0]
