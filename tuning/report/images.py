"""Reconstructions of the best trials and the worst, as data URIs in the page."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

from PIL import Image

from mimray.trainers.errors import StorageError
from mimray.trainers.recorder import RECONSTRUCTION
from mimray.trainers.storage import RunDir
from mimray.tuning.record import TrialRecord, trial_dir
from mimray.tuning.report.summary import SweepSummary

MAX_WIDTH_PX = 900
_NUM_BEST = 3


class Reconstruction(NamedTuple):
    """A reconstruction in the page.

    Attributes:
        rank: the trial's rank, from 1.
        trial: the trial that drew it.
        uri: the picture as a data URI.
        size: (width, height), pixels.
    """

    rank: int
    trial: TrialRecord
    uri: str
    size: tuple[int, int]


def reconstructions(summary: SweepSummary, sweep: RunDir) -> list[Reconstruction]:
    """The reconstructions of the best three trials and the worst, where they have drawn any.

    Args:
        summary: the sweep's summary.
        sweep: the sweep's directory.
    """
    chosen = list(enumerate(summary.ranked, start=1))
    if len(chosen) > _NUM_BEST:
        chosen = [*chosen[:_NUM_BEST], chosen[-1]]
    found = []
    for rank, trial in chosen:
        image = _read(trial_dir(sweep, trial.number))
        if image is not None:
            found.append(Reconstruction(rank, trial, _data_uri(image), image.size))
    return found


def _read(place: RunDir) -> Image.Image | None:
    """A trial's picture, at most `MAX_WIDTH_PX` wide; None where none can be read."""
    try:
        if not place.exists(RECONSTRUCTION):
            return None
        image: Image.Image = Image.open(io.BytesIO(place.read(RECONSTRUCTION)))
        image = image.convert("RGB")
    # Pillow raises one of several classes for a damaged file; the report leaves it out.
    except (StorageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if image.width <= MAX_WIDTH_PX:
        return image
    height = max(1, round(image.height * MAX_WIDTH_PX / image.width))
    return image.resize((MAX_WIDTH_PX, height), Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    # No chroma subsampling: the sheets have small coloured patches and text.
    image.save(file, format="JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
