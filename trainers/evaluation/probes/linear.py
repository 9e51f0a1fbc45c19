"""The linear probe: the accuracy of one linear layer on frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mimray.trainers.config.evaluation.linear import LinearConfig
from mimray.trainers.data.rng import Stream, generator, permutation
from mimray.trainers.data.sources import Source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.charts import confusion_chart
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.extraction import local_device
from mimray.trainers.evaluation.features.pooled import labelled_features, load_probe_data
from mimray.trainers.evaluation.heads.head_files import head_files
from mimray.trainers.evaluation.probes.classification import (
    accuracy_of,
    described_view,
    missing_classes,
    per_class_accuracy,
    top_k_accuracy,
)
from mimray.trainers.evaluation.probes.lars import train_lars
from mimray.trainers.evaluation.probes.linear_classifiers import LinearClassifier, logistic, ridge
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.uncertainty import figure_text, of_accuracy

Solver = Callable[[np.ndarray, np.ndarray, Sequence[float], str], list[LinearClassifier]]
"""From x, y, candidates and a phase to one head a candidate."""


def evaluate(ref: EncoderRef, setting: Setting, config: LinearConfig) -> Score:
    """Score an encoder by one linear layer on its frozen features.

    The candidates (learning rates, strengths) are compared on training pictures that are held
    out; the best is then fitted to all of them, and scored once.

    Args:
        ref: the encoder.
        setting: the data and what every task is told.
        config: the solver and its options.

    Returns:
        Top-1 and top-5 accuracy, by class, what was chosen, and the head itself.

    Raises:
        DataError: labels, classes or pictures that cannot be used, or too few to hold any out.
        ConfigError: the encoder has no class token to pool by.
        NonFiniteLossError: LARS diverged at every learning rate.
    """
    found = load_probe_data(ref, setting, config.pooling, config.view)
    card = ref.card()
    train, val, names = found.train, found.val, found.splits.class_names
    learn_x = train.x
    if config.num_views:
        views, _ = labelled_features(
            ref,
            found.splits.train,
            setting,
            found.pooling,
            phase=f"features of {config.num_views} views of train",
            num_views=config.num_views,
        )
        learn_x = views.x  # N V D
    learnt = found.splits.learnt_names
    key, candidates, solve = _solver(config, setting, len(learnt))

    held_out, kept = _split(found.splits.train, len(train.y), config.held_out, setting.seed)
    tried = solve(learn_x[kept], train.y[kept], candidates, f"choosing {key}")
    shares = [head.accuracy(train.x[held_out], train.y[held_out]) for head in tried]
    best = int(np.argmax(shares))
    # The heads of LARS come together; of the others only the best is worth fitting again.
    again = candidates if config.solver == "lars" else candidates[best : best + 1]
    heads = dict(zip(again, solve(learn_x, train.y, again, "fitting to all"), strict=True))
    head = heads[candidates[best]]

    scores = head.scores(val.x)
    predicted = scores.argmax(axis=1)
    accuracy = float((predicted == val.y).mean())
    per_class = per_class_accuracy(predicted, val.y, names)
    metrics: dict[str, Any] = {
        accuracy_of(config.view): accuracy,
        "top5_accuracy": top_k_accuracy(scores, val.y, 5) if len(learnt) >= 5 else None,
        "train_accuracy": head.accuracy(train.x, train.y),
        "per_class_accuracy": per_class,
        "solver": config.solver,
        "pooling": found.pooling,
        "view": described_view(config.view, card.interpolation, card.image_size),
        key: candidates[best],
        "held_out_accuracy": {str(c): share for c, share in zip(candidates, shares, strict=True)},
        "num_held_out": len(held_out),
    }
    if config.solver == "lars":
        metrics |= {
            "accuracy_by_base_lr": {str(c): h.accuracy(val.x, val.y) for c, h in heads.items()},
            "epochs": config.epochs,
            "batch_size": min(config.batch_size, len(train.y)),
            "num_views": config.num_views,
        }
    evidence = of_accuracy(predicted == val.y, found.splits.val.facts.fingerprint, val.index)
    return Score(
        metric=accuracy_of(config.view),
        headline=accuracy,
        metrics=metrics,
        data_fingerprint=found.splits.train.facts.fingerprint,
        val_fingerprint=found.splits.val.facts.fingerprint,
        num_train=len(train.y),
        num_val=len(val.y),
        evidence=evidence,
        notes=(
            *missing_classes(per_class),
            *_advice(key, candidates, best, head),
            *found.notes,
        ),
        pictures={
            "linear.png": confusion_chart(
                val.y,
                predicted,
                names,
                f"linear probe ({config.solver}): accuracy "
                f"{figure_text(accuracy, evidence.standard_error)} on {len(val.y):,} pictures",
            )
        },
        files=head_files(
            "linear",
            {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)},
            ref.head_card(),
            config.model_copy(update={"pooling": found.pooling}),
            learnt,
        ),
        hold_out=found.splits.hold_out,
    )


def _split(
    source: Source, num_pictures: int, share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to choose on and rows to learn from meanwhile, drawn by the seed."""
    order = permutation(generator(seed, Stream.PROBE_SPLIT, 0), num_pictures)
    num_held_out = round(share * num_pictures)
    if not 0 < num_held_out < num_pictures:
        raise DataError(
            f"{num_pictures} pictures of {source.facts.uri} are too few to hold out {share:.0%} "
            "of them",
            hint="--set held_out=0.5",
        )
    return order[:num_held_out], order[num_held_out:]


def _solver(
    config: LinearConfig, setting: Setting, num_classes: int
) -> tuple[str, tuple[float, ...], Solver]:
    """The option to choose, its candidates, and the solver that fits heads."""
    if config.solver == "lars":

        def lars(
            x: np.ndarray, y: np.ndarray, rates: Sequence[float], phase: str
        ) -> list[LinearClassifier]:
            return train_lars(
                x,
                y,
                num_classes,
                rates,
                config,
                seed=setting.seed,
                device=local_device(setting.device),
                phase=phase,
                progress=setting.progress,
            )

        return "base_lr", config.base_lrs, lars

    def at_once(
        x: np.ndarray, y: np.ndarray, values: Sequence[float], phase: str
    ) -> list[LinearClassifier]:
        setting.progress(phase, 0, len(values))
        heads = (logistic if config.solver == "logistic" else ridge)(x, y, num_classes, values)
        setting.progress(phase, len(values), len(values))
        return heads

    if config.solver == "logistic":
        return "C", config.logistic_c, at_once
    return "alpha", config.ridge_alpha, at_once


def _advice(
    key: str, candidates: Sequence[float], best: int, head: LinearClassifier
) -> tuple[str, ...]:
    """Notes on how a score came about."""
    notes = []
    if len(candidates) > 1 and candidates[best] in (min(candidates), max(candidates)):
        notes.append(f"the best {key}, {candidates[best]:g}, is at the end of those tried")
    if not head.converged:
        notes.append(f"L-BFGS had not converged at {key} = {candidates[best]:g}")
    return tuple(notes)
