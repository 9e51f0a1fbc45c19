"""A bundle as an ONNX graph, in Triton's layout, with a certificate that it computes the same."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import save
from torch import Tensor, nn

from mimray.trainers.bundles import BundleCard, FrozenEncoder, load_bundle
from mimray.trainers.config.model import SwinConfig, ViTConfig
from mimray.trainers.convert.folder import as_json, model_card, whole_folder
from mimray.trainers.data.geometry import Size
from mimray.trainers.data.sample_photos import PHOTOGRAPHS, photograph
from mimray.trainers.data.transforms import inference_view
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.models.normalise import normalise

if TYPE_CHECKING:
    import onnxruntime

GRAPH, CERTIFICATE, CHECK = "1/model.onnx", "certificate.json", "check.safetensors"
TOLERANCE = 1e-3
"""Largest difference of an output from torch's, over the largest value of that output."""

_FORMAT = 1
_NUM_CHECKED = 8
# Of those that the certificate is of, as many are kept to check by at each load.
_NUM_KEPT = 2
_INPUT = "images"
_MISSING = "ONNX needs packages that are not installed"
_HINT = 'pip install "mimray[onnx]"'
_USAGE = """\
from PIL import Image
from mimray.trainers.convert.onnx_encoder import load_onnx

encoder = load_onnx("PATH/TO/THIS/FOLDER")  # checks itself against the numbers of torch
outputs = encoder.embed([Image.open("a.jpg").convert("RGB")])  # {names}"""


@dataclass(frozen=True)
class Exported:
    """Outputs of a graph.

    Attributes:
        outputs: names of the outputs, in their order.
        layers: layers whose maps are outputs, counted from 0, rising.
        any_size: True if height and width of the input are free.
    """

    outputs: tuple[str, ...]
    layers: tuple[int, ...]
    any_size: bool


def export_onnx(
    bundle: Path,
    out: Path,
    *,
    size: Size | None = None,
    layers: Sequence[int] | None = None,
    pictures: Sequence[Image.Image] = (),
) -> str:
    """Write a folder that onnxruntime, Triton and TensorRT read.

    Its input is `images`, float32 [B, C, H, W], normalised; its outputs are `pooled` [B, D],
    `tokens` [B, N, D] and maps `layer_I` [B, D, h, w], after the final norm. A batch may be of any
    number. Pictures are of the size asked for, or, of convolutional encoders, which have no
    positions, of any multiple of the stride.

    Args:
        bundle: folder of a bundle, or of a run that holds one.
        out: folder to write; new or empty.
        size: (height, width) of the input, pixels; the one the encoder was trained at by default.
        layers: layers whose maps are outputs; the card's by default.
        pictures: pictures to hold the graph against torch by; photographs of this installation by
            default.

    Returns:
        A few words on what the folder holds.

    Raises:
        BundleError: no sound bundle, a graph that does not compute the same, or `out` holds files.
        ConfigError: a size or a layer that the encoder does not have, or packages are missing.
    """
    require()
    frozen = load_bundle(bundle)
    card = frozen.card
    size = size or card.image_size
    if any(side % frozen.stride or side < frozen.stride for side in size):
        raise ConfigError(
            f"--image-size {size[0]}x{size[1]} is no multiple of the stride {frozen.stride}"
        )
    chosen = tuple(card.layers if layers is None else layers)
    if any(not -frozen.depth <= layer < frozen.depth for layer in chosen):
        raise ConfigError(f"--layers {list(chosen)}: there are 0 to {frozen.depth - 1}")
    chosen = tuple(sorted({layer % frozen.depth for layer in chosen}))
    found = Exported(
        ("pooled", "tokens", *(f"layer_{layer}" for layer in chosen)),
        chosen,
        any_size=_takes_any_size(card),
    )
    with whole_folder(out) as aside:
        return _write(aside, frozen, found, size, pictures)


