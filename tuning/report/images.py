"""The reconstructions of the best trials and the worst, small enough to live in the page."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

from PIL import Image

from mimray.trainers.errors import StorageError
from mimray.trainers.storage import RunDir
from mimray.tuning.record import TrialRecord, trial_dir
from mimray.tuning.report.summary import SweepSummary

RECONSTRUCTION = "reconstruction.png"
MAX_WIDTH_PX = 900
_NUM_BEST = 3


class Picture(NamedTuple):
    """A reconstruction in the page.

    Attributes:
        rank: of its trial, from 1.
        trial: that made it.
        uri: `data:`, with all of it.
        size: width and height in pixels.
    """

    rank: int
    trial: TrialRecord
    uri: str
    size: tuple[int, int]


def reconstructions(summary: SweepSummary, sweep: RunDir) -> list[Picture]:
    """What the best trials and the worst make of hidden patches, where they have drawn it yet.

    Args:
        summary: of the sweep.
        sweep: its directory.
    """
    chosen = list(enumerate(summary.ranked, start=1))
    if len(chosen) > _NUM_BEST:
        chosen = [*chosen[:_NUM_BEST], chosen[-1]]
    found = []
    for rank, trial in chosen:
        image = _read(trial_dir(sweep, trial.number))
        if image is not None:
            found.append(Picture(rank, trial, _data_uri(image), image.size))
    return found


def _read(place: RunDir) -> Image.Image | None:
    """The picture, narrow enough; None where there is none that can be read."""
    try:
        if not place.exists(RECONSTRUCTION):
            return None
        image: Image.Image = Image.open(io.BytesIO(place.read(RECONSTRUCTION)))
        image = image.convert("RGB")
    # What Pillow raises for a damaged file is no one class, and a report can do without it.
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
