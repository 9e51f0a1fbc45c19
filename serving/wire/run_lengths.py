"""Masks in COCO's compressed run lengths, read without its library."""

from __future__ import annotations

from typing import Any

import numpy as np

from mimray.serving.wire.errors import InvalidRequestError

# Each character holds five bits of a number and a flag for more, from "0" on.
_FIRST, _BITS, _MORE, _SIGN = 48, 0x1F, 0x20, 0x10


def decode_mask(counts: str, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """The mask, bool [h, w].

    Runs alternate between outside and inside, down the columns. A run with more than two before it
    is stored as its difference from the one two before.

    Args:
        counts: the run lengths as text.
        size: (h, w) of the mask.

    Raises:
        InvalidRequestError: they do not fill the mask.

    Source: pycocotools' `rleFrString` and `rleDecode`, by their format.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode("ascii", "replace"):
        digit = character - _FIRST
        value |= (digit & _BITS) << shift
        shift += 5
        if digit & _MORE:
            continue
        if digit & _SIGN:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    height, width = size
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise InvalidRequestError(f"run lengths do not fill a mask of {width} x {height} pixels")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T
