"""Trained heads on a served encoder: their views, their forward passes, their predictions.

Heads that see the same view of a picture share one pass through the encoder.
"""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mimray.serving.inference.preprocess import Array
from mimray.trainers.data.geometry import Placement, Size, whole_view
from mimray.trainers.errors import ServingError

if TYPE_CHECKING:
    from torch import Tensor

    from mimray.trainers.bundles import BundleCard, FrozenEncoder
    from mimray.trainers.evaluation.detection.detector import Detections, Detector
    from mimray.trainers.evaluation.probes.pooled_head import PooledHead
    from mimray.trainers.evaluation.segmentation.segmenter import Segmenter
    from mimray.trainers.types import Features

Task = Literal["segmentation", "detection", "classification"]


class Segmented(NamedTuple):
    """The class of each pixel, int [h, w] at the picture's own size."""

    classes: Array


class Classified(NamedTuple):
    """The score of each class, float64 [K]."""

    scores: Array


class Pass(NamedTuple):
    """A batch as heads see it, on the device.

    Attributes:
        images: normalised, float [B, C, H, W].
        maps: maps [B, D, h, w] by layer, after the final norm.
        features: the tokens; None where no head of the batch takes them.
    """

    images: Tensor
    maps: dict[int, Tensor]
    features: Features | None


class Head(ABC):
    """A trained head.

    Attributes:
        task: kind of what it finds.
        class_names: names of the classes, by index.
        layers: layers whose maps it takes.
        takes_tokens: True if it takes the encoder's tokens.
        input_size: (height, width) of the encoder's input, pixels.
        sha256: digest of the head's files.
    """

    task: Task
    class_names: tuple[str, ...]
    layers: tuple[int, ...] = ()
    takes_tokens: bool = False
    input_size: Size
    sha256: str

    @abstractmethod
    def views(self, source_size: Size) -> list[Placement]:
        """The parts of a picture that it looks at, each in the encoder's input."""

    @abstractmethod
    def compute(self, batch: Pass) -> list[Any]:
        """Raw outputs of a batch, one a view, on the CPU."""

    @abstractmethod
    def finish(self, source_size: Size, made: Sequence[Any]) -> Any:
        """The prediction for a picture, from the raw outputs of its views.

        Args:
            source_size: (height, width) of the picture, pixels.
            made: raw outputs in the order of `views`.
        """


class SegmentationHead(Head):
    """A class for each pixel."""

    task = "segmentation"

    def __init__(self, segmenter: Segmenter) -> None:
        self.class_names, self.layers = segmenter.class_names, segmenter.layers
        self.input_size = segmenter.input_size
        self._segmenter = segmenter

    def views(self, source_size: Size) -> list[Placement]:
        """One, or overlapping windows of a head that has a scale."""
        return [view for view, _ in self._windows(source_size)]

    def compute(self, batch: Pass) -> list[Any]:
        """Logits [K, h, w] of each view."""
        logits = self._segmenter.head([batch.maps[layer] for layer in self.layers])
        return list(logits.float().cpu())

    def finish(self, source_size: Size, made: Sequence[Any]) -> Segmented:
        """The class of each pixel."""
        import torch

        from mimray.trainers.evaluation.segmentation.inference import merged

        head = self._segmenter
        windows = self._windows(source_size)
        return Segmented(
            merged(torch.stack(list(made)), windows, source_size, head.input_size, head.scale)
        )

    def _windows(self, source_size: Size) -> list[tuple[Placement, tuple[int, int]]]:
        from mimray.trainers.evaluation.segmentation.inference import window_views

        head = self._segmenter
        return window_views(source_size, head.input_size, head.scale, head.overlap)


class DetectionHead(Head):
    """Objects with boxes, perhaps with masks."""

    task = "detection"

    def __init__(self, detector: Detector, encoder: _MapsAtHand) -> None:
        self.class_names, self.input_size = detector.class_names, detector.input_size
        self.layers = detector.layers
        self._detector, self._encoder = detector, encoder

    def views(self, source_size: Size) -> list[Placement]:
        """The whole picture, its aspect kept."""
        return [whole_view(source_size, self.input_size)]

    def compute(self, batch: Pass) -> list[Any]:
        """The network's output of each view."""
        with self._encoder.holding(batch.maps):
            outputs = self._detector.network(list(batch.images))
        return [{name: value.cpu() for name, value in output.items()} for output in outputs]

    def finish(self, source_size: Size, made: Sequence[Any]) -> Detections:
        """The objects, in the picture's own pixels."""
        ((view,), (output,)) = self.views(source_size), made
        return self._detector.back(output, view)


class ClassificationHead(Head):
    """A score for each class of pictures."""

    task = "classification"
    takes_tokens = True

    def __init__(self, head: PooledHead, input_size: Size) -> None:
        self.class_names, self.input_size = head.class_names, input_size
        self._head = head

    def views(self, source_size: Size) -> list[Placement]:
        """The whole picture, stretched as the encoder's training had it."""
        return [whole_view(source_size, self.input_size, keep_aspect=False)]

    def compute(self, batch: Pass) -> list[Any]:
        """Scores [K] of each view."""
        assert batch.features is not None
        return list(self._head.scores(self._head.pooled(batch.features)).double().cpu())

    def finish(self, source_size: Size, made: Sequence[Any]) -> Classified:
        """The scores as they are."""
        (scores,) = made
        return Classified(scores.numpy())


