"""Weights for another size of input: positions, relative positions, Swin's windows."""

from __future__ import annotations

from collections.abc import Mapping

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mimray.trainers.config.composition import check_size
from mimray.trainers.config.model import EncoderConfig, SwinConfig, ViTConfig
from mimray.trainers.errors import BundleError
from mimray.trainers.models.rel_pos import resize_table

Size = tuple[int, int]


def for_size(encoder: EncoderConfig, old: Size, new: Size) -> EncoderConfig:
    """The architecture at another size of input.

    A swin keeps its window where that divides the grids of all stages, else the window grows
    with the picture, 6 at 192 to 7 at 224. A fixed sin-cos table that is resampled is one no
    more.

    Args:
        encoder: at the old size.
        old: (height, width) in pixels.
        new: likewise.

    Raises:
        BundleError: it does not fit the new size.
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
    """An encoder's or a decoder's weights at another size of input.

    Absolute positions are resampled bicubically with antialiasing, as timm does; relative ones
    interpolated between offsets, which stay in patches, as the official BEiT code does.

    Args:
        state: at the old size.
        old: architecture and (height, width) it is for.
        new: those wanted.
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
        resampled: Tensor = resample_abs_pos_embed(
            value, new_size=list(grids[1]), old_size=list(grids[0]), num_prefix_tokens=1
        )
        return resampled
    if key.endswith("relative_position_bias_table"):
        if isinstance(old[0], SwinConfig):
            stage = int(key.split(".")[1])
            grids = _window(*old, stage), _window(*new, stage)
        return value if grids[0] == grids[1] else resize_table(value, *grids)
    return value


def _grid(encoder: EncoderConfig, size: Size) -> Size:
    return size[0] // encoder.stride, size[1] // encoder.stride


def _window(encoder: EncoderConfig, size: Size, stage: int) -> Size:
    """The window of a swin's stage: as configured, but not larger than the grid there."""
    assert isinstance(encoder, SwinConfig)
    stride = encoder.patch_size * 2**stage
    return min(encoder.window_size, size[0] // stride), min(encoder.window_size, size[1] // stride)
