"""Pooled features, one vector a picture: extracted once, then read from the user's cache."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.evaluation.extract import ExtractSpec, View
from mimray.trainers.config.run import Recipe
from mimray.trainers.data.cache import user_cache
from mimray.trainers.data.selection import (
    evenly_spread,
    labelled,
    num_classes_of,
    open_training,
)
from mimray.trainers.data.sources import Source
from mimray.trainers.errors import ConfigError, EmptyDatasetError, MimrayError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.extraction import MANIFEST, extract, read_columns
from mimray.trainers.evaluation.features.parts import describe
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.evaluation.splits import Splits, open_splits
from mimray.trainers.storage import RunDir

logger = logging.getLogger(__name__)

CACHE_BYTES = 4 << 30
Pooling = Literal["mean", "cls", "both"]


@dataclass(frozen=True)
class LabelledFeatures:
    """Features of labelled pictures.

    Attributes:
        x: float32 [N, D]; [N, V, D] of V views.
        y: int64 [N], classes.
        index: int64 [N], in the dataset.
    """

    x: np.ndarray
    y: np.ndarray
    index: np.ndarray


@dataclass(frozen=True)
class PooledFeatures:
    """Features of pictures, labelled or not: a row a view, the views of a picture together.

    Attributes:
        x: float32 [R, D].
        labels: int64 [R]; -1 where there is none.
        index: int64 [R], in the dataset.
        ids: place of each picture.
        notes: pictures left out, for people.
    """

    x: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    ids: list[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ProbeData:
    """Features that a probe learns from and is scored on.

    Attributes:
        splits: the pictures.
        pooling: way in which tokens became a vector.
        train: features to learn from.
        val: features to score on.
        notes: pictures left out, for people.
    """

    splits: Splits
    pooling: Pooling
    train: LabelledFeatures
    val: LabelledFeatures
    notes: tuple[str, ...]


def load_probe_data(
    ref: EncoderRef, setting: Setting, pooling: Pooling | None, view: View = "whole"
) -> ProbeData:
    """Features of the training and validation pictures.

    Args:
        ref: the encoder.
        setting: the data.
        pooling: the card's own where None.
        view: part of each picture that is shown, as of `ExtractSpec`.

    Raises:
        DataError: as of `open_splits` and `labelled_features`.
        ConfigError: the encoder has no class token to pool by.
    """
    splits = open_splits(setting)
    pooling = pooling or ref.card().pooling
    train, skipped = labelled_features(
        ref, splits.train, setting, pooling, phase="features of train", view=view
    )
    val, skipped_val = labelled_features(
        ref, splits.val, setting, pooling, phase="features of val", view=view
    )
    val = replace(val, y=splits.val_numbers[val.y])
    notes = (*splits.notes, *seen_before(ref, splits), *skipped, *skipped_val)
    return ProbeData(splits, pooling, train, val, notes=notes)


def labelled_features(
    ref: EncoderRef,
    source: Source,
    setting: Setting,
    pooling: Pooling,
    *,
    phase: str,
    num_views: int = 0,
    view: View = "whole",
) -> tuple[LabelledFeatures, tuple[str, ...]]:
    """Features of a source's labelled pictures; arguments are those of `pooled_features`.

    Returns:
        The vectors, and a note about each picture left out.

    Raises:
        DataError: a picture has no class or one outside the dataset's, or cannot be decoded.
        EmptyDatasetError: no picture is left.
        ConfigError: the encoder has no class token to pool by.
    """
    check_pooling(ref, pooling)
    if not setting.skip_invalid:
        asked = evenly_spread(len(source), setting.limit)
        labelled(source, asked, num_classes_of(source), skip=False)
    found = pooled_features(
        ref, source, setting, pooling, phase=phase, num_views=num_views, view=view
    )
    good = _is_class(found.labels, source)
    notes = list(found.notes)
    step = max(1, num_views)
    for row in np.flatnonzero(~good)[::step]:
        notes.append(f"left out {found.ids[row]}: {_problem(int(found.labels[row]), source)}")
    if not good.any():
        raise _none_left(source)
    x = found.x[good]
    if num_views:
        x = x.reshape(-1, num_views, x.shape[1])
    return LabelledFeatures(x, found.labels[good][::step], found.index[good][::step]), tuple(notes)


def pooled_features(
    ref: EncoderRef,
    source: Source,
    setting: Setting,
    pooling: Pooling,
    *,
    phase: str,
    num_views: int = 0,
    view: View = "whole",
) -> PooledFeatures:
    """Features of a source's pictures, a vector a view; from the cache where they are known.

    Mean and class token are extracted together, so that another pooling needs no new pass.

    Args:
        ref: the encoder.
        source: the pictures, labelled or not.
        setting: limit, seed of the views, device, whether broken pictures are left out.
        pooling: vectors to give.
        phase: name of the work in progress.
        num_views: random crops a picture; 0 for one view, `view`.
        view: part of each picture that is shown where there are no random crops.

    Raises:
        DataError: a picture cannot be decoded.
        EmptyDatasetError: no picture is left.
        ConfigError: the encoder has no class token to pool by.
    """
    check_pooling(ref, pooling)
    spec = ExtractSpec(
        pooled=("mean", "cls") if ref.card().has_class_token else ("mean",),
        limit=setting.limit,
        view=view,
        num_views=num_views,
        seed=setting.seed if num_views else 0,
        skip_invalid=setting.skip_invalid,
    )
    cache = user_cache("features") if setting.keep_features else setting.folder
    folder = cache / describe(ref, source, spec).key[:32]
    found = extract(
        ref,
        source,
        RunDir(str(folder)),
        spec,
        phase=phase,
        progress=setting.progress,
        device=setting.device,
    )
    os.utime(folder / MANIFEST)
    if found.num_written:
        _evict(cache, keep=folder)
    if found.manifest.num_rows == 0:
        raise _none_left(source)
    columns = ("mean", "cls") if pooling == "both" else (pooling,)
    table = read_columns(found.out, found.manifest, ("id", "index", *columns))
    parts = [table[name].combine_chunks().to_numpy_ndarray() for name in columns]
    index = table["index"].to_numpy()
    return PooledFeatures(
        x=np.concatenate(parts, axis=1),
        labels=_labels_at(source, index),
        index=index,
        ids=table["id"].to_pylist(),
        notes=tuple(f"left out {item.id}: {item.reason}" for item in found.manifest.skipped),
    )


def _labels_at(source: Source, index: np.ndarray) -> np.ndarray:
    """Labels of pictures, int64; of the source, since features are kept whatever the labels are."""
    labels = source.labels()
    return np.full(len(index), -1, dtype=np.int64) if labels is None else labels[index]


def seen_before(ref: EncoderRef, splits: Splits) -> tuple[str, ...]:
    """A note where the encoder was trained on pictures that are held out.

    The card tells which pictures of this dataset its training took. Nothing is told where it was
    trained on another dataset, such as an ingested copy, or is of weights from elsewhere.
    """
    if splits.hold_out is None or ref.untrained:
        return ()
    held = splits.val.identities()
    num_seen = len(trained_on(ref.card(), splits).intersection(held))
    if not num_seen:
        return ()
    share = "the pictures" if num_seen == len(held) else f"{num_seen} of {len(held)} pictures"
    rule = splits.hold_out
    seed = f" --set data.val_seed={rule.seed}" if rule.seed else ""
    return (
        f"the encoder was trained on {share} held out, too; "
        f"`pretrain --set data.val_share={rule.share:g}{seed}` keeps them out",
    )


def trained_on(card: BundleCard, splits: Splits) -> frozenset[str]:
    """Identities of those pictures of a dataset that an encoder's last training took.

    Args:
        card: the encoder's card, whose recipe says what was left out.
        splits: pictures held out of a dataset, and the others.
    """
    whole = (*splits.train.identities(), *splits.val.identities())
    if card.data_fingerprint == splits.whole_fingerprint:
        return frozenset(whole)
    if not card.data_fingerprint or not card.recipe:
        return frozenset()
    try:
        trained = open_training(splits.train.facts.uri, Recipe.model_validate(card.recipe))
    except (ValidationError, MimrayError):
        # A recipe of another version, or one that this dataset does not suit: not its own.
        return frozenset()
    same = trained.facts.fingerprint == card.data_fingerprint
    return frozenset(trained.identities()) if same else frozenset()


def check_pooling(ref: EncoderRef, pooling: Pooling) -> None:
    """Refuse a class token of an encoder that has none.

    Raises:
        ConfigError: that is so.
    """
    if pooling != "mean" and not ref.card().has_class_token:
        raise ConfigError(f"{ref.text} has no class token", hint="pooling=mean")


def _is_class(labels: np.ndarray, source: Source) -> np.ndarray:
    names = source.facts.class_names
    inside: np.ndarray = (labels >= 0) & ((labels < len(names)) if names else True)
    return inside


def _problem(label: int, source: Source) -> str:
    if label < 0:
        return "it has no label"
    return f"its label {label} lies outside 0 to {len(source.facts.class_names) - 1}"


def _none_left(source: Source) -> EmptyDatasetError:
    return EmptyDatasetError(f"no picture of {source.facts.uri} is left to evaluate with")


def _evict(cache: Path, keep: Path) -> None:
    """Delete the extractions unread for longest while the cache is too large."""
    entries: list[tuple[float, int, Path]] = []
    for folder in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process evicted it
            manifest = folder / MANIFEST
            read_at = (manifest if manifest.exists() else folder).stat().st_mtime
            num_bytes = sum(file.stat().st_size for file in folder.iterdir())
            entries.append((read_at, num_bytes, folder))
    excess = sum(num_bytes for _, num_bytes, _ in entries) - CACHE_BYTES
    for _, num_bytes, folder in sorted(entries):
        if excess <= 0:
            return
        if folder != keep:
            logger.info("features in %s were unread for longest and are deleted", folder)
            shutil.rmtree(folder, ignore_errors=True)
            excess -= num_bytes