class HeadSet(Mapping[str, Head]):
    """The heads of one encoder, by name.

    Args:
        folders: folders of the trained heads, by the names they are asked for by.
        encoder: the encoder that all of them were trained on, on the device.
        device: device of the heads, as torch names it.

    Raises:
        DataError: there is no head, or it belongs to another encoder.
        ServingError: a head that cannot be served beside others.
    """

    def __init__(self, folders: Mapping[str, Path], encoder: FrozenEncoder, device: str) -> None:
        from mimray.trainers.bundles import folder_sha256

        self._encoder = encoder
        at_hand = _MapsAtHand(encoder)
        self._heads: dict[str, Head] = {}
        for name, folder in folders.items():
            self._heads[name] = _load(name, folder, at_hand, device)
            self._heads[name].sha256 = folder_sha256(folder)

    def __getitem__(self, name: str) -> Head:
        return self._heads[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)

    @property
    def sha256(self) -> str:
        """Digest of all heads and their names."""
        named = sorted((name, head.sha256) for name, head in self._heads.items())
        return hashlib.sha256(repr(named).encode()).hexdigest()

    def compute(self, images: Tensor, names: Sequence[str]) -> dict[str, list[Any]]:
        """Raw outputs of heads by name, one a view, from one pass through the encoder.

        Args:
            images: normalised pictures, float [B, C, H, W].
            names: the heads.
        """
        heads = {name: self._heads[name] for name in names}
        layers = tuple(sorted({layer for head in heads.values() for layer in head.layers}))
        features: Features | None = None
        if any(head.takes_tokens for head in heads.values()):
            features, found = self._encoder.encoder.forward_intermediates(images, layers, True)
        else:
            found = self._encoder.features(images, layers, True)
        batch = Pass(images, dict(zip(layers, found, strict=True)), features)
        return {name: head.compute(batch) for name, head in heads.items()}


def check_head(name: str, folder: Path, card: BundleCard) -> None:
    """Refuse a head that cannot be served on an encoder; nothing is loaded.

    Args:
        name: the head's.
        folder: folder of the head's files.
        card: card of the encoder.

    Raises:
        ServingError: there is none, it belongs to another encoder, or it brings its own.
    """
    from mimray.trainers.evaluation.heads.head_files import CARD

    try:
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
        task, sha256, config = found["task"], found["encoder_sha256"], found["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ServingError(
            f"head {name!r}: {folder} holds no trained head ({type(error).__name__} in {CARD})",
            hint="`mimray evaluate --task segmentation`, detection, linear or knn leaves one in "
            "`evaluation/` of the run",
        ) from None
    if sha256 != card.weights_sha256:
        raise ServingError(
            f"head {name!r} was trained on {found.get('encoder', 'another encoder')}, whose "
            f"weights are not those of {card.name}",
            hint="train it on the encoder that is served: `mimray evaluate` again",
        )
    if config.get("finetune"):
        raise ServingError(
            f"head {name!r} was trained together with its encoder, whose weights are no longer "
            f"those of {card.name}",
            hint="train it on the frozen encoder, without --finetune",
        )
    if config.get("view") == "center_crop":
        raise ServingError(
            f"head {name!r} ({task}) was trained on centre crops, and pictures are served whole",
            hint="`mimray evaluate --set view=whole`",
        )


def _load(name: str, folder: Path, encoder: _MapsAtHand, device: str) -> Head:
    from mimray.trainers.evaluation.detection.detector import Detector
    from mimray.trainers.evaluation.load_head import load_head
    from mimray.trainers.evaluation.segmentation.segmenter import Segmenter

    check_head(name, folder, encoder.card)
    found = load_head(folder, encoder, device)
    if isinstance(found, Segmenter):
        return SegmentationHead(found)
    if isinstance(found, Detector):
        return DetectionHead(found, encoder)
    return ClassificationHead(found, encoder.card.image_size)


class _MapsAtHand:
    """The encoder as heads see it: what they ask for was computed for all of them before.

    Batches run in several threads, each of which holds maps of its own.
    """

    def __init__(self, encoder: FrozenEncoder) -> None:
        self.card = encoder.card
        self.depth, self.stride = encoder.depth, encoder.stride
        self.strides, self.widths = encoder.strides, encoder.widths
        self._encoder = encoder
        self._held = threading.local()

    @contextmanager
    def holding(self, maps: Mapping[int, Tensor]) -> Iterator[None]:
        self._held.maps = maps
        try:
            yield
        finally:
            del self._held.maps

    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        assert layers is not None
        assert norm
        return tuple(self._held.maps[layer] for layer in layers)

    def __call__(self, images: Tensor) -> Features:
        return self._encoder(images)  # type: ignore[no-any-return]
