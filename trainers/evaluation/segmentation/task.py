"""Trains a segmentation head on an encoder's maps and scores it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.evaluation.annotations.base import InvalidLabels, SegmentationSet
from mimray.trainers.evaluation.annotations.segmentation import open_segmentation_splits
from mimray.trainers.evaluation.features.encoders import MakeEncoder, check_input
from mimray.trainers.evaluation.heads.train_head import train_head
from mimray.trainers.evaluation.heads.views import tensor_of
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.segmentation.inference import default_size, learning_view
from mimray.trainers.evaluation.segmentation.metrics import scores
from mimray.trainers.evaluation.segmentation.pictures import class_chart, sheet
from mimray.trainers.evaluation.segmentation.scoring import missing_classes, score_pictures
from mimray.trainers.evaluation.segmentation.segmenter import Segmenter, build_segmenter
from mimray.trainers.evaluation.uncertainty import by_bootstrap


def evaluate(make_encoder: MakeEncoder, setting: Setting, config: SegmentationConfig) -> Score:
    """Train a head on the training pictures' maps; score it on the validation pictures.

    Args:
        make_encoder: function that makes the encoder; with `config.finetune` the encoder is trained
            too, and must be a bundle.
        setting: data, device, seed.
        config: options of the head, the pictures and the training.

    Returns:
        The mean IoU and what goes with it, pictures, and the head as files for `load_head`.

    Raises:
        DataError: labels that are wrong or missing.
        ConfigError: an input size that the encoder's stride does not divide.
        NonFiniteLossError: training diverged.
    """
    invalid_labels = InvalidLabels(setting.skip_invalid)
    train, val, hold_out, notes = open_segmentation_splits(setting, config, invalid_labels)
    encoder = make_encoder()
    input_size = config.image_size or default_size(train, encoder.stride)
    check_input(encoder, input_size, "image_size")
    model = build_segmenter(
        encoder, config, train.class_names, input_size, device=setting.device, seed=setting.seed
    )
    rows = _train(model, train, config, setting)
    by_picture, shown = score_pictures(model, val, config.batch_size, setting.progress)
    confusion = by_picture.confusion
    metrics = scores(confusion, train.class_names)
    return Score(
        metric="mIoU",
        headline=metrics["mIoU"],
        metrics={
            **metrics,
            "confusion": confusion.tolist(),
            "class_names": list(train.class_names),
            "image_size": list(input_size),
            "layers": list(model.layers),
            "training": rows,
            "labels": invalid_labels.as_json(),
        },
        data_fingerprint=train.fingerprint,
        val_fingerprint=val.fingerprint,
        num_train=len(train),
        num_val=len(val),
        evidence=by_bootstrap(by_picture.miou, val.fingerprint, len(val)),
        notes=(
            *missing_classes(confusion, train, val),
            *notes,
            *invalid_labels.notes(),
        ),
        pictures={
            "segmentation.png": sheet(shown, train.class_names),
            "segmentation_classes.png": class_chart(metrics["IoU"], rows),
        },
        files=model.files(config),
        hold_out=hold_out,
    )


def masked_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Mean cross entropy over the pixels that are not void, in fp32; 0 where all are.

    Args:
        logits: [B, K, h, w], brought to the labels' resolution bilinearly.
        labels: int64 [B, H, W].
        ignore_index: label of void pixels.
    """
    logits = F.interpolate(logits.float(), labels.shape[-2:], mode="bilinear", align_corners=False)
    total = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def _train(
    model: Segmenter, train: SegmentationSet, config: SegmentationConfig, setting: Setting
) -> list[dict[str, float]]:
    card = model.encoder.card
    trained: nn.Module | None = None
    features: Callable[..., tuple[Tensor, ...]] | None = None
    if config.finetune:
        assert isinstance(model.encoder, FrozenEncoder)
        trained = model.encoder.encoder
        features = model.encoder.encoder.features

    def make_batch(epoch: int, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        inputs, masks = [], []
        for index in indices.tolist():
            image, mask = train[index]
            number = (epoch + index) % config.num_views
            view = learning_view(
                mask.shape,
                model.input_size,
                config.scale,
                seed=setting.seed,
                index=index,
                number=number,
            )
            inputs.append(view.image(model.prepared(image), card.interpolation, card.mean))
            masks.append(view.mask(mask, train.ignore_index))
        return tensor_of(inputs), tensor_of(masks).to(setting.device)

    def losses_of(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        logits = model.logits(inputs, features)
        return {"cross_entropy": masked_cross_entropy(logits, labels, train.ignore_index)}

    identity = hashlib.sha256(
        json.dumps(
            [
                config.model_dump(mode="json"),
                card.model_dump(mode="json", exclude={"scores"}),
                train.fingerprint,
                model.input_size,
                setting.seed,
            ]
        ).encode()
    ).hexdigest()
    return train_head(
        model.head,
        trained,
        num_examples=len(train),
        make_batch=make_batch,
        losses_of=losses_of,
        config=config,
        seed=setting.seed,
        folder=setting.folder,
        identity=identity,
        progress=setting.progress,
    )
