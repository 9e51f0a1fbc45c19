"""Trained heads for the tests' encoders: of drawn weights, as files that `load_head` reads."""

from __future__ import annotations

from pathlib import Path

import torch

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.detection import DetectionConfig
from mimray.trainers.config.evaluation.knn import KnnConfig
from mimray.trainers.config.evaluation.linear import LinearConfig
from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.evaluation.detection.detector import build_detector
from mimray.trainers.evaluation.heads.head_files import head_files, weights_of
from mimray.trainers.evaluation.segmentation.segmenter import build_segmenter

NAMES = ("sky", "road", "tree", "car")


def save_each(folder: Path, encoder: FrozenEncoder) -> dict[str, Path]:
    """A head of each kind: `scenes`, `objects`, `kind`."""
    return {
        "scenes": save_segmentation(folder / "scenes", encoder),
        "objects": save_detection(folder / "objects", encoder),
        "kind": save_linear(folder / "kind", encoder),
    }


def save_segmentation(folder: Path, encoder: FrozenEncoder, **options: object) -> Path:
    """A segmentation head whose classes all occur."""
    config = SegmentationConfig.model_validate({"image_size": encoder.card.image_size, **options})
    size = config.image_size
    assert size is not None
    segmenter = build_segmenter(encoder, config, NAMES, size, device="cpu", seed=1)
    generator = torch.Generator().manual_seed(3)
    for parameter in segmenter.head.parameters():
        parameter.data.normal_(generator=generator)
    return _write(folder, segmenter.files(config))


def save_detection(folder: Path, encoder: FrozenEncoder, detector: str = "mask_rcnn") -> Path:
    """A detector that finds objects by chance."""
    least = 0.005 if detector == "retinanet" else 0.2
    config = DetectionConfig.model_validate(
        {
            "detector": detector, "image_size": encoder.card.image_size, "pyramid_width": 16,
            "layers": (encoder.depth - 1,),
            "anchor_sizes": (8, 16, 32, 64), "score_threshold": least, "max_detections": 12,
        }
    )  # fmt: skip
    made = build_detector(encoder, config, NAMES, device="cpu", seed=2)
    weights = weights_of(made, encoder, finetune=False)
    return _write(folder, head_files("detection", weights, encoder.card, config, NAMES))


def save_linear(folder: Path, encoder: FrozenEncoder, **options: object) -> Path:
    """A linear classifier of the mean of the tokens."""
    config = LinearConfig.model_validate({"pooling": "mean", **options})
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(len(NAMES), encoder.encoder.width, generator=generator) / 20
    tensors = {"weight": weight, "bias": torch.arange(4.0) / 4}
    return _write(folder, head_files("linear", tensors, encoder.card, config, NAMES))


def save_knn(folder: Path, encoder: FrozenEncoder) -> Path:
    """A bank of drawn vectors, of length 1."""
    generator = torch.Generator().manual_seed(5)
    bank = torch.randn(40, encoder.encoder.width, generator=generator)
    tensors = {"bank": bank / bank.norm(dim=1, keepdim=True), "labels": torch.arange(40) % 4}
    config = KnnConfig(pooling="mean", k=7)
    return _write(folder, head_files("knn", tensors, encoder.card, config, NAMES))


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
