"""Geometry of a picture in a network's input: its place there, and the way back.

One `Placement` moves a picture, its masks and its boxes alike, so that they stay together.
Coordinates are continuous pixels (x, y) with (0, 0) at the outer corner of the first pixel: a
resize is a multiplication, and the centre of pixel i lies at i + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mimray.trainers.data.transforms import Box, to_array, view_of

Size = tuple[int, int]
"""(height, width), pixels."""


@dataclass(frozen=True)
class Placement:
    """A part of a picture, resized, perhaps mirrored, at the top left of a padded input.

    Attributes:
        source_size: (height, width) of the upright picture.
        crop: (left, top, right, bottom) of the part that is shown, pixels of the picture.
        shown_size: (height, width) that the part is resized to.
        input_size: (height, width) of the network's input; what `shown_size` leaves of it, to the
            right and below, is padding.
        flip: True if the part is mirrored from left to right.
    """

    source_size: Size
    crop: Box
    shown_size: Size
    input_size: Size
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the input to one of the picture, (vertical, horizontal)."""
        left, top, right, bottom = self.crop
        return self.shown_size[0] / (bottom - top), self.shown_size[1] / (right - left)

    @property
    def is_padded(self) -> bool:
        """True if a part of the input shows nothing of the picture."""
        return self.shown_size != self.input_size

    @property
    def valid_region(self) -> Box:
        """(left, top, right, bottom) of the input that shows the picture, pixels."""
        return 0.0, 0.0, float(self.shown_size[1]), float(self.shown_size[0])

    @property
    def transform(self) -> list[list[float]]:
        """Affine map from (x, y, 1) in the picture to the input, 3 x 3."""
        vertical, horizontal = self.scale
        left, top, _, _ = self.crop
        across = [horizontal, 0.0, horizontal * (0.0 - left)]  # 0.0, never -0.0, without a crop
        if self.flip:
            across = [-horizontal, 0.0, self.shown_size[1] - across[2]]
        return [across, [0.0, vertical, vertical * (0.0 - top)], [0.0, 0.0, 1.0]]

    @property
    def inverse(self) -> list[list[float]]:
        """Affine map from (x, y, 1) in the input back to the picture, 3 x 3."""
        left, top, right, bottom = self.crop
        vertical = (bottom - top) / self.shown_size[0]
        horizontal = (right - left) / self.shown_size[1]
        across = [-horizontal, 0.0, right] if self.flip else [horizontal, 0.0, left]
        return [across, [0.0, vertical, top], [0.0, 0.0, 1.0]]

    def mirrored(self) -> Placement:
        """The same view from left to right."""
        return replace(self, flip=not self.flip)

    def image(self, picture: Image.Image, interpolation: str, fill: Sequence[float]) -> np.ndarray:
        """The input, uint8 [C, H, W].

        Args:
            picture: the upright picture. Where the view shows all of it, one that was decoded at a
                lower scale than `source_size` does.
            interpolation: filter of the resize, `bicubic` or `bilinear`.
            fill: colour of the padding, a value a channel of pixels in [0, 1]; a bundle's mean, so
                that padding is zero after normalisation but for rounding.
        """
        height, width = self.source_size
        box = None if self.crop == (0, 0, width, height) else self.crop
        assert box is None or picture.size == (width, height)
        pixels = to_array(view_of(picture, self.shown_size, interpolation, box, self.flip))
        if not self.is_padded:
            return pixels
        colour = np.array([round(255 * value) for value in fill], np.uint8)
        padded = np.broadcast_to(colour[:, None, None], (len(colour), *self.input_size)).copy()
        padded[:, : self.shown_size[0], : self.shown_size[1]] = pixels  # C H W
        return padded

    def mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """Masks of the picture in the input [..., H, W], by nearest neighbour.

        Args:
            mask: masks [..., h, w] of any dtype.
            fill: value of the padding; void for classes, False for instances.
        """
        rows, columns = self._nearest_in_picture()
        moved = np.full((*mask.shape[:-2], *self.input_size), fill, mask.dtype)
        shown = mask[..., rows[:, None], columns]
        moved[..., : self.shown_size[0], : self.shown_size[1]] = shown
        return moved

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [N, 4] (left, top, right, bottom) of the picture in the input; not clipped."""
        vertical, horizontal = self.scale
        moved: np.ndarray = (boxes - np.array(self.crop[:2] * 2)) * np.array(
            [horizontal, vertical] * 2
        )
        return self._mirror(moved) if self.flip else moved

    def boxes_back(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes [N, 4] of the input in the picture; the inverse of `boxes`."""
        vertical, horizontal = self.scale
        boxes = self._mirror(boxes) if self.flip else boxes
        back: np.ndarray = boxes / np.array([horizontal, vertical] * 2) + np.array(
            self.crop[:2] * 2
        )
        return back

    def _mirror(self, boxes: np.ndarray) -> np.ndarray:
        left, top, right, bottom = boxes.T
        width = self.shown_size[1]
        return np.stack([width - right, top, width - left, bottom], axis=1)

    def _nearest_in_picture(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture's row and column that each row and column of the resized part shows."""
        vertical, horizontal = self.scale
        left, top, _, _ = self.crop
        rows = np.floor((np.arange(self.shown_size[0]) + 0.5) / vertical + top).astype(int)
        columns = np.floor((np.arange(self.shown_size[1]) + 0.5) / horizontal + left).astype(int)
        if self.flip:
            columns = columns[::-1]
        height, width = self.source_size
        return rows.clip(0, height - 1), columns.clip(0, width - 1)


def whole_view(source_size: Size, input_size: Size, *, keep_aspect: bool = True) -> Placement:
    """The whole picture in the input.

    Args:
        source_size: (height, width) of the upright picture.
        input_size: (height, width) of the network's input.
        keep_aspect: True makes the picture as large as fits and pads; False stretches it.
    """
    height, width = source_size
    shown_size = input_size
    if keep_aspect:
        scale = min(input_size[0] / height, input_size[1] / width)
        shown_size = max(1, round(height * scale)), max(1, round(width * scale))
    return Placement(source_size, (0.0, 0.0, float(width), float(height)), shown_size, input_size)


def clip_boxes(boxes: np.ndarray, region: Box) -> np.ndarray:
    """Boxes [N, 4] cut to (left, top, right, bottom); those outside get no area."""
    left, top, right, bottom = region
    return boxes.clip((left, top, left, top), (right, bottom, right, bottom))
