"""`/v1/reconstruct`: hide a part of a picture and show what the method predicts there."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.serving.inference.predictor import Predictor
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply
from mimray.serving.operations.request_images import Fetch, read_pictures
from mimray.serving.operations.response_formats import dumps
from mimray.serving.wire.errors import ConflictError, InvalidRequestError
from mimray.trainers.errors import ConfigError

if TYPE_CHECKING:
    from mimray.trainers.methods.base import Method

_QUERY = ("model", "version", "mask_ratio", "seed")
# Under which member of the answer a panel goes.
_MEMBERS = {
    "masked": "masked",
    "reconstruction": "reconstruction",
    "prediction alone": "raw",
}


class Reconstructor:
    """A bundle's method, loaded when it is first asked for.

    Args:
        bundle: directory of a bundle.
        max_pixels: most pixels of one picture.
    """

    def __init__(self, bundle: Path, *, max_pixels: int) -> None:
        from mimray.trainers.bundles import METHOD

        self.available = (bundle / METHOD).is_file()
        self._bundle = bundle
        self._max_pixels = max_pixels
        self._method: Method | None = None
        self._loading = threading.Lock()

    def draw(self, data: bytes, mask_ratio: float | None, seed: int) -> dict[str, Any]:
        """The answer for one picture.

        Raises:
            ImageError: the picture cannot be used.
            InvalidRequestError: the method does not take the ratio.
        """
        from PIL import Image

        from mimray.trainers.data.decode import decode_rgb
        from mimray.trainers.methods.reconstruction import reconstruct

        image = decode_rgb(data, max_pixels=self._max_pixels)
        method = self._loaded()
        try:
            drawn = reconstruct(method, [image], mask_ratio=mask_ratio, seed=seed)
        except ConfigError as error:
            raise InvalidRequestError(str(error.args[0]), hint=error.hint) from error
        shown = [
            {"title": panel.title, "image": _data_uri(Image.fromarray(_rgb(panel.pixels[0])))}
            for panel in drawn.panels
        ]
        height, width = method.recipe.data.image_size
        stride = method.encoder.stride
        hidden = None if drawn.mask is None else drawn.mask[0]
        answer: dict[str, Any] = {
            "mask_ratio": None if hidden is None else float(hidden.mean()),
            "grid": [height // stride, width // stride],
            "mask": None if hidden is None else hidden.astype(int).tolist(),
            "panels": shown,
            **dict.fromkeys(_MEMBERS.values()),
        }
        for panel in shown:
            if panel["title"] in _MEMBERS:
                answer[_MEMBERS[panel["title"]]] = panel["image"]
        return answer

    def _loaded(self) -> Method:
        from mimray.trainers.methods.load import load_method

        with self._loading:
            if self._method is None:
                self._method = load_method(self._bundle)
            return self._method


async def reconstruction(
    call: Call,
    reconstructor: Reconstructor,
    predictor: Predictor,
    timeline: Timeline,
    fetch: Fetch,
) -> tuple[Reply, int]:
    """Answer one request; gives the number of pictures, too."""
    if not reconstructor.available:
        raise ConflictError(
            "this bundle was exported without its decoder", hint="serve the run's own bundle"
        )
    unknown = call.query.keys() - set(_QUERY)
    if unknown:
        raise InvalidRequestError(
            f"there is no parameter {sorted(unknown)[0][:40]!r}", hint=f"there are {list(_QUERY)}"
        )
    ratio, seed = _ratio(call.query.get("mask_ratio")), _seed(call.query.get("seed"))
    (picture,) = await read_pictures(call, fetch, max_pictures=1)
    tree = await predictor.alone(lambda: reconstructor.draw(picture, ratio, seed), timeline)
    return Reply(200, {"Content-Type": "application/json"}, dumps(tree).encode()), 1


def _ratio(text: str | None) -> float | None:
    if not text:
        return None
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 < ratio < 1:
        raise InvalidRequestError(
            f"parameter `mask_ratio` is {text[:40]!r}", hint="use a number between 0 and 1"
        )
    return ratio


def _seed(text: str | None) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise InvalidRequestError(
            f"parameter `seed` is {text[:40]!r}", hint="use a whole number of at most 9 digits"
        )
    return int(text)


def _rgb(pixels: Any) -> Any:
    """What Pillow takes: three channels or none."""
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]


def _data_uri(image: Any) -> str:
    from mimray.trainers.pictures import png

    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
