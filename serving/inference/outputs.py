"""From an encoder's tokens and maps to the outputs people ask for; torch, one batch at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from mimray.serving.inference.options import PYRAMID_STRIDES, Dtype, Options, pyramid_source

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
    """Everything that is asked for, in one pass through the encoder.

    Args:
        encoder: frozen.
        images: normalised pictures, float [B, C, H, W].
        valid: bool [B, N], True where a token stands for some of the picture; None where all do.
        options: what is asked for.

    Returns:
        By name; of `int8` outputs the scale follows each as `<name>_scale`.
    """
    strides, base = encoder.strides, options.pyramid
    sources = {} if base is None else {s: pyramid_source(s, base, strides) for s in PYRAMID_STRIDES}
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
    """One vector a picture, [B, D].

    Args:
        features: of the encoder.
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
    """Maps [B, D, h, w] at another stride, by what has no parameters.

    Bilinear where they grow, the maximum where they shrink; a last row or column that does not
    fill a window is kept.
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
    """What `resample` does, in words."""
    if wanted < stride:
        return "bilinear"
    return "max-pooled" if wanted > stride else "as it is"


def narrowed(name: str, values: Tensor, dtype: Dtype) -> dict[str, Tensor]:
    """An output in the type asked for.

    `int8` is symmetric: a scale for every channel of every picture (of `pooled`, one for every
    picture), shaped to broadcast, so that `int8 * scale` is the value to within half a scale.

    Args:
        name: of the output.
        values: [B, D], [B, N, D] or [B, D, h, w].
        dtype: the type.
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
