from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as mask_api
from PIL import Image

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.detection import DetectionConfig
from mimray.trainers.data.geometry import Placement, whole_view
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.annotations.base import DetectionExample
from mimray.trainers.evaluation.detection.batches import target_of
from mimray.trainers.evaluation.detection.detector import Batch, Detector, build_detector, load_head
from mimray.trainers.evaluation.heads.head_files import head_files, weights_of

SIZE = (40, 56)
KINDS = ("faster_rcnn", "retinanet", "mask_rcnn")


def _config(kind: str, **more: object) -> DetectionConfig:
    settled = {"image_size": SIZE, "layers": (1,), "anchor_sizes": (8, 16, 32, 64)}
    return DetectionConfig.model_validate({"detector": kind, "pyramid_width": 8, **settled, **more})


def _detector(encoder: FrozenEncoder, kind: str, **more: object) -> Detector:
    return build_detector(encoder, _config(kind, **more), ("a", "b"), device="cpu", seed=0)


def _batch() -> Batch:
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8)
    masks = torch.zeros(1, *SIZE, dtype=torch.uint8)
    masks[:, 4:30, 3:40] = 1
    some = {"boxes": torch.tensor([[3.0, 4, 40, 30]]), "labels": torch.tensor([1]), "masks": masks}
    none = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, *SIZE, dtype=torch.uint8),
    }
    return Batch(images, [some, none])


@pytest.mark.parametrize("kind", KINDS)
def test_losses__reach_the_whole_head_and_not_the_frozen_encoder(
    vit: Callable[..., FrozenEncoder], kind: str
) -> None:
    encoder = vit()
    detector = _detector(encoder, kind).train()
    assert not any(name.startswith("encoder") for name in detector.state_dict())
    losses = detector.losses(_batch())
    assert all(torch.isfinite(loss) for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in detector.parameters())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_losses__have_torchvisions_names(vit: Callable[..., FrozenEncoder]) -> None:
    losses = _detector(vit(), "mask_rcnn").train().losses(_batch())
    regions = {"loss_classifier", "loss_box_reg", "loss_mask"}
    assert set(losses) == regions | {"loss_objectness", "loss_rpn_box_reg"}


