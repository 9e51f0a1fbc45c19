"""The `size` of a request: the size of the model's input, and how a picture is fitted to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from mimray.serving.wire.errors import InvalidRequestError, TooLargeError
from mimray.trainers.data.geometry import Placement, Size, whole_view

_SIDE = r"([1-9][0-9]{0,4})"
_SQUARE = re.compile(_SIDE)
_SIDES = re.compile(rf"{_SIDE}\s*,\s*{_SIDE}")


@dataclass(frozen=True)
class Sizing:
    """Resizing of pictures to the model's input.

    Attributes:
        mode: `stretch` to `size` whatever the aspect, `keep` the aspect within `size` and pad right
            and below, `native` for the picture's own size rounded to the model's stride.
        size: (height, width) of the input; None for the one the model was trained at.
    """

    mode: Literal["stretch", "keep", "native"] = "stretch"
    size: Size | None = None


def parse_size(text: str) -> Sizing:
    """Read a `size`: `224`, `448,640` (rows, columns), `keep`, `keep:1024`, `native`.

    Raises:
        InvalidRequestError: it is none of these.
    """
    word, colon, sides = text.strip().partition(":")
    if word == "native" and not colon:
        return Sizing("native")
    if word == "keep":
        return Sizing("keep", _sides(sides, text) if colon else None)
    return Sizing("stretch", _sides(text.strip(), text))


def place(
    source: Size, sizing: Sizing, *, trained: Size, stride: int, max_pixels: int
) -> Placement:
    """Place a picture in the model's input.

    Args:
        source: (height, width) of the upright picture.
        sizing: the resizing that was asked for.
        trained: (height, width) that the model was trained at.
        stride: stride of the model, pixels.
        max_pixels: bound of the pixels of an input.

    Raises:
        InvalidRequestError: the size asked for is no multiple of the stride.
        TooLargeError: the input would have more than `max_pixels`.
    """
    if sizing.mode == "native":
        rows, columns = (max(1, round(side / stride)) * stride for side in source)
        size = (rows, columns)
    else:
        size = sizing.size or trained
    check_input(size, stride=stride, max_pixels=max_pixels)
    return whole_view(source, size, keep_aspect=sizing.mode == "keep")


def described(view: Placement, stride: int) -> dict[str, Any]:
    """The geometry of a picture as every answer carries it.

    Args:
        view: the place of the picture in the model's input.
        stride: stride of the model, pixels.
    """
    rows, columns = view.input_size
    return {
        "source_size": list(view.source_size),
        "input_size": list(view.input_size),
        "grid": [rows // stride, columns // stride],
        "stride": [stride, stride],
        "transform": view.transform,
        "inverse": view.inverse,
        "valid_region": list(view.valid_region),
    }


def check_input(size: Size, *, stride: int, max_pixels: int) -> None:
    """Refuse an input size the model cannot take.

    Args:
        size: (height, width) of the input, pixels.
        stride: stride of the model, pixels.
        max_pixels: bound of the pixels of an input.

    Raises:
        InvalidRequestError: the size is no multiple of the stride.
        TooLargeError: it has more than `max_pixels`.
    """
    height, width = size
    if height % stride or width % stride:
        nearest = ",".join(str(max(1, round(side / stride)) * stride) for side in size)
        raise InvalidRequestError(
            f"an input of {height} x {width} pixels (height x width) is not a multiple of "
            f"the model's stride {stride}",
            hint=f"the nearest that is: {nearest}",
        )
    if height * width > max_pixels:
        raise TooLargeError(
            f"an input of {height} x {width} pixels is more than the allowed {max_pixels}",
            hint="ask for a smaller `size`",
        )


def _sides(text: str, whole: str) -> Size:
    if square := _SQUARE.fullmatch(text):
        return int(square[1]), int(square[1])
    if sides := _SIDES.fullmatch(text):
        return int(sides[1]), int(sides[2])
    raise InvalidRequestError(
        f"parameter `size` is {whole[:40]!r}",
        hint="use 224, 448,640 (rows,columns), keep, keep:1024 or native",
    )
