"""Features of a whole dataset by a frozen encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trainers.bundles import BundleCard, FrozenEncoder
from trainers.data.decode import decode
from trainers.data.sources import Source
from trainers.data.transforms import inference_view
from trainers.data.workers import decode_workers
from trainers.errors import DataError, ImageError
from trainers.models import build_encoder
from trainers.models.normalise import normalise

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]

# Starting a decode process takes as long as decoding some thousands of small pictures.
WORTH_WORKERS = 5_000


def extract(
    encoder: FrozenEncoder,
    source: Source,
    *,
    limit: int | None = None,
    batch_size: int = 128,
    num_workers: int | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode labelled pictures as they are served: whole, resized, never cropped or mirrored.

    Args:
        encoder: moved to the device, where it stays.
        source: labelled pictures.
        limit: take this many, evenly spread over the dataset, so that a dataset sorted by
            class keeps all its classes; None for all.
        batch_size: pictures encoded at once.
        num_workers: decode processes; 0 decodes here; by default 2 where the dataset is large
            enough to be worth starting them.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        progress: called with (pictures done, pictures in all).

    Returns:
        The card's pooled features, float32 [N, D], and labels, int64 [N].

    Raises:
        DataError: the dataset has no labels, or a picture of it cannot be decoded.
    """
    labels = source.labels()
    if labels is None:
        raise DataError(
            f"{source.facts.uri} has no labels", hint="an evaluation needs a class for each picture"
        )
    indices = chosen(len(source), limit)
    if (labels[indices] < 0).any():
        first = int(indices[np.flatnonzero(labels[indices] < 0)[0]])
        raise DataError(
            f"{source.name(first)} has no label",
            hint="an evaluation needs a class for each picture",
        )
    if num_workers is None:
        num_workers = 2 if len(indices) >= WORTH_WORKERS else 0
    card = encoder.card
    loader = DataLoader(
        _Views(source, card, indices),
        batch_size=batch_size,
        **decode_workers(num_workers),
    )
    where = torch.device(_available() if device == "auto" else device)
    encoder = encoder.to(where)
    parts: list[np.ndarray] = []
    done = 0
    for pixels in loader:
        found = encoder(normalise(pixels.to(where, non_blocking=True), card.mean, card.std))
        parts.append(found.pooled.float().cpu().numpy())
        done += len(pixels)
        if progress is not None:
            progress(done, len(indices))
    return np.concatenate(parts), labels[indices]


def untrained(card: BundleCard, seed: int = 0) -> FrozenEncoder:
    """A fresh encoder of the same shape: what a score must beat to mean anything.

    Args:
        card: of the trained encoder.
        seed: of its initialisation; torch's own generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(card.encoder, card.image_size, card.channels)
    return FrozenEncoder(encoder, card)


def chosen(num_samples: int, limit: int | None) -> np.ndarray:
    """Indices of all samples, or of `limit` of them evenly spread; int64, ascending."""
    if limit is None or limit >= num_samples:
        return np.arange(num_samples)
    return np.arange(limit) * num_samples // limit


class _Views(Dataset["Tensor"]):
    """Pictures of a source as the encoder sees them, uint8 [C, H, W]."""

    def __init__(self, source: Source, card: BundleCard, indices: np.ndarray) -> None:
        self.source = source
        self.card = card
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> Tensor:
        index, card = int(self.indices[number]), self.card
        try:
            # Decoded in full, without a draft: a score is of the features that are served.
            picture = decode(self.source[index].image).image
        except ImageError as error:
            raise DataError(
                f"{self.source.name(index)}: {error}",
                hint="`mimray data ingest` sorts such pictures out",
            ) from error
        if card.channels == 1:
            picture = picture.convert("L")
        return torch.from_numpy(inference_view(picture, card.image_size, card.interpolation))


def _available() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
