"""torchvision's detectors on the maps of an encoder, from pictures to boxes and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.detection import DetectionConfig
from mimray.trainers.data.geometry import Placement, Size, clip_boxes, whole_view
from mimray.trainers.evaluation.detection.anchors import StrideAnchors, region_pool
from mimray.trainers.evaluation.detection.pyramid import Pyramid, build_pyramid
from mimray.trainers.evaluation.features.encoders import FeatureEncoder
from mimray.trainers.evaluation.heads.head_files import load_weights, read_card
from mimray.trainers.evaluation.heads.views import tensor_of
from mimray.trainers.models.normalise import normalise

# Stride of the first level, pixels.
FINEST_STRIDE = {"faster_rcnn": 4, "mask_rcnn": 4, "retinanet": 8}

_REGION_CELLS, _MASK_CELLS = 7, 14
# Hidden width of the box head over the pyramid's: 1024 for 256 (Lin et al. 2017, sec. 4.2).
_BOX_WIDTH = 4
_MASK_CONVOLUTIONS = 4
# A quarter of torchvision's: views are smaller here than the 800 pixels its numbers are for.
_ANCHORS_LEARNT, _REGIONS_LEARNT = 128, 128
_CANDIDATES = 500
# Anchor sizes a level over the first (Lin et al. 2017, "Focal loss", sec. 4).
_RETINA_OCTAVES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))


class Batch(NamedTuple):
    """Views of pictures with the objects on them.

    Attributes:
        images: uint8 [B, C, H, W].
        targets: `boxes` float32 [N, 4] (left, top, right, bottom) in the input, `labels` int64
            [N], classes from 0, and for Mask R-CNN `masks` uint8 [N, H, W]; a picture each.
    """

    images: Tensor
    targets: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Detections:
    """Objects found on a picture, the best first.

    Attributes:
        boxes: float64 [N, 4], (left, top, right, bottom) in pixels of the picture.
        scores: float64 [N], in [0, 1].
        labels: int64 [N], classes from 0.
        masks: COCO run lengths of each object at the picture's size; None without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[dict[str, Any]] | None


class Detector(nn.Module):
    """A detector that learns from, and works on, the maps of an encoder that is not part of it.

    Args:
        encoder: source of the maps; a `FrozenEncoder` where it is trained too.
        config: kind and size, with `image_size`, `layers` and `anchor_sizes` settled.
        class_names: names of the classes, by label.

    Attributes:
        class_names: names of the classes, by label.
        input_size: (height, width) of views, pixels.
        layers: layers whose maps it takes.
    """

    def __init__(
        self, encoder: FeatureEncoder, config: DetectionConfig, class_names: tuple[str, ...]
    ) -> None:
        super().__init__()
        assert config.image_size is not None
        assert config.layers is not None
        assert config.anchor_sizes is not None
        self.class_names, self.input_size = class_names, config.image_size
        self.layers = config.layers
        self._card = encoder.card
        # Class 0 of an R-CNN is the background.
        self._first_label = 0 if config.detector == "retinanet" else 1
        finest = FINEST_STRIDE[config.detector]
        pyramid = build_pyramid(encoder, config.layers, finest, config.pyramid_width)
        backbone = _Backbone(_maps_of(encoder, config.layers, config.finetune), pyramid)
        num_labels = len(class_names) + self._first_label
        self.network = _build(config, backbone, num_labels, config.anchor_sizes)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch, by torchvision's names; in training mode."""
        images = self._inputs(batch.images)
        targets = [
            {name: value.to(images.device) for name, value in target.items()}
            | {"labels": target["labels"].to(images.device) + self._first_label}
            for target in batch.targets
        ]
        return cast(dict[str, Tensor], self.network(list(images), targets))

    @torch.no_grad()
    def detect(self, pictures: Sequence[Image.Image]) -> list[Detections]:
        """Find objects on pictures of any size; in evaluation mode.

        Args:
            pictures: upright, RGB; encoded as one batch.
        """
        views = [whole_view((p.height, p.width), self.input_size) for p in pictures]
        images = tensor_of([self.view(v, p) for v, p in zip(views, pictures, strict=True)])
        outputs = self.network(list(self._inputs(images)))
        return [self.back(out, view) for out, view in zip(outputs, views, strict=True)]

    def view(self, view: Placement, picture: Image.Image) -> np.ndarray:
        """A view of a picture as this encoder takes it, uint8 [C, H, W]."""
        picture = picture.convert("L") if self._card.channels == 1 else picture
        return view.image(picture, self._card.interpolation, self._card.mean)

    def _inputs(self, images: Tensor) -> Tensor:
        device = next(self.parameters()).device
        return normalise(images.to(device), self._card.mean, self._card.std)

    def back(self, output: dict[str, Tensor], view: Placement) -> Detections:
        """Bring what was found from the input to the picture; nothing is found in padding.

        Args:
            output: the network's, of one picture.
            view: the picture's place in the input.
        """
        height, width = view.source_size
        whole = view.boxes_back(output["boxes"].double().cpu().numpy())
        boxes = clip_boxes(whole, (0.0, 0.0, float(width), float(height)))
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = None
        if "masks" in output:
            shapes = output["masks"].cpu()[torch.from_numpy(kept)]  # N 1 M M
            masks = _run_lengths(shapes, torch.from_numpy(whole[kept]).float(), view.source_size)
        return Detections(
            boxes=boxes[kept],
            scores=output["scores"].double().cpu().numpy()[kept],
            labels=output["labels"].cpu().numpy()[kept] - self._first_label,
            masks=masks,
        )


