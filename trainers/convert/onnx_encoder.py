"""An encoder that was exported to ONNX, by onnxruntime; checked against torch's numbers at load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from mimray.trainers.data.geometry import Size
from mimray.trainers.data.transforms import inference_view
from mimray.trainers.errors import BundleError

_PROVIDERS = ("CPUExecutionProvider",)


class OnnxEncoder:
    """A graph with its preprocessing; `load_onnx` makes one.

    Attributes:
        outputs: names of the outputs, in their order.
        image_size: (height, width) of the input, pixels.
        any_multiple_of: stride of the sizes that work too, pixels; None where none does.
        certificate: content of certificate.json.
    """

    def __init__(self, session: Any, certificate: Mapping[str, Any]) -> None:
        self._session = session
        self.certificate = certificate
        self.outputs: tuple[str, ...] = tuple(certificate["outputs"])
        height, width = certificate["image_size"]
        self.image_size: Size = (height, width)
        self.any_multiple_of: int | None = certificate["any_multiple_of"]

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name of normalised pictures, float32 [B, C, H, W]."""
        found = self._session.run(None, {"images": np.ascontiguousarray(images, np.float32)})
        return dict(zip(self.outputs, found, strict=True))

    def embed(self, pictures: Sequence[Image.Image]) -> dict[str, np.ndarray]:
        """Outputs by name of pictures, which are resized whole.

        Args:
            pictures: upright.
        """
        mode = "L" if self.certificate["channels"] == 1 else "RGB"
        views = [
            inference_view(
                picture.convert(mode), self.image_size, self.certificate["interpolation"]
            )
            for picture in pictures
        ]
        return self(self.normalised(np.stack(views)))

    def normalised(self, pixels: np.ndarray) -> np.ndarray:
        """Pictures as the graph takes them, float32 [B, C, H, W], of uint8 pixels [B, C, H, W]."""
        mean, std = (
            np.asarray(self.certificate[name], np.float32).reshape(1, -1, 1, 1)
            for name in ("mean", "std")
        )
        values: np.ndarray = (pixels.astype(np.float32) / 255 - mean) / std
        return values


def load_onnx(folder: str | Path, providers: Sequence[str] = _PROVIDERS) -> OnnxEncoder:
    """Load what `mimray export --format onnx` wrote, and check that it computes what torch did.

    Args:
        folder: the folder.
        providers: onnxruntime's names of what computes the graph, such as `CUDAExecutionProvider`.

    Raises:
        BundleError: no such folder, or numbers beyond the certificate's tolerance.
        ConfigError: onnxruntime is not installed.
    """
    from mimray.trainers.convert.to_onnx import CERTIFICATE, CHECK, GRAPH, differences, require
    from mimray.trainers.convert.to_onnx import session_of as session

    require()
    folder = Path(folder)
    try:
        certificate = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        kept = load_file(folder / CHECK)
        encoder = OnnxEncoder(session(folder / GRAPH, providers), certificate)
    except (OSError, ValueError, KeyError) as error:
        raise BundleError(
            f"{folder} holds no exported ONNX: {error}", hint="mimray export RUN OUT --format onnx"
        ) from None
    except Exception as error:  # onnxruntime's own, which have no common base
        raise BundleError(f"{folder}/{GRAPH} cannot be read: {error}") from error
    found = encoder(encoder.normalised(kept.pop("pixels")))
    for name, expected in kept.items():
        told = differences(expected, found[name])
        if told["max_difference"] > certificate["tolerance"] * max(told["largest_value"], 1e-6):
            raise BundleError(
                f"{folder}: {name} differs from the certificate's by {told['max_difference']:.3g} "
                f"of {told['largest_value']:.3g}",
                hint=f"made with {certificate['made_with']}; export it again here",
            )
    return encoder
