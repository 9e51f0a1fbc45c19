"""Claim: views of a JPEG decoded at a lower scale keep their detail with a margin of 2.

    python benchmarks/jpeg_draft.py PICTURES [--size 96] [--rounds 3]

Cuts one random crop of every JPEG (MAE's recipe) out of the picture decoded whole, and out of the
picture decoded at the lowest scale that has 1, 2 and 4 times the view's pixels along each side.
Prints, by margin and for the pictures that are decoded at a lower scale at all, the gradient energy
of the view over the whole picture's (median and tenths), the root mean square difference of pixels
in levels of 255, and the decoding speed over that of whole pictures (CPU time of all JPEGs).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from mimray.trainers.data.decode import DRAFT_MARGIN, decode_rgb, draft_scale, read_size
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.transforms import Box, random_crop_box, to_array, view_of

MARGINS = (1, 2, 4)


def gradient_energy(view: np.ndarray) -> float:
    """Sum of squared differences of neighbouring pixels, over both axes."""
    return float(sum((np.diff(view.astype(np.float64), axis=axis) ** 2).sum() for axis in (1, 2)))


def enough_for(margin: int, size: tuple[int, int], box: Box, side: int) -> tuple[int, int]:
    """The `draft_size` with which `decode` keeps `margin` times the view's pixels."""
    times = margin / DRAFT_MARGIN
    wanted = (side * size[0] / (box[2] - box[0]), side * size[1] / (box[3] - box[1]))
    return max(1, round(wanted[0] * times)), max(1, round(wanted[1] * times))


def view_at(data: bytes, enough: tuple[int, int] | None, box: Box, side: int) -> np.ndarray:
    """The view of a crop, uint8 [C, H, W], of a picture decoded at a draft's scale."""
    width, height = read_size(data)
    image = decode_rgb(data, draft_size=enough)
    x, y = image.width / width, image.height / height
    scaled = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return to_array(view_of(image, (side, side), "bicubic", scaled))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    files = sorted(f for f in asked.pictures.rglob("*") if f.suffix.lower() in (".jpg", ".jpeg"))
    jpegs = [file.read_bytes() for file in files]
    sizes = [read_size(data) for data in jpegs]
    boxes = [
        random_crop_box(generator(0, Stream.VIEW, 0, index), size, (0.2, 1.0), (3 / 4, 4 / 3))
        for index, size in enumerate(sizes)
    ]
    whole = [view_at(d, None, box, asked.size) for d, box in zip(jpegs, boxes, strict=True)]
    print(f"{len(jpegs)} JPEGs, views of {asked.size}x{asked.size}")

    def seconds(drafts: list[tuple[int, int] | None]) -> float:
        began = time.process_time()
        for data, enough in zip(jpegs, drafts, strict=True):
            decode_rgb(data, draft_size=enough)
        return time.process_time() - began

    for margin in MARGINS:
        pairs = zip(sizes, boxes, strict=True)
        drafts = [enough_for(margin, size, box, asked.size) for size, box in pairs]
        lower = [i for i, s in enumerate(sizes) if draft_scale(s, drafts[i]) > 1]
        views = {i: view_at(jpegs[i], drafts[i], boxes[i], asked.size) for i in lower}
        ratios = [gradient_energy(views[i]) / gradient_energy(whole[i]) for i in lower]
        errors = [np.sqrt(np.mean((views[i].astype(float) - whole[i]) ** 2)) for i in lower]
        faster = [seconds([None] * len(jpegs)) / seconds([*drafts]) for _ in range(asked.rounds)]
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9)) if ratios else (1.0,) * 3
        print(
            f"margin {margin}: {len(lower)} at a lower scale, gradient energy {middle:.4f} "
            f"({low:.4f} to {high:.4f}), difference {np.mean(errors) if errors else 0:.2f} levels, "
            f"decoding {np.median(faster):.2f} times as fast as whole",
            flush=True,
        )


if __name__ == "__main__":
    main()
