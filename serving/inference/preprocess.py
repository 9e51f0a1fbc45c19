"""Preprocessing: a picture from bytes or pixels to the model's input, in threads of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mimray.serving.config import Limits
from mimray.serving.inference.decode_process import DecodeProcess, is_quick
from mimray.serving.inference.placement import Sizing, place
from mimray.serving.wire.errors import (
    InvalidRequestError,
    TooLargeError,
    UnusablePictureError,
)
from mimray.trainers.data.geometry import Placement, Size
from mimray.trainers.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

    from mimray.trainers.bundles import BundleCard

Array = np.ndarray[Any, Any]
Picture = bytes | Array
"""An encoded picture; pixels uint8 [H, W, C]; or a normalised input float32 [C, H, W]."""


class Prepared(NamedTuple):
    """A picture in the model's input.

    Attributes:
        pixels: the input, uint8 [C, H, W], or float32 and normalised.
        placement: the picture's place in the input.
    """

    pixels: Array
    placement: Placement


class Preparer:
    """Prepares pictures for one encoder.

    Args:
        card: the bundle's description, bundle.json.
        stride: pixels between neighbouring tokens of the encoder.
        limits: the bounds of pictures and of the model's input.
        draft: decode a JPEG at 1/2, 1/4 or 1/8 where that is still larger than the input, which is
            faster and changes pixels a little.

    Attributes:
        process: decodes what is not `is_quick`; one thread at a time prepares such pictures.
    """

    def __init__(
        self, card: BundleCard, stride: int, limits: Limits, *, draft: bool = False
    ) -> None:
        self._card = card
        self._stride = stride
        self._limits = limits
        self._draft = draft
        self.process = DecodeProcess(
            timeout_s=limits.decode_timeout_s,
            max_pixels=limits.picture_pixels,
            max_frames=limits.picture_frames,
        )

    def prepare(self, picture: Picture, sizing: Sizing) -> Prepared:
        """Decode, resize and pad one picture.

        Args:
            picture: the picture, in one of the forms of `Picture`.
            sizing: the way that it is brought to the model's input.

        Raises:
            ImageError: the picture cannot be used.
            TooLargeError: its input would be too large.
        """
        if isinstance(picture, bytes):
            return self._fit(*self.decoded(picture, sizing), sizing)
        if picture.dtype == np.float32:
            return self._as_it_is(picture)
        _check_pixels(picture, self._card.channels, self._limits.picture_pixels)
        source = picture.shape[0], picture.shape[1]
        placement = self._placed(source, sizing)
        if placement.input_size == source:
            return Prepared(picture.transpose(2, 0, 1), placement)
        return self._fit(_image_from_pixels(picture, placement.input_size), source, sizing)

    def prepare_views(
        self, picture: Picture, views_of: Callable[[Size], Sequence[Placement]]
    ) -> tuple[Size, list[Prepared]]:
        """Decode one picture, and make any views of it.

        Args:
            picture: the picture, encoded or as uint8 pixels.
            views_of: gives the views of a picture of (height, width).

        Returns:
            (height, width) of the picture, and its views in order.

        Raises:
            ImageError: the picture cannot be used.
            InvalidRequestError: it came normalised.
            TooLargeError: its views would be too large together.
        """
        if isinstance(picture, bytes):
            image, source = self.decoded(picture)
        elif picture.dtype == np.float32:
            raise InvalidRequestError(
                "heads take pictures, and these came normalised",
                hint="send BYTES (encoded pictures) or UINT8 pixels",
            )
        else:
            _check_pixels(picture, self._card.channels, self._limits.picture_pixels)
            source = picture.shape[0], picture.shape[1]
            image = _image_from_pixels(picture, source)
        placements = views_of(source)
        pixels = sum(rows * columns for rows, columns in (v.input_size for v in placements))
        most = self._limits.picture_pixels
        if len(placements) > 1 and pixels > most:
            raise TooLargeError(
                f"{source[1]} x {source[0]} pixels make {len(placements)} windows, {pixels} pixels "
                f"together; at most {most} are taken",
                hint="send a smaller picture, or a part of it",
            )
        card = self._card
        return source, [
            Prepared(view.image(image, card.interpolation, card.mean), view) for view in placements
        ]

    def decoded(self, data: bytes, sizing: Sizing | None = None) -> tuple[Image.Image, Size]:
        """Decode a picture of as many channels as the model takes.

        Args:
            data: the encoded picture.
            sizing: says what is enough, where drafts are taken; None decodes the whole.

        Returns:
            The upright picture, and the (height, width) that it has without a draft.

        Raises:
            ImageError: the picture cannot be used.
        """
        from mimray.trainers.data.decode import decode, read_size

        card, limits = self._card, self._limits
        if card.channels not in (1, 3):
            raise ImageError(
                "wrong_channels",
                f"encoded pictures give 3 channels, the model takes {card.channels}",
                hint="send UINT8 pixels",
            )
        if not is_quick(data):
            image, size = self.process.decode(data)
            return (image.convert("L") if card.channels == 1 else image), size
        enough = None
        if self._draft and sizing is not None:
            width, height = read_size(data)
            rows, columns = self._placed((height, width), sizing).shown_size
            enough = columns, rows
        image, header = decode(
            data,
            max_pixels=limits.picture_pixels,
            max_frames=limits.picture_frames,
            draft_size=enough,
        )
        if card.channels == 1:
            image = image.convert("L")
        return image, (header.height, header.width)

    def _placed(self, source: Size, sizing: Sizing) -> Placement:
        return place(
            source,
            sizing,
            trained=self._card.image_size,
            stride=self._stride,
            max_pixels=self._limits.input_pixels,
        )

    def _fit(self, image: Image.Image, source: Size, sizing: Sizing) -> Prepared:
        placement = self._placed(source, sizing)
        pixels = placement.image(image, self._card.interpolation, self._card.mean)
        return Prepared(pixels, placement)

    def _as_it_is(self, values: Array) -> Prepared:
        channels, height, width = values.shape
        if channels != self._card.channels:
            raise ImageError(
                "wrong_channels", f"{channels} channels, the model takes {self._card.channels}"
            )
        size = height, width
        placement = self._placed(size, Sizing("stretch", size))
        if not np.isfinite(values).all():
            raise ImageError("not_finite", "the values hold NaN or infinity")
        return Prepared(values, placement)


def token_validity(placement: Placement, stride: int) -> Array:
    """Validity of tokens, bool [N]: False for those that show padding alone."""
    rows, columns = (side // stride for side in placement.input_size)
    down = np.arange(rows) * stride < placement.shown_size[0]
    across = np.arange(columns) * stride < placement.shown_size[1]
    return (down[:, None] & across[None]).reshape(-1)


def _check_pixels(pixels: Array, channels: int, max_pixels: int) -> None:
    height, width, found = pixels.shape
    if found != channels:
        raise ImageError("wrong_channels", f"{found} channels, the model takes {channels}")
    if min(height, width) < 2:
        raise ImageError("too_small", f"{width} x {height} pixels; each side needs at least 2")
    if height * width > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels are more than the allowed {max_pixels}"
        )


def _image_from_pixels(pixels: Array, input_size: Size) -> Image.Image:
    from PIL import Image

    channels = pixels.shape[2]
    if channels not in (1, 3):
        raise InvalidRequestError(
            f"pictures of {channels} channels are not resized here",
            hint=f"send them at {input_size[0]} x {input_size[1]} (height x width)",
        )
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def refuse_unusable(outcomes: Sequence[object]) -> None:
    """Raise if some pictures could not be prepared.

    Args:
        outcomes: the outcome of every picture, in order.

    Raises:
        UnusablePictureError: some cannot be used; it lists all of them.
    """
    unusable = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, ImageError):
            unusable.append({"index": index, "reason": outcome.reason, "message": str(outcome)})
        elif isinstance(outcome, BaseException):
            raise outcome
    if unusable:
        first = unusable[0]
        more = f" (and {len(unusable) - 1} more)" if len(unusable) > 1 else ""
        raise UnusablePictureError(
            f"picture {first['index']} cannot be used: {first['message']}{more}",
            details={"pictures": unusable},
        )
