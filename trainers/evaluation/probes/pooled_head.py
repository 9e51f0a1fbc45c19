"""Classifiers of pooled features as files and in use: the linear probe's layer, the bank of kNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mimray.trainers.config.evaluation.extract import View
from mimray.trainers.config.evaluation.knn import KnnConfig
from mimray.trainers.config.evaluation.linear import LinearConfig
from mimray.trainers.data.transforms import center_crop_view, inference_view
from mimray.trainers.evaluation.features.encoders import FeatureEncoder
from mimray.trainers.evaluation.features.pooled import Pooling
from mimray.trainers.evaluation.heads.head_files import WEIGHTS, read_card
from mimray.trainers.evaluation.heads.views import tensor_of
from mimray.trainers.evaluation.probes.knn import vote_shares
from mimray.trainers.models.normalise import normalise
from mimray.trainers.types import Features


@dataclass(frozen=True)
class PooledHead:
    """An encoder with a classifier of its pooled features.

    Attributes:
        encoder: source of the features.
        class_names: names of the classes, by index.
        pooling: way in which tokens become a vector.
        view: part of each picture that is shown.
        scores: from pooled features float [B, D] to scores [B, K]; the largest is the class. They
            are probabilities of logistic regression and LARS, shares of the votes of kNN, and of
            ridge regression values around +1 for the class and -1 for others.
        device: device of the classifier.
    """

    encoder: FeatureEncoder
    class_names: tuple[str, ...]
    pooling: Pooling
    view: View
    scores: Callable[[Tensor], Tensor]
    device: str

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], batch_size: int = 8) -> np.ndarray:
        """Scores of the classes, float64 [N, K].

        Args:
            pictures: upright.
            batch_size: pictures encoded at once.
        """
        card = self.encoder.card
        shown = center_crop_view if self.view == "center_crop" else inference_view
        found = []
        for start in range(0, len(pictures), batch_size):
            views = [
                shown(
                    picture.convert("L") if card.channels == 1 else picture,
                    card.image_size,
                    card.interpolation,
                )
                for picture in pictures[start : start + batch_size]
            ]
            images = normalise(tensor_of(views).to(self.device), card.mean, card.std)
            found.append(self.scores(self.pooled(self.encoder(images))).double().cpu().numpy())
        return np.concatenate(found) if found else np.empty((0, len(self.class_names)))

    def pooled(self, features: Features) -> Tensor:
        """The vectors that the classifier takes, [B, D].

        Args:
            features: the encoder's, with their tokens.
        """
        parts = {"mean": ("mean",), "cls": ("cls",), "both": ("mean", "cls")}[self.pooling]
        vectors = {
            "mean": lambda: features.tokens.mean(dim=1),
            "cls": lambda: features.prefix[:, 0],
        }
        return torch.cat([vectors[part]() for part in parts], dim=1)


def load_head(folder: Path, task: str, encoder: FeatureEncoder, device: str = "cpu") -> PooledHead:
    """Put a trained classifier on the encoder that it was trained on.

    Args:
        folder: folder of `head.safetensors` and `head.json`.
        task: `linear` or `knn`.
        encoder: the same, on the device.
        device: device of the classifier, as torch names it.

    Raises:
        DataError: there is none, or it belongs to another encoder.
    """
    card = read_card(folder, task, encoder)
    names = tuple(card["class_names"])
    tensors = {name: value.to(device) for name, value in load_file(folder / WEIGHTS).items()}
    config: LinearConfig | KnnConfig
    scores: Callable[[Tensor], Tensor]
    if task == "linear":
        config = LinearConfig.model_validate(card["config"])
        scores = _linear(tensors, as_probabilities=config.solver != "ridge")
    else:
        config = KnnConfig.model_validate(card["config"])
        scores = _knn(tensors, len(names), config)
    assert config.pooling is not None
    return PooledHead(encoder, names, config.pooling, config.view, scores, device)


def _linear(tensors: dict[str, Tensor], *, as_probabilities: bool) -> Callable[[Tensor], Tensor]:
    weight, bias = tensors["weight"], tensors["bias"]

    def scores(pooled: Tensor) -> Tensor:
        values = pooled.float() @ weight.T + bias
        return values.softmax(dim=1) if as_probabilities else values

    return scores


def _knn(
    tensors: dict[str, Tensor], num_classes: int, config: KnnConfig
) -> Callable[[Tensor], Tensor]:
    bank, labels = tensors["bank"], tensors["labels"]

    def scores(pooled: Tensor) -> Tensor:
        queries = pooled.float()
        return vote_shares(
            bank, labels, queries, num_classes, k=config.k, temperature=config.temperature
        )

    return scores
