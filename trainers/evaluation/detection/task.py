"""Trains a detector on an encoder's maps and scores it."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.detection import DetectionConfig
from mimray.trainers.data.geometry import whole_view
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.errors import ConfigError, DataError, EmptyDatasetError
from mimray.trainers.evaluation.annotations.base import DetectionSet, InvalidLabels
from mimray.trainers.evaluation.annotations.detection import open_detection_splits
from mimray.trainers.evaluation.detection.anchors import anchor_sizes_of
from mimray.trainers.evaluation.detection.batches import TrainingViews
from mimray.trainers.evaluation.detection.detector import (
    FINEST_STRIDE,
    Detections,
    Detector,
    build_detector,
)
from mimray.trainers.evaluation.detection.metrics import (
    Figures,
    GroundTruth,
    coco_figures,
    resampled_ap,
)
from mimray.trainers.evaluation.detection.pictures import draw_curves, draw_found
from mimray.trainers.evaluation.detection.pyramid import choose_layers
from mimray.trainers.evaluation.features.encoders import FeatureEncoder, MakeEncoder, check_input
from mimray.trainers.evaluation.heads.head_files import head_files, weights_of
from mimray.trainers.evaluation.heads.train_head import Row, train_head
from mimray.trainers.evaluation.heads.views import fitting_size
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.uncertainty import by_bootstrap

# By default views have no more tokens and no longer side: attention is quadratic.
_MAX_TOKENS = 1600
_MAX_SIDE_PX = 640
# Pictures from which sizes of views and anchors are told.
_LOOKED_AT = 64
_SHOWN = 6


def evaluate(make_encoder: MakeEncoder, setting: Setting, config: DetectionConfig) -> Score:
    """Train a detector on the training pictures' maps; score it on the validation pictures.

    Args:
        make_encoder: function that makes the encoder; with `config.finetune` the encoder is trained
            too, and must be a bundle.
        setting: data, device, seed.
        config: options of the detector, the pictures and the training.

    Returns:
        COCO's AP and what goes with it, pictures, and the detector as files for `load_head`.

    Raises:
        DataError: labels that are wrong or missing.
        EmptyDatasetError: there is no object to learn from, or to score on.
        ConfigError: an input size that the encoder's stride does not divide, layers that make
            no pyramid, or Mask R-CNN without masks.
        NonFiniteLossError: training diverged.
    """
    invalid_labels = InvalidLabels(setting.skip_invalid)
    need_masks = config.detector == "mask_rcnn"
    train, val, hold_out, notes = open_detection_splits(
        setting, invalid_labels, need_masks=need_masks
    )
    train_indices = evenly_spread(len(train), setting.limit)
    val_indices = evenly_spread(len(val), setting.limit)
    labels = _labels_of(train, val)
    with_objects = _with_objects(train, train_indices, "to learn from")
    _with_objects(val, val_indices, "to score on")
    if need_masks and not train.has_masks:
        raise ConfigError(
            f"detector=mask_rcnn: not every object of {train.uri} has a mask",
            hint="faster_rcnn and retinanet learn from boxes alone",
        )
    encoder = make_encoder()
    config = _settled(config, encoder, train, with_objects)
    detector = build_detector(
        encoder, config, train.class_names, device=setting.device, seed=setting.seed
    )
    rows = _train(detector, encoder, train, train_indices, config, setting)
    found, truths = _find(detector, val, val_indices, labels, config, setting)
    by_box = coco_figures(
        truths, found, train.class_names, by="bbox", max_detections=config.max_detections
    )
    metrics = by_box.as_json()
    if need_masks and val.has_masks:
        by_mask = coco_figures(
            truths, found, train.class_names, by="segm", max_detections=config.max_detections
        )
        metrics["mask"] = by_mask.as_json()
    headline = by_box.values["AP"]
    assert headline is not None
    shown = evenly_spread(len(val_indices), _SHOWN).tolist()
    sheet = draw_found(
        [val[int(val_indices[place])].image for place in shown],
        [found[place] for place in shown],
        [truths[place] for place in shown],
        train.class_names,
        config.shown_score,
    )
    return Score(
        metric="AP",
        headline=headline,
        metrics={
            **metrics,
            "class_names": list(train.class_names),
            **config.model_dump(mode="json", include={"image_size", "layers", "anchor_sizes"}),
            "training": rows,
            "labels": invalid_labels.as_json(),
        },
        data_fingerprint=train.fingerprint,
        val_fingerprint=val.fingerprint,
        num_train=len(train_indices),
        num_val=len(val_indices),
        evidence=by_bootstrap(
            resampled_ap(truths, found, train.class_names, max_detections=config.max_detections),
            val.fingerprint,
            len(val_indices),
        ),
        notes=(
            *_missing(by_box, val),
            *_unscored_masks(config, val),
            *notes,
            *invalid_labels.notes(),
        ),
        pictures={
            "detection.png": sheet,
            "detection_curves.png": draw_curves(rows, by_box, train.class_names),
        },
        files=head_files(
            "detection",
            weights_of(detector, encoder, finetune=config.finetune),
            encoder.card,
            config,
            train.class_names,
        ),
        hold_out=hold_out,
    )


def _labels_of(train: DetectionSet, val: DetectionSet) -> np.ndarray:
    """The training set's number of each class of the validation set, int64 [K]."""
    unknown = sorted(set(val.class_names) - set(train.class_names))
    if unknown:
        raise DataError(
            f"{val.uri} has class {unknown[0]!r}, which {train.uri} lacks",
            hint="the pictures to score on need the classes of those to learn from",
        )
    return np.array([train.class_names.index(name) for name in val.class_names], np.int64)


