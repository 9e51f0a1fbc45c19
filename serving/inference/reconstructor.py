"""Hidden patches of a picture, predicted by the method that trained the encoder."""

from __future__ import annotations

import base64
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.serving.wire.errors import InvalidRequestError
from mimray.trainers.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

    from mimray.trainers.methods.base import Method

# The panels that have a member of their own in the answer, and its name.
_MEMBERS = {
    "masked": "masked",
    "reconstruction": "reconstruction",
    "prediction alone": "raw",
}


class Reconstructor:
    """A bundle's method, loaded at its first use.

    Args:
        bundle: the bundle's directory.

    Attributes:
        available: True if the bundle holds its decoder.
    """

    def __init__(self, bundle: Path) -> None:
        from mimray.trainers.bundles import METHOD

        self.available = (bundle / METHOD).is_file()
        self._bundle = bundle
        self._method: Method | None = None
        self._loading = threading.Lock()

    def draw(self, image: Image.Image, mask_ratio: float | None, seed: int) -> dict[str, Any]:
        """Reconstruct one picture.

        Args:
            image: the upright picture.
            mask_ratio: share of patches to hide; None for the method's own.
            seed: seed of the mask.

        Returns:
            The members of the answer: the mask, and pictures as data URIs.

        Raises:
            InvalidRequestError: the method does not take the ratio.
        """
        from PIL import Image

        from mimray.trainers.methods.reconstruction import reconstruct

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


def _rgb(pixels: Any) -> Any:
    """Pixels as Pillow takes them: three channels, or no dimension of channels."""
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]


def _data_uri(image: Any) -> str:
    from mimray.trainers.pictures import png

    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")
