"""Score of a fine-tuned classifier on pictures that it has not seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mimray.trainers.config.run import Recipe
from mimray.trainers.data.decode import decode
from mimray.trainers.data.selection import evenly_spread, labelled
from mimray.trainers.data.sources import Source
from mimray.trainers.data.transforms import inference_view
from mimray.trainers.data.workers import decode_workers
from mimray.trainers.errors import DataError, EmptyDatasetError, ImageError
from mimray.trainers.evaluation.confusion import confusion_record
from mimray.trainers.evaluation.probes.classification import (
    missing_classes,
    per_class_accuracy,
    top_k_accuracy,
)
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.evaluation.splits import Splits
from mimray.trainers.evaluation.uncertainty import Evidence, of_accuracy
from mimray.trainers.methods.finetune import Finetune
from mimray.trainers.models.normalise import normalise
from mimray.trainers.pictures import panel_sheet, png
from mimray.trainers.types import Panel

# Starting a decode process takes as long as decoding some thousands of small pictures.
WORTH_WORKERS = 5_000
SHOWN_PICTURES = 8


@dataclass(frozen=True)
class Classified:
    """Outcome of a classification.

    Attributes:
        accuracy: share of the pictures whose likeliest class is theirs.
        metrics: every figure, ready for JSON.
        num_pictures: number of pictures classified.
        evidence: right or wrong by picture.
        notes: pictures left out, for people.
        sheet: a PNG of some pictures, with their class and the likeliest one.
    """

    accuracy: float
    metrics: dict[str, Any]
    num_pictures: int
    evidence: Evidence
    notes: tuple[str, ...]
    sheet: bytes


@torch.no_grad()
def classify(method: Finetune, splits: Splits, setting: Setting, *, batch_size: int) -> Classified:
    """Score a classifier on the validation pictures, whole and resized as they are served.

    Args:
        method: classifier trained on `splits.train`; moved to the setting's device.
        splits: the pictures.
        setting: limit, device, progress, whether bad pictures are left out.
        batch_size: pictures at once.

    Raises:
        DataError: a picture has no class or cannot be decoded.
        EmptyDatasetError: none is left.
    """
    source, names = splits.val, splits.class_names
    indices = labelled(
        source,
        evenly_spread(len(source), setting.limit),
        len(splits.val_numbers),
        skip=setting.skip_invalid,
    )
    views = _ValidationPictures(source, indices, method.recipe, skip=setting.skip_invalid)
    num_workers = 2 if len(indices) >= WORTH_WORKERS else 0
    loader = DataLoader(
        views, batch_size=batch_size, collate_fn=list, **decode_workers(num_workers)
    )
    method.eval().to(setting.device)
    data = method.recipe.data
    scores, seen, notes = [], [], list[str]()
    for done, views_read in enumerate(loader, start=1):
        good = [view for view in views_read if isinstance(view, _PreparedPicture)]
        notes += [f"left out {problem}" for problem in views_read if isinstance(problem, str)]
        if good:
            pixels = torch.from_numpy(np.stack([view.pixels for view in good]))
            logits = method.logits(normalise(pixels.to(setting.device), data.mean, data.std))
            scores.append(logits.float().cpu())
            seen += [view.index for view in good]
        setting.progress("scoring", min(done * batch_size, len(indices)), len(indices))
    if not seen:
        raise EmptyDatasetError(f"no picture of {source.facts.uri} can be decoded")
    stored = source.labels()
    assert stored is not None
    labels = splits.val_numbers[stored[seen]]  # N
    logits = torch.cat(scores)  # N K
    predicted = logits.argmax(dim=1).numpy()
    per_class = per_class_accuracy(predicted, labels, names)
    # Of a class that there was nothing to learn from there is no logit, and so no loss.
    learnt = torch.from_numpy(labels) < logits.shape[1]
    accuracy = float((predicted == labels).mean())
    metrics = {
        "accuracy": accuracy,
        "top5_accuracy": top_k_accuracy(logits.numpy(), labels, 5) if logits.shape[1] > 5 else None,
        "loss": float(F.cross_entropy(logits[learnt], torch.from_numpy(labels)[learnt])),
        "per_class_accuracy": per_class,
        "confusion": confusion_record(labels, predicted, names),
    }
    return Classified(
        accuracy,
        metrics,
        len(labels),
        of_accuracy(predicted == labels, source.facts.fingerprint, np.array(seen)),
        (*notes, *missing_classes(per_class)),
        _sheet(views, np.array(seen), names, labels, predicted),
    )


@dataclass(frozen=True)
class _PreparedPicture:
    index: int
    pixels: np.ndarray  # uint8 C H W


class _ValidationPictures(Dataset["_PreparedPicture | str"]):
    """Pictures as a classifier sees them, or what is wrong with one."""

    def __init__(self, source: Source, indices: np.ndarray, recipe: Recipe, *, skip: bool) -> None:
        self.source = source
        self.indices = indices
        self.data = recipe.data
        self.skip = skip

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> _PreparedPicture | str:
        index = int(self.indices[number])
        try:
            # Decoded in full, without a draft, as pictures are served.
            picture = decode(self.source[index].image).image
        except ImageError as error:
            problem = f"{self.source.name(index)}: {error}"
            if self.skip:
                return problem
            raise DataError(
                problem,
                hint="--skip-invalid leaves such pictures out, `mimray data ingest` sorts them out",
            ) from error
        if self.data.channels == 1:
            picture = picture.convert("L")
        pixels = inference_view(picture, self.data.image_size, self.data.interpolation)
        return _PreparedPicture(index, pixels)


def _sheet(
    views: _ValidationPictures,
    seen: np.ndarray,
    names: tuple[str, ...],
    labels: np.ndarray,
    predicted: np.ndarray,
) -> bytes:
    shown = evenly_spread(len(seen), SHOWN_PICTURES)
    places = np.searchsorted(views.indices, seen[shown])
    found = [views[int(place)] for place in places]
    pixels = [
        view.pixels.transpose(1, 2, 0) for view in found if isinstance(view, _PreparedPicture)
    ]
    captions = [
        names[labels[i]]
        + ("" if labels[i] == predicted[i] else f", taken for {names[predicted[i]]}")
        for i in shown
    ]
    return png(panel_sheet([Panel("validation pictures", np.stack(pixels))], captions=captions))
