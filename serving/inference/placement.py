"""How a picture lies in the model's input: its size there, the padding, and the way back.

Coordinates are continuous pixels: the left edge of the first column is x = 0, the right edge of
the last is x = width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from mimray.serving.wire.errors import InvalidRequestError, TooLargeError

Size = tuple[int, int]
"""(height, width) in pixels."""

_SIDE = r"([1-9][0-9]{0,4})"
_SQUARE = re.compile(_SIDE)
_SIDES = re.compile(rf"{_SIDE}\s*,\s*{_SIDE}")


@dataclass(frozen=True)
class Sizing:
    """How pictures are brought to the model's input.

    Attributes:
        mode: `stretch` to `size` whatever the aspect, `keep` the aspect within `size` and pad right
            and below, `native` for the picture's own size rounded to the model's stride.
        size: (height, width) of the input; None for the one the model was trained at.
    """

    mode: Literal["stretch", "keep", "native"] = "stretch"
    size: Size | None = None


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in the model's input.

    Attributes:
        source_size: of the upright picture.
        input_size: of the model's input, multiples of its stride.
        shown_size: of the part of the input, from its top left corner, that shows the picture.
    """

    source_size: Size
    input_size: Size
    shown_size: Size

    @property
    def is_whole(self) -> bool:
        """Whether the picture fills the input."""
        return self.shown_size == self.input_size

    @property
    def valid_region(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the input, pixels, that shows the picture."""
        return 0.0, 0.0, float(self.shown_size[1]), float(self.shown_size[0])

    @property
    def transform(self) -> list[list[float]]:
        """3 x 3, from (x, y, 1) in the picture to the input."""
        (height, width), (rows, columns) = self.source_size, self.shown_size
        return _scaling(columns / width, rows / height)

    @property
    def inverse(self) -> list[list[float]]:
        """3 x 3, from (x, y, 1) in the input back to the picture."""
        (height, width), (rows, columns) = self.source_size, self.shown_size
        return _scaling(width / columns, height / rows)

    def described(self, stride: int) -> dict[str, Any]:
        """The placement as every answer carries it; `stride` is the model's, pixels."""
        rows, columns = self.input_size
        return {
            "source_size": list(self.source_size),
            "input_size": list(self.input_size),
            "grid": [rows // stride, columns // stride],
            "stride": [stride, stride],
            "transform": self.transform,
            "inverse": self.inverse,
            "valid_region": list(self.valid_region),
        }


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
    """Decide how a picture lies in the model's input.

    Args:
        source: of the upright picture.
        sizing: what was asked for.
        trained: the model's own input size.
        stride: the model's, pixels.
        max_pixels: most pixels of an input.

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
    if sizing.mode != "keep":
        return Placement(source, size, size)
    scale = min(size[0] / source[0], size[1] / source[1])
    shown = tuple(
        min(most, max(1, round(side * scale))) for side, most in zip(source, size, strict=True)
    )
    return Placement(source, size, (shown[0], shown[1]))


def check_input(size: Size, *, stride: int, max_pixels: int) -> None:
    """Refuse an input size the model cannot take.

    Raises:
        InvalidRequestError: no multiple of the stride.
        TooLargeError: more than `max_pixels`.
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


def _scaling(x: float, y: float) -> list[list[float]]:
    return [[x, 0.0, 0.0], [0.0, y, 0.0], [0.0, 0.0, 1.0]]