def require() -> None:
    """Refuse to go on without the packages of the extra `onnx`.

    Raises:
        ConfigError: one of them is not installed.
    """
    import importlib.util

    missing = [
        name
        for name in ("onnx", "onnxscript", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ConfigError(f"{_MISSING}: {', '.join(missing)}", hint=_HINT)


def session_of(file: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """An inference session of a graph.

    Args:
        file: the graph's file.
        providers: onnxruntime's names of what computes it.
    """
    import onnxruntime

    options: onnxruntime.SessionOptions = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=list(providers))


def differences(expected: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """The largest and mean difference of an output, and the largest value it is held against."""
    gap = np.abs(expected.astype(np.float64) - found.astype(np.float64))
    return {
        "max_difference": float(gap.max()),
        "mean_difference": float(gap.mean()),
        "largest_value": float(np.abs(expected).max()),
    }


class _Graph(nn.Module):
    """The encoder as a function of one tensor that gives tensors."""

    def __init__(self, frozen: FrozenEncoder, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.layers = frozen.encoder, layers
        self.by_class_token = frozen.card.pooling == "cls"

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pooled vectors, tokens and maps of pictures [B, C, H, W]."""
        features, maps = self.encoder.forward_intermediates(images, self.layers, True)
        pooled = features.prefix[:, 0] if self.by_class_token else features.tokens.mean(dim=1)
        return (pooled, features.tokens, *maps)


def _takes_any_size(card: BundleCard) -> bool:
    """True if nothing is made for a grid, which a graph would hold for one size alone."""
    shape = card.encoder
    if isinstance(shape, ViTConfig):
        return shape.positions == "none" and shape.rel_pos_bias == "none" and shape.rope == "none"
    return not isinstance(shape, SwinConfig)


def _write(
    folder: Path,
    frozen: FrozenEncoder,
    found: Exported,
    size: Size,
    pictures: Sequence[Image.Image],
) -> str:
    card = frozen.card
    graph = _Graph(frozen, found.layers)
    (folder / GRAPH).parent.mkdir()
    _export(graph, found, folder / GRAPH, card, size, frozen.stride)
    shown = list(pictures) or [photograph(name) for name in list(PHOTOGRAPHS)[:_NUM_CHECKED]]
    session = session_of(folder / GRAPH)
    sizes = [size]
    if found.any_size:
        step = frozen.stride
        half = max(step, size[0] // 2 // step * step)
        sizes += [(size[0] + step, size[1] + 2 * step), (half, half)]
    rows: list[dict[str, Any]] = []
    kept: dict[str, np.ndarray] = {}
    for one in sizes:
        pixels = np.stack([_view(picture, card, one) for picture in shown])
        images = normalise(torch.from_numpy(pixels), card.mean, card.std)
        # All together and each alone: a graph may have been made for one number of pictures.
        with torch.no_grad():
            expected = [output.numpy() for output in graph(images)]
        got = session.run(None, {_INPUT: images.numpy()})
        alone = session.run(None, {_INPUT: images[:1].numpy()})
        outputs = {}
        for name, mine, theirs, first in zip(found.outputs, expected, got, alone, strict=True):
            told = differences(mine, theirs)
            told["max_difference"] = max(
                told["max_difference"], float(np.abs(mine[:1] - first).max())
            )
            outputs[name] = told
            if told["max_difference"] > TOLERANCE * max(told["largest_value"], 1e-6):
                raise BundleError(
                    f"the graph's {name} at {one[0]}x{one[1]} differs from torch's by "
                    f"{told['max_difference']:.3g} of {told['largest_value']:.3g}",
                    hint="nothing was written; tell us of this encoder",
                )
        rows.append({"image_size": list(one), "dtype": "float32", "outputs": outputs})
        if not kept:
            kept = {"pixels": pixels[:_NUM_KEPT]} | {
                name: mine[:_NUM_KEPT] for name, mine in zip(found.outputs, expected, strict=True)
            }
    certificate = {
        "format": _FORMAT,
        "weights_sha256": card.weights_sha256,
        "outputs": list(found.outputs),
        "image_size": list(size),
        "any_multiple_of": frozen.stride if found.any_size else None,
        "mean": list(card.mean),
        "std": list(card.std),
        "interpolation": card.interpolation,
        "channels": card.channels,
        "pooling": card.pooling,
        "num_pictures": len(shown),
        "tolerance": TOLERANCE,
        "parity": rows,
        "made_with": _versions(session),
    }
    (folder / CHECK).write_bytes(save({k: np.ascontiguousarray(v) for k, v in kept.items()}))
    (folder / CERTIFICATE).write_text(as_json(certificate), encoding="utf-8")
    (folder / "config.pbtxt").write_text(_triton(card, frozen, found, size), encoding="utf-8")
    usage = _USAGE.replace("{names}", ", ".join(found.outputs))
    text = model_card(card, "onnx", "the encoder with its final norm, in float32", usage)
    (folder / "README.md").write_text(text, encoding="utf-8")
    worst = max(o["max_difference"] for row in rows for o in row["outputs"].values())
    where = "any size" if found.any_size else f"{size[0]}x{size[1]} pixels"
    return (
        f"{', '.join(found.outputs)} of {where}; within {worst:.2g} of torch on {len(shown)} "
        "pictures (certificate.json)"
    )


def _view(picture: Image.Image, card: BundleCard, size: Size) -> np.ndarray:
    picture = picture.convert("L" if card.channels == 1 else "RGB")
    return inference_view(picture, size, card.interpolation)


def _export(
    graph: nn.Module, found: Exported, file: Path, card: BundleCard, size: Size, stride: int
) -> None:
    from torch.export import Dim

    free: dict[int, Any] = {0: Dim("batch", min=1, max=65536)}
    if found.any_size:
        rows, columns = (Dim(name, min=1, max=1024) for name in ("rows", "columns"))
        free |= {2: stride * rows, 3: stride * columns}
    example = torch.zeros(2, card.channels, *size)
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes=(free,),
                input_names=[_INPUT],
                output_names=list(found.outputs),
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    preprocessing = {
        "mean": card.mean,
        "std": card.std,
        "interpolation": card.interpolation,
        "color": "RGB" if card.channels == 3 else "gray",
        "image_size": size,
        "weights_sha256": card.weights_sha256,
    }
    for name, value in preprocessing.items():
        program.model.metadata_props[f"mimray.{name}"] = json.dumps(value)
    program.save(str(file))


def _versions(session: Any) -> dict[str, str]:
    import onnx
    import onnxruntime

    return {
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "provider": session.get_providers()[0],
    }


def _triton(card: BundleCard, frozen: FrozenEncoder, found: Exported, size: Size) -> str:
    """Triton's `config.pbtxt`; sizes that vary are -1."""
    height, width = (-1, -1) if found.any_size else size

    def grid(stride: int) -> list[int]:
        return [-1, -1] if found.any_size else [size[0] // stride, size[1] // stride]

    tokens = -1 if found.any_size else math.prod(grid(frozen.stride))
    outputs = {"pooled": [frozen.encoder.width], "tokens": [tokens, frozen.encoder.width]}
    for layer in found.layers:
        outputs[f"layer_{layer}"] = [frozen.widths[layer], *grid(frozen.strides[layer])]
    tensors = [f"input [{_tensor(_INPUT, [card.channels, height, width])}]"]
    tensors += [f"output [{_tensor(name, dims)}]" for name, dims in outputs.items()]
    return "\n".join(
        ['platform: "onnxruntime_onnx"', "max_batch_size: 64", *tensors, "dynamic_batching {}", ""]
    )


def _tensor(name: str, dims: Sequence[int]) -> str:
    return f' {{ name: "{name}", data_type: TYPE_FP32, dims: {list(dims)} }} '
