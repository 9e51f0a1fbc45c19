"""Where a picture lies in a network's input, and the way back.

One `View` moves the picture, its masks and its boxes alike, so that they cannot part. Coordinates
are continuous, in pixels, with (0, 0) at the outer corner of the first pixel: a resize is a plain
multiplication, and the centre of pixel i lies at i + 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.transforms import Box, to_array, view_of

Size = tuple[int, int]
"""(height, width), pixels."""


@dataclass(frozen=True)
class View:
    """A part of a picture, resized, perhaps mirrored, at the top left of a padded input.

    Attributes:
        source_size: of the picture.
        crop: (left, top, right, bottom) of the part that is shown, pixels of the picture.
        size: what that part is resized to.
        input_size: of the network's input; beyond `size`, to the right and below, is padding.
        flip: whether the part is mirrored from left to right.
    """

    source_size: Size
    crop: Box
    size: Size
    input_size: Size
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the input to one of the picture, (vertical, horizontal)."""
        left, top, right, bottom = self.crop
        return self.size[0] / (bottom - top), self.size[1] / (right - left)

    @property
    def valid_region(self) -> Box:
        """(left, top, right, bottom) of the input that shows the picture."""
        return 0.0, 0.0, float(self.size[1]), float(self.size[0])

    @property
    def matrix(self) -> np.ndarray:
        """float64 [3, 3], from (x, y, 1) in the picture to the input."""
        vertical, horizontal = self.scale
        left, top, _, _ = self.crop
        matrix = np.array(
            [[horizontal, 0, -left * horizontal], [0, vertical, -top * vertical], [0, 0, 1]]
        )
        if self.flip:
            matrix[0] = [-matrix[0, 0], 0, self.size[1] - matrix[0, 2]]
        return matrix

    def mirrored(self) -> View:
        """The same view from left to right."""
        return replace(self, flip=not self.flip)

    def image(self, picture: Image.Image, interpolation: str, fill: Sequence[float]) -> np.ndarray:
        """The input, uint8 [C, H, W].

        Args:
            picture: upright, of `source_size`.
            interpolation: `bicubic` or `bilinear`.
            fill: of the padding, a value a channel of pixels in [0, 1]; a bundle's mean, so that
                padding is zero after normalisation but for rounding.
        """
        assert (picture.height, picture.width) == self.source_size
        pixels = to_array(view_of(picture, self.size, interpolation, self.crop, self.flip))
        if self.size == self.input_size:
            return pixels
        colour = np.array([round(255 * value) for value in fill], np.uint8)
        padded = np.broadcast_to(colour[:, None, None], (len(colour), *self.input_size)).copy()
        padded[:, : self.size[0], : self.size[1]] = pixels  # C H W
        return padded

    def mask(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """Masks [..., h, w] of the picture in the input [..., H, W], by nearest neighbour.

        Args:
            mask: of any dtype.
            fill: of the padding; void for classes, False for instances.
        """
        rows, columns = self._nearest_in_picture()
        moved = np.full((*mask.shape[:-2], *self.input_size), fill, mask.dtype)
        moved[..., : self.size[0], : self.size[1]] = mask[..., rows[:, None], columns]
        return moved

    def mask_back(self, mask: np.ndarray, fill: int) -> np.ndarray:
        """Masks [..., H, W] of the input in the picture [..., h, w], by nearest neighbour.

        Where the view enlarges, this undoes `mask` exactly.

        Args:
            mask: of any dtype.
            fill: of what lies outside the crop.
        """
        vertical, horizontal = self.scale
        left, top, _, _ = self.crop
        rows = np.floor((np.arange(self.source_size[0]) + 0.5 - top) * vertical).astype(int)
        columns = np.floor((np.arange(self.source_size[1]) + 0.5 - left) * horizontal).astype(int)
        if self.flip:
            columns = self.size[1] - 1 - columns
        seen = ((rows >= 0) & (rows < self.size[0]))[:, None] & (
            (columns >= 0) & (columns < self.size[1])
        )
        rows, columns = rows.clip(0, self.size[0] - 1), columns.clip(0, self.size[1] - 1)
        return np.where(seen, mask[..., rows[:, None], columns], np.array(fill, mask.dtype))

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

    def maps_back(self, maps: Tensor) -> Tensor:
        """Maps over the input, such as logits, over the cropped part at the picture's resolution.

        Args:
            maps: [..., K, H, W] at any resolution that divides the input's.

        Returns:
            [..., K, crop height, crop width], interpolated bilinearly.
        """
        left, top, right, bottom = self.crop
        # Cells that lie wholly or partly in the padding are cut off after interpolating to the
        # input's own resolution, so that their centres stay where they are.
        shape = maps.shape[:-3]
        maps = maps.flatten(0, -4) if shape else maps[None]
        maps = F.interpolate(maps.float(), self.input_size, mode="bilinear", align_corners=False)
        maps = maps[..., : self.size[0], : self.size[1]]
        maps = maps.flip(-1) if self.flip else maps
        whole = round(bottom - top), round(right - left)
        maps = F.interpolate(maps, whole, mode="bilinear", align_corners=False)
        return maps.reshape(*shape, *maps.shape[1:])

    def _mirror(self, boxes: np.ndarray) -> np.ndarray:
        left, top, right, bottom = boxes.T
        return np.stack([self.size[1] - right, top, self.size[1] - left, bottom], axis=1)

    def _nearest_in_picture(self) -> tuple[np.ndarray, np.ndarray]:
        """The picture's row and column that each row and column of the resized part shows."""
        vertical, horizontal = self.scale
        left, top, _, _ = self.crop
        rows = np.floor((np.arange(self.size[0]) + 0.5) / vertical + top).astype(int)
        columns = np.floor((np.arange(self.size[1]) + 0.5) / horizontal + left).astype(int)
        if self.flip:
            columns = columns[::-1]
        height, width = self.source_size
        return rows.clip(0, height - 1), columns.clip(0, width - 1)


def whole_view(source_size: Size, input_size: Size, *, keep_aspect: bool = True) -> View:
    """The whole picture in the input: as large as fits with padding, or stretched to fill it.

    Args:
        source_size: of the picture.
        input_size: of the network's input.
        keep_aspect: pad instead of stretching.
    """
    height, width = source_size
    size = input_size
    if keep_aspect:
        scale = min(input_size[0] / height, input_size[1] / width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
    return View(source_size, (0.0, 0.0, float(width), float(height)), size, input_size)


def training_view(
    source_size: Size, input_size: Size, *, seed: int, index: int, number: int
) -> View:
    """One of a picture's numbered versions: 0 whole, 1 its mirror image, then crops in pairs.

    A crop has the shape of the input and between a quarter and all of the largest such area.

    Args:
        source_size: of the picture.
        input_size: of the network's input.
        seed: of the crops.
        index: of the picture in its dataset.
        number: of the version.
    """
    view = whole_view(source_size, input_size)
    if number > 1:
        rng = generator(seed, Stream.HEAD_VIEW, index, number // 2)
        height, width = source_size
        share = float(np.sqrt(rng.uniform(0.25, 1.0)))
        scale = share * min(height / input_size[0], width / input_size[1])
        rows, columns = input_size[0] * scale, input_size[1] * scale
        top, left = rng.uniform(0, height - rows), rng.uniform(0, width - columns)
        view = View(source_size, (left, top, left + columns, top + rows), input_size, input_size)
    return view.mirrored() if number % 2 else view


def fitting_size(
    source_sizes: Sequence[Size], stride: int, *, max_tokens: int, max_side_px: int
) -> Size:
    """An input near the pictures' own median size, rounded to the stride, within bounds.

    Args:
        source_sizes: of pictures.
        stride: of the encoder, pixels.
        max_tokens: about so many of them, since attention is quadratic.
        max_side_px: no longer side.
    """
    height, width = np.median(source_sizes, axis=0)
    shrink = min(
        1.0,
        max_side_px / max(height, width),
        float(np.sqrt(max_tokens * stride**2 / (height * width))),
    )
    rows, columns = (max(1, round(side * shrink / stride)) for side in (height, width))
    return rows * stride, columns * stride


def clip_boxes(boxes: np.ndarray, region: Box) -> np.ndarray:
    """Boxes [N, 4] cut to (left, top, right, bottom); those outside get no area."""
    left, top, right, bottom = region
    return boxes.clip((left, top, left, top), (right, bottom, right, bottom))


def tensor_of(views: Sequence[np.ndarray]) -> Tensor:
    """Inputs of equal size as one batch, uint8 [B, C, H, W]."""
    return torch.from_numpy(np.stack(views))