def _with_objects(data: DetectionSet, indices: np.ndarray, purpose: str) -> np.ndarray:
    """Those pictures that have objects; refuses data without any."""
    found = [index for index in indices.tolist() if len(data.labels(index))]
    if not found:
        raise EmptyDatasetError(
            f"{data.uri}: none of {len(indices)} pictures has an object {purpose}",
            hint="crowds and what is marked difficult do not count",
        )
    return np.array(found, np.int64)


def _settled(
    config: DetectionConfig, encoder: FeatureEncoder, train: DetectionSet, indices: np.ndarray
) -> DetectionConfig:
    """The options with `image_size`, `layers` and `anchor_sizes` filled in."""
    places = evenly_spread(len(indices), _LOOKED_AT)
    examples = [train[index] for index in indices[places].tolist()]
    sizes = [(example.image.height, example.image.width) for example in examples]
    image_size = config.image_size or fitting_size(
        sizes, encoder.stride, max_tokens=_MAX_TOKENS, max_side_px=_MAX_SIDE_PX
    )
    check_input(encoder, image_size, "image_size")
    boxes = [
        whole_view(size, image_size).boxes(example.boxes[~example.crowd])
        for size, example in zip(sizes, examples, strict=True)
    ]
    return config.model_copy(
        update={
            "image_size": image_size,
            "layers": choose_layers(encoder, config.layers, FINEST_STRIDE[config.detector]),
            "anchor_sizes": config.anchor_sizes or anchor_sizes_of(np.concatenate(boxes)),
        }
    )


def _train(
    detector: Detector,
    encoder: FeatureEncoder,
    train: DetectionSet,
    indices: np.ndarray,
    config: DetectionConfig,
    setting: Setting,
) -> list[Row]:
    trained = None
    if config.finetune:
        assert isinstance(encoder, FrozenEncoder)
        trained = encoder.encoder
    card = encoder.card.model_dump(mode="json", exclude={"scores"})
    about = [config.model_dump(mode="json"), card, train.fingerprint, setting.limit, setting.seed]
    return train_head(
        detector,
        trained,
        num_examples=len(indices),
        make_batch=TrainingViews(detector, train, indices, config, setting.seed),
        losses_of=detector.losses,
        config=config,
        seed=setting.seed,
        folder=setting.folder,
        identity=hashlib.sha256(json.dumps(about).encode()).hexdigest(),
        progress=setting.progress,
        phase="training the detector",
    )


def _find(
    detector: Detector,
    val: DetectionSet,
    indices: np.ndarray,
    labels: np.ndarray,
    config: DetectionConfig,
    setting: Setting,
) -> tuple[list[Detections], list[GroundTruth]]:
    """Objects found on the validation pictures, and those labelled there."""
    found: list[Detections] = []
    truths: list[GroundTruth] = []
    for start in range(0, len(indices), config.batch_size):
        batch = indices[start : start + config.batch_size].tolist()
        examples = [val[index] for index in batch]
        found += detector.detect([example.image for example in examples])
        truths += [GroundTruth.of(example, labels[example.labels]) for example in examples]
        setting.progress("finding objects", len(found), len(indices))
    return found, truths


def _missing(figures: Figures, val: DetectionSet) -> tuple[str, ...]:
    """A note that names the classes of which there is no object to score on."""
    names = [name for name, values in figures.per_class.items() if values["AP"] is None]
    if not names:
        return ()
    return (f"no object of {', '.join(names)} to score on in {val.uri}; left out of the means",)


def _unscored_masks(config: DetectionConfig, val: DetectionSet) -> tuple[str, ...]:
    """A note that masks were learnt and could not be scored."""
    if config.detector != "mask_rcnn" or val.has_masks:
        return ()
    return (f"the objects of {val.uri} have no masks: masks were learnt and not scored",)
