"""Scores of an encoder in this process, for sweeps and running probes, and checks before them."""

from __future__ import annotations

import shutil
from functools import partial
from typing import Literal

from mimray.trainers.config.base import Config
from mimray.trainers.data.files import absolute
from mimray.trainers.data.selection import labels_of
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef, FeatureEncoder
from mimray.trainers.evaluation.features.map_cache import CachedEncoder
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.splits import open_splits, pictures_to_score
from mimray.trainers.evaluation.tasks import TASKS, load

LabelKind = Literal["masks", "instances", "boxes", "classes"]
"""A class a pixel; objects with masks; objects with boxes alone; a class a picture."""


def check_pictures(
    task: str, options: Config, setting: Setting, section: str
) -> tuple[frozenset[str], frozenset[str]]:
    """Refuse pictures that an encoder could not be scored by, before there is one.

    Args:
        task: the task's name.
        options: the task's options.
        setting: the pictures.
        section: the section that names the task, for errors: `score` or `evaluation`.

    Returns:
        The places of the pictures to learn from and of those to score on.

    Raises:
        DataError: there are none, or they lack the labels that the task needs.
    """
    if task in ("knn", "linear"):
        learnt = open_source(setting.data, label=setting.label)
        try:
            labels_of(learnt)
        except DataError as error:
            raise DataError(
                f"{section}.task {task} needs labels: {error.args[0]}",
                hint=f"{section}.data with labels, or {section}.task=rankme, a stand-in that needs "
                "none",
            ) from None
        splits = open_splits(setting)
        return frozenset(splits.train.places()), frozenset(splits.val.places())
    if task == "detection":
        from mimray.trainers.evaluation.annotations.base import InvalidLabels
        from mimray.trainers.evaluation.annotations.detection import open_detection_splits

        invalid_labels = InvalidLabels(setting.skip_invalid)
        parts = open_detection_splits(setting, invalid_labels)
        boxes = [frozenset(map(part.name, range(len(part)))) for part in (parts.train, parts.val)]
        return boxes[0], boxes[1]
    if task in ("segmentation", "dense-knn"):
        from mimray.trainers.config.evaluation.pixel_labels import PixelLabelsConfig
        from mimray.trainers.evaluation.annotations.segmentation import check_segmentation_splits

        assert isinstance(options, PixelLabelsConfig)
        return check_segmentation_splits(setting, options)
    return frozenset(), frozenset(pictures_to_score(setting).places())


def label_kind(uri: str, label: str | None = None) -> LabelKind | None:
    """The kind of labels at a place; None where there are none.

    Args:
        uri: URI of a folder, or of a file of annotations or Parquet.
        label: column of the classes; None for `label`, or class folders.

    Raises:
        DataError: there is nothing at the place, or it cannot be read.
    """
    from mimray.trainers.evaluation.annotations.base import InvalidLabels
    from mimray.trainers.evaluation.annotations.detection import find_detection
    from mimray.trainers.evaluation.annotations.segmentation import has_pixel_masks

    place = absolute(uri)
    if has_pixel_masks(place):
        return "masks"
    try:
        opened = find_detection(place, "train")
    except DataError:  # no such file; what is in one is looked at below
        return None if open_source(uri, label=label).labels() is None else "classes"
    return "instances" if opened(InvalidLabels(skip=True), None).has_masks else "boxes"


def measure(task: str, ref: EncoderRef, setting: Setting, options: Config) -> Score:
    """Score an encoder in this process.

    Args:
        task: the task's name.
        ref: the encoder.
        setting: the pictures; its folder is removed in the end.
        options: the task's options.

    Raises:
        DataError: labels or pictures cannot be used.
        NonFiniteLossError: a probe that is trained diverged.
    """
    found = TASKS[task]
    keep = setting.keep_features
    subject = partial(_on_device, ref, setting.device, keep) if found.dense else ref
    try:
        score: Score = load(found.evaluate)(subject, setting, options)
    finally:
        shutil.rmtree(setting.folder, ignore_errors=True)
    return score


def _on_device(ref: EncoderRef, device: str, keep: bool) -> FeatureEncoder:
    encoder = ref.load().to(device)
    return CachedEncoder(encoder, ref.identity) if keep else encoder
