"""Training batches of a detector: views of pictures, with the objects that are on them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mimray.trainers.config.evaluation.detection import DetectionConfig
from mimray.trainers.data.geometry import Placement, clip_boxes
from mimray.trainers.evaluation.annotations.base import DetectionExample, DetectionSet
from mimray.trainers.evaluation.detection.detector import Batch, Detector
from mimray.trainers.evaluation.heads.views import tensor_of, training_view

# What less is left of, along a side, is not learnt from; pixels of the input.
_SMALLEST_PX = 1.0


class TrainingViews:
    """Makes batches from (epoch, examples), a pure function of both.

    Args:
        detector: detector that learns from the batches.
        train: the pictures.
        indices: int64, those of them to learn from; example i is picture `indices[i]`.
        config: the task's options.
        seed: seed of the crops.
    """

    def __init__(
        self,
        detector: Detector,
        train: DetectionSet,
        indices: np.ndarray,
        config: DetectionConfig,
        seed: int,
    ) -> None:
        self._detector, self._train, self._indices = detector, train, indices
        self._num_views, self._seed = config.num_views, seed
        self._with_masks = config.detector == "mask_rcnn"

    def __call__(self, epoch: int, examples: np.ndarray) -> Batch:
        """Views of examples, int64 [B], as they are shown in an epoch."""
        images, targets = [], []
        for index in self._indices[examples].tolist():
            example = self._train[index]
            view = training_view(
                (example.image.height, example.image.width),
                self._detector.input_size,
                seed=self._seed,
                index=index,
                number=(epoch + index) % self._num_views,
            )
            images.append(self._detector.view(view, example.image))
            targets.append(target_of(example, view, with_masks=self._with_masks))
        return Batch(tensor_of(images), targets)


def target_of(example: DetectionExample, view: Placement, *, with_masks: bool) -> dict[str, Tensor]:
    """The objects that a view shows, as torchvision takes them; never a crowd.

    Args:
        example: picture and objects.
        view: view of the picture.
        with_masks: True adds masks.

    Returns:
        A target of `Batch`.
    """
    boxes = clip_boxes(view.boxes(example.boxes), view.valid_region)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = ~example.crowd & (sides >= _SMALLEST_PX).all(axis=1)
    target: dict[str, Tensor] = {}
    if with_masks:
        assert example.masks is not None
        masks = view.mask(example.masks, fill=0)
        kept &= masks.any(axis=(1, 2))
        target["masks"] = torch.from_numpy(masks[kept].astype(np.uint8))
    target["boxes"] = torch.from_numpy(boxes[kept]).float()
    target["labels"] = torch.from_numpy(example.labels[kept])
    return target