def build_detector(
    encoder: FeatureEncoder,
    config: DetectionConfig,
    class_names: tuple[str, ...],
    *,
    device: str,
    seed: int,
) -> Detector:
    """A fresh detector, on a device.

    Args:
        encoder: source of the maps, on the device.
        config: the task's options, with `image_size`, `layers` and `anchor_sizes` settled.
        class_names: names of the classes, by label.
        device: device of the detector, as torch names it.
        seed: seed of the initialisation; torch's own generator keeps its state.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(encoder, config, class_names).to(device)


def load_head(folder: Path, encoder: FeatureEncoder, device: str = "cpu") -> Detector:
    """Put a trained detector on the encoder that it was trained on.

    Args:
        folder: folder of `head.safetensors` and `head.json`.
        encoder: the same, on the device. A detector that was trained together with its encoder
            brings that encoder's weights, which are written into this one.
        device: device of the detector, as torch names it.

    Raises:
        DataError: there is none, or it belongs to another encoder.
    """
    card = read_card(folder, "detection", encoder)
    config = DetectionConfig.model_validate(card["config"])
    names = tuple(card["class_names"])
    detector = build_detector(encoder, config, names, device=device, seed=0)
    load_weights(folder, detector, encoder)
    return detector


class _Backbone(nn.Module):
    """Levels of pictures; the encoder is called, and is no submodule."""

    def __init__(self, maps_of: Callable[[Tensor], Sequence[Tensor]], pyramid: Pyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.out_channels = pyramid.width
        self._maps_of = maps_of

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Levels of normalised pictures [B, C, H, W], by number."""
        levels = self.pyramid(self._maps_of(images))
        return {str(number): level for number, level in enumerate(levels)}


class _AsGiven(nn.Module):
    """Stands in for torchvision's resizing and padding, which a `Placement` has done."""

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        """Pictures of one size, as a batch."""
        batch = torch.stack(images)
        return ImageList(batch, [(batch.shape[2], batch.shape[3])] * len(images)), targets

    def postprocess(self, result: Any, *_: object) -> Any:
        """Leave results in the input's coordinates, masks in those of their boxes."""
        return result


def _maps_of(
    encoder: FeatureEncoder, layers: tuple[int, ...], finetune: bool
) -> Callable[[Tensor], Sequence[Tensor]]:
    if not finetune:
        return partial(encoder.features, layers=layers)
    assert isinstance(encoder, FrozenEncoder)
    return partial(encoder.encoder.features, layers=layers)


def _build(
    config: DetectionConfig, backbone: _Backbone, num_labels: int, anchor_sizes: Sequence[float]
) -> nn.Module:
    strides, width = backbone.pyramid.strides, config.pyramid_width
    network: nn.Module
    if config.detector == "retinanet":
        sizes = [[size * octave for octave in _RETINA_OCTAVES] for size in anchor_sizes]
        anchors = StrideAnchors(sizes, strides)
        # Without norms its towers hardly learn at first. Groups have four channels or more, so that
        # they have a spread on levels of one cell.
        norm = partial(nn.GroupNorm, max(1, math.gcd(32, width) // 4))
        network = RetinaNet(
            backbone,
            num_labels,
            anchor_generator=anchors,
            head=RetinaNetHead(
                width, anchors.num_anchors_per_location()[0], num_labels, norm_layer=norm
            ),
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_iou,
            detections_per_img=config.max_detections,
        )
    else:
        hidden = _BOX_WIDTH * width
        options: dict[str, Any] = {
            "rpn_anchor_generator": StrideAnchors([[size] for size in anchor_sizes], strides),
            "rpn_pre_nms_top_n_train": _CANDIDATES,
            "rpn_pre_nms_top_n_test": _CANDIDATES,
            "rpn_post_nms_top_n_train": config.num_proposals,
            "rpn_post_nms_top_n_test": config.num_proposals,
            "rpn_batch_size_per_image": _ANCHORS_LEARNT,
            "box_batch_size_per_image": _REGIONS_LEARNT,
            "box_roi_pool": region_pool(strides, _REGION_CELLS),
            "box_head": TwoMLPHead(width * _REGION_CELLS**2, hidden),
            "box_predictor": FastRCNNPredictor(hidden, num_labels),
            "box_score_thresh": config.score_threshold,
            "box_nms_thresh": config.nms_iou,
            "box_detections_per_img": config.max_detections,
        }
        if config.detector == "mask_rcnn":
            options["mask_roi_pool"] = region_pool(strides, _MASK_CELLS)
            options["mask_head"] = MaskRCNNHeads(width, (width,) * _MASK_CONVOLUTIONS, 1)
            options["mask_predictor"] = MaskRCNNPredictor(width, width, num_labels)
            network = MaskRCNN(backbone, **options)
        else:
            network = FasterRCNN(backbone, **options)
    network.transform = _AsGiven()
    return network


def _run_lengths(shapes: Tensor, boxes: Tensor, size: Size) -> list[dict[str, Any]]:
    """COCO run lengths of masks [N, 1, M, M], each over its box [4] in a picture of a size."""
    from faster_coco_eval.core import mask as mask_api

    found = []
    for shape, box in zip(shapes, boxes, strict=True):  # one at a time: pictures may be large
        pasted = paste_masks_in_image(shape[None], box[None], size)[0, 0] > 0.5
        found.append(mask_api.encode(np.asfortranarray(pasted.numpy().astype(np.uint8))))
    return found