def test_losses__reach_an_encoder_that_is_finetuned(vit: Callable[..., FrozenEncoder]) -> None:
    encoder = vit()
    encoder.encoder.requires_grad_(True)
    losses = _detector(encoder, "faster_rcnn", finetune=True).train().losses(_batch())
    torch.stack(list(losses.values())).sum().backward()
    weight = encoder.encoder.get_parameter("blocks.0.mlp.fc1.weight")
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_losses__of_a_swin(swin: FrozenEncoder) -> None:
    config = _config("faster_rcnn", layers=(0, 1, 2, 3), image_size=(64, 64))
    detector = build_detector(swin, config, ("a", "b"), device="cpu", seed=0).train()
    batch = _batch()._replace(images=torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert all(torch.isfinite(loss) for loss in detector.losses(batch).values())


@pytest.mark.parametrize("kind", KINDS)
def test_found__lies_on_the_picture_in_its_own_pixels(
    vit: Callable[..., FrozenEncoder], kind: str
) -> None:
    detector = _detector(vit(), kind, score_threshold=0.0, max_detections=20).eval()
    noise = np.random.default_rng(0).integers(0, 256, (90, 61, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), Image.new("RGB", (200, 30))]
    found = detector.detect(pictures)
    for picture, objects in zip(pictures, found, strict=True):
        assert 0 < len(objects.scores) <= 20
        assert (objects.boxes >= 0).all()
        assert (objects.boxes[:, 2:] <= picture.size).all()
        assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
        assert set(objects.labels) <= {0, 1}
        assert (np.diff(objects.scores) <= 0).all()
        if kind == "mask_rcnn":
            assert objects.masks is not None
            assert all(mask["size"] == [*picture.size[::-1]] for mask in objects.masks)
            assert len(objects.masks) == len(objects.scores)
        else:
            assert objects.masks is None
    # Each by itself gives the same.
    alone = detector.detect(pictures[1:])[0]
    assert np.allclose(alone.scores, found[1].scores, atol=1e-5)


def test_boxes_and_masks__come_back_to_where_they_were(
    vit: Callable[..., FrozenEncoder],
) -> None:
    """What the network finds in the input is laid over the picture that the view shows."""
    detector = _detector(vit(), "mask_rcnn").eval()
    view = whole_view((80, 100), SIZE)  # half the size, padded to the right
    box = torch.tensor([[10.0, 5.0, 30.0, 25.0], [51.0, 0.0, 56.0, 40.0]])  # one in the padding
    output = {
        "boxes": box,
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([2, 1]),
        "masks": torch.ones(2, 1, 28, 28),
    }
    found = detector.back(output, view)
    assert found.boxes.tolist() == [[20, 10, 60, 50]]
    assert found.labels.tolist() == [1]
    assert found.masks is not None
    mask = mask_api.decode(found.masks[0]).astype(bool)
    assert mask.shape == (80, 100)
    wanted = np.zeros((80, 100), bool)
    wanted[10:50, 20:60] = True
    assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9  # torchvision pastes to +-1 pixel


def _example(crowd: tuple[bool, ...] = (False, False)) -> DetectionExample:
    masks = np.zeros((2, 20, 28), bool)
    masks[0, 2:10, 4:12] = True
    masks[1, 12:20, 20:28] = True
    boxes = np.array([[4, 2, 12, 10], [20, 12, 28, 20]], np.float64)
    return DetectionExample(
        Image.new("RGB", (28, 20)),
        0,
        boxes,
        np.array([1, 0]),
        np.array(crowd),
        masks.sum(axis=(1, 2)).astype(np.float64),
        masks,
    )


def test_target__moves_with_the_view() -> None:
    view = whole_view((20, 28), SIZE).mirrored()
    target = target_of(_example(), view, with_masks=True)
    assert target["boxes"].tolist() == [[32, 4, 48, 20], [0, 24, 16, 40]]
    assert target["labels"].tolist() == [1, 0]
    for box, mask in zip(target["boxes"].int().tolist(), target["masks"], strict=True):
        rows, columns = torch.nonzero(mask, as_tuple=True)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_target__leaves_out_crowds_and_what_is_out_of_view() -> None:
    whole = whole_view((20, 28), SIZE)
    assert target_of(_example((True, False)), whole, with_masks=False)["labels"].tolist() == [0]
    crop = Placement((20, 28), (0.0, 0.0, 14.0, 10.0), SIZE, SIZE)
    target = target_of(_example(), crop, with_masks=True)
    assert target["labels"].tolist() == [1]
    assert target["boxes"].tolist() == [[16, 8, 48, 40]]
    assert target["masks"].shape == (1, *SIZE)


def test_head__is_loaded_on_its_own_encoder_alone(
    vit: Callable[..., FrozenEncoder], tmp_path: Path
) -> None:
    encoder = vit()
    detector = _detector(encoder, "faster_rcnn", score_threshold=0.0).eval()
    with torch.no_grad():  # unlike any fresh one
        for parameter in detector.parameters():
            parameter.mul_(1.1)
    config = _config("faster_rcnn", score_threshold=0.0)
    weights = weights_of(detector, encoder, finetune=config.finetune)
    for name, content in head_files("detection", weights, encoder.card, config, "ab").items():
        (tmp_path / name).write_bytes(content)
    picture = Image.new("RGB", (50, 50), (200, 90, 20))
    loaded = load_head(tmp_path, encoder)
    assert loaded.class_names == ("a", "b")
    assert np.array_equal(loaded.detect([picture])[0].boxes, detector.detect([picture])[0].boxes)
    other = vit(width=64)
    other.card = other.card.model_copy(update={"weights_sha256": "another", "name": "other"})
    with pytest.raises(DataError, match="was trained on tiny, not on other"):
        load_head(tmp_path, other)
    with pytest.raises(DataError, match=r"holds no head\.json"):
        load_head(tmp_path / "none", encoder)


def test_head__brings_a_finetuned_encoder(
    vit: Callable[..., FrozenEncoder], tmp_path: Path
) -> None:
    encoder = vit()
    config = _config("retinanet", finetune=True)
    detector = _detector(encoder, "retinanet", finetune=True)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1)
    weights = weights_of(detector, encoder, finetune=config.finetune)
    for name, content in head_files("detection", weights, encoder.card, config, "ab").items():
        (tmp_path / name).write_bytes(content)
    fresh = vit()
    load_head(tmp_path, fresh)
    for ours, theirs in zip(fresh.parameters(), encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
