"""Resizing of weights to another size of input: positions, relative positions, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from mimray.trainers.config.composition import check_size
from mimray.trainers.config.model import EncoderConfig, SwinConfig, ViTConfig
from mimray.trainers.data.geometry import Size
from mimray.trainers.errors import BundleError


def for_size(encoder: EncoderConfig, old: Size, new: Size) -> EncoderConfig:
    """Adapt an architecture to another size of input.

    A swin keeps its window if that divides the grids of all stages, else the window grows with the
    picture, from 6 at 192 to 7 at 224. Fixed sin-cos positions become learned ones, since a
    resampled table is no sin-cos table.

    Args:
        encoder: the architecture at the old size.
        old: the old (height, width), pixels.
        new: the new (height, width), pixels.

    Raises:
        BundleError: the architecture does not fit the new size.
    """
    if old == new:
        return encoder
    candidates: list[EncoderConfig] = [encoder]
    if isinstance(encoder, SwinConfig):
        window = round(encoder.window_size * new[0] / old[0])
        candidates.append(encoder.model_copy(update={"window_size": max(1, window)}))
    elif isinstance(encoder, ViTConfig) and encoder.positions == "sincos":
        candidates = [encoder.model_copy(update={"positions": "learned"})]
    refusals = []
    for candidate in candidates:
        try:
            check_size(candidate, new)
        except ValueError as error:
            refusals.append(str(error))
        else:
            return candidate
    raise BundleError(refusals[0], hint="another --image-size")


def resized(
    state: Mapping[str, Tensor], old: tuple[EncoderConfig, Size], new: tuple[EncoderConfig, Size]
) -> dict[str, Tensor]:
    """Resize an encoder's or a decoder's weights to another size of input.

    Absolute positions are resampled bicubically with antialiasing, as in timm; relative ones are
    interpolated between offsets, which stay in patches, as in the official BEiT code.

    Args:
        state: weights at the old size.
        old: the old architecture and (height, width), pixels.
        new: the new architecture and (height, width), pixels.
    """
    return {key: _resized(key, value, old, new) for key, value in state.items()}


def _resized(
    key: str,
    value: Tensor,
    old: tuple[EncoderConfig, Size],
    new: tuple[EncoderConfig, Size],
) -> Tensor:
    grids = _grid(*old), _grid(*new)
    if key.endswith("pos_embed"):
        if grids[0] == grids[1]:
            return value
        from timm.layers import resample_abs_pos_embed

        resampled: Tensor = resample_abs_pos_embed(
            value,
            new_size=list(grids[1]),
            old_size=list(grids[0]),
            num_prefix_tokens=value.shape[1] - math.prod(grids[0]),
        )
        return resampled
    if key.endswith("relative_position_bias_table"):
        if isinstance(old[0], SwinConfig):
            stage = int(key.split(".")[1])
            grids = _window(*old, stage), _window(*new, stage)
        if grids[0] == grids[1]:
            return value
        from mimray.trainers.models.rel_pos import resize_table

        return resize_table(value, *grids)
    return value


def _grid(encoder: EncoderConfig, size: Size) -> Size:
    return size[0] // encoder.stride, size[1] // encoder.stride


def _window(encoder: EncoderConfig, size: Size, stage: int) -> Size:
    """The window of a swin's stage: the configured one, but no larger than the stage's grid."""
    assert isinstance(encoder, SwinConfig)
    stride = encoder.patch_size * 2**stage
    return min(encoder.window_size, size[0] // stride), min(encoder.window_size, size[1] // stride)
