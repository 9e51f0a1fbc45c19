"""Outputs of an encoder's tokens and maps: pooling, the pyramid, narrow types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.serving.inference.options import Options, pyramid_source
from mimray.serving.wire.bodies import Dtype

if TYPE_CHECKING:
    from mimray.trainers.bundles import FrozenEncoder
    from mimray.trainers.types import Features

GEM_POWER = 3.0
GEM_FLOOR = 1e-6
_TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def compute_outputs(
    encoder: FrozenEncoder, images: Tensor, valid: Tensor | None, options: Options
) -> dict[str, Tensor]:
    """Compute all outputs in one pass through the encoder.

    Args:
        encoder: the frozen encoder.
        images: normalised pictures, float [B, C, H, W].
        valid: bool [B, N], True where a token stands for some of the picture; None where all do.
        options: the outputs to compute.

    Returns:
        The outputs by name; each `int8` output is followed by its scale, `<name>_scale`.
    """
    strides, base = encoder.strides, options.pyramid
    sources = {} if base is None else {s: pyramid_source(s, base, strides) for s in options.levels}
    layers = tuple(sorted({*options.layers, *sources.values()}))
    outputs: dict[str, Tensor] = {}
    if options.pooled or options.tokens:
        features, found = encoder.encoder.forward_intermediates(images, layers, options.norm)
        if options.pooled:
            outputs["pooled"] = pool(features, options.pooling, valid)
        if options.tokens:
            outputs["tokens"] = features.tokens
    else:
        found = encoder.features(images, layers, options.norm)
    maps = dict(zip(layers, found, strict=True))
    for layer in options.layers:
        outputs[f"layer_{layer}"] = maps[layer]
    for stride, layer in sources.items():
        outputs[f"pyramid_{stride}"] = resample(maps[layer], strides[layer], stride)
    return {
        name: tensor
        for output, value in outputs.items()
        for name, tensor in narrowed(output, value, options.dtype).items()
    }


def pool(features: Features, pooling: str, valid: Tensor | None) -> Tensor:
    """Pool tokens to one vector a picture, [B, D].

    Args:
        features: the encoder's tokens.
        pooling: `cls` for the class token, `mean`, or `gem`, the generalised mean of power 3.
        valid: bool [B, N], tokens that count; None for all.

    Source: generalised mean: Radenovic et al. 2018, eq. 3.
    """
    if pooling == "cls":
        return features.prefix[:, 0]
    tokens = features.tokens
    if pooling == "gem":
        tokens = tokens.clamp(min=GEM_FLOOR) ** GEM_POWER
    if valid is None:
        mean = tokens.mean(dim=1)
    else:
        weights = valid.unsqueeze(-1).to(tokens.dtype)  # B N 1
        mean = (tokens * weights).sum(dim=1) / weights.sum(dim=1)
    return mean ** (1 / GEM_POWER) if pooling == "gem" else mean


def resample(maps: Tensor, stride: int, wanted: int) -> Tensor:
    """Resample maps [B, D, h, w] to another stride, without parameters.

    Bilinear if they grow, the maximum if they shrink; a last row or column that does not fill a
    window is kept.

    Args:
        maps: the maps, [B, D, h, w].
        stride: the maps' stride, pixels.
        wanted: the stride of the result, pixels.
    """
    if wanted < stride:
        return F.interpolate(
            maps, scale_factor=stride // wanted, mode="bilinear", align_corners=False
        )
    if wanted > stride:
        window = wanted // stride
        return F.max_pool2d(maps, window, window, ceil_mode=True)
    return maps


def resampling(stride: int, wanted: int) -> str:
    """The name of the way in which `resample` goes from one stride to another."""
    if wanted < stride:
        return "bilinear"
    return "max-pooled" if wanted > stride else "as it is"


def narrowed(name: str, values: Tensor, dtype: Dtype) -> dict[str, Tensor]:
    """Convert an output to the type asked for.

    `int8` is symmetric: a scale for every channel of every picture (of `pooled`, one for every
    picture), shaped to broadcast, so that `int8 * scale` is the value to within half a scale.

    Args:
        name: the output's name.
        values: the output, [B, D], [B, N, D] or [B, D, h, w].
        dtype: the type asked for.
    """
    if dtype != "int8":
        return {name: values.to(_TORCH_DTYPES[dtype])}
    over = {2: (1,), 3: (1,), 4: (2, 3)}[values.dim()]
    largest = values.float().abs().amax(dim=over, keepdim=True)
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return {
        name: (values / scale).round().clamp(-127, 127).to(torch.int8),
        f"{name}_scale": scale,
    }
