"""RankMe, the effective rank of features: a proxy that needs no labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mimray.trainers.config.evaluation.rankme import RankMeConfig
from mimray.trainers.evaluation.charts import spectrum_chart
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.pooled import pooled_features
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.splits import pictures_to_score
from mimray.trainers.evaluation.uncertainty import by_jackknife, figure_text

EPSILON = 1e-7
PROXY = (
    "RankMe is a proxy that needs no labels: it is comparable only between encoders of the same "
    "width on the same pictures, and a higher rank need not be a better encoder"
)


def evaluate(ref: EncoderRef, setting: Setting, config: RankMeConfig) -> Score:
    """Score an encoder by the effective rank of its features; learns nothing.

    Args:
        ref: the encoder.
        setting: the data, labelled or not: what `val` names, else the data's own validation
            split, else all of it.
        config: pooling, and the bound of the pictures.

    Returns:
        The effective rank and a chart of the singular values.

    Raises:
        DataError: a picture cannot be decoded.
        EmptyDatasetError: no picture is left.
        ConfigError: the encoder has no class token to pool by.
    """
    source = pictures_to_score(setting)
    # Where the bound does not bind, the features are those that other tasks keep.
    if min(setting.limit or len(source), len(source)) > config.limit:
        setting = replace(setting, limit=config.limit)
    found = pooled_features(ref, source, setting, config.pooling, phase="features")
    values = singular_values(found.x)
    rank = effective_rank(values)
    num_pictures, width = found.x.shape
    notes = [PROXY, *found.notes]
    if num_pictures < width:
        notes.insert(
            1, f"{num_pictures} pictures bound the rank of features of width {width}: give more"
        )
    evidence = by_jackknife(rank_without(found.x), source.facts.fingerprint, found.index)
    error = None if evidence is None else evidence.standard_error
    return Score(
        metric="RankMe",
        headline=rank,
        metrics={
            "rankme": rank,
            "rankme_share": rank / min(num_pictures, width),
            "width": width,
            "num_pictures": num_pictures,
            "pooling": config.pooling,
        },
        # Nothing is learnt: what is scored is all there is.
        data_fingerprint=source.facts.fingerprint,
        val_fingerprint=source.facts.fingerprint,
        num_train=0,
        num_val=num_pictures,
        evidence=evidence,
        notes=tuple(notes),
        pictures={
            "rankme.png": spectrum_chart(
                values,
                f"RankMe {figure_text(rank, error)} of width {width} on {num_pictures:,} pictures",
            ),
        },
    )


def rank_without(x: np.ndarray) -> Callable[[np.ndarray], float]:
    """A function of the pictures left out, bool [N], to the effective rank of the others.

    By the eigenvalues of the smaller Gram matrix, which is made once.

    Args:
        x: float [N, D], a picture a row; not centred.
    """
    z = x.astype(np.float64)
    wide = len(z) < z.shape[1]
    gram = z @ z.T if wide else z.T @ z

    def rank(left_out: np.ndarray) -> float:
        rest = gram[~left_out][:, ~left_out] if wide else gram - z[left_out].T @ z[left_out]
        return effective_rank(np.sqrt(np.linalg.eigvalsh(rest).clip(0))[::-1])

    return rank


def singular_values(x: np.ndarray) -> np.ndarray:
    """Singular values of features, float64 [min(N, D)], largest first.

    Args:
        x: float [N, D], a picture a row; not centred.
    """
    values: np.ndarray = torch.linalg.svdvals(torch.from_numpy(x.astype(np.float64))).numpy()
    return values


def effective_rank(values: np.ndarray) -> float:
    """The exponential of the entropy of singular values: 1 for a line, K where all are equal.

    Args:
        values: float64 [K], not negative.

    Source: Garrido et al. 2023, "RankMe: Assessing the Downstream Performance of Pretrained
        Self-Supervised Representations by Their Rank", eq. 1; epsilon as there.
    """
    # Features that are all zero have no direction; their rank comes to 1.
    p = values / max(values.sum(), np.finfo(np.float64).tiny) + EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))
