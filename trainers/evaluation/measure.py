"""Scores of an encoder in the process that has trained it: for sweeps and running probes."""

from __future__ import annotations

import shutil
from functools import partial

from mimray.trainers.config.base import Config
from mimray.trainers.data.selection import labels_of
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef, FeatureEncoder
from mimray.trainers.evaluation.features.map_cache import CachedEncoder
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.splits import open_splits, pictures_to_score
from mimray.trainers.evaluation.tasks import TASKS, load


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
    if task in ("segmentation", "dense-knn"):
        from mimray.trainers.config.evaluation.pixel_labels import PixelLabelsConfig
        from mimray.trainers.evaluation.annotations.segmentation import check_segmentation_splits

        assert isinstance(options, PixelLabelsConfig)
        return check_segmentation_splits(setting, options)
    return frozenset(), frozenset(pictures_to_score(setting).places())


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
