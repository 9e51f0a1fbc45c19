"""Checks that encoder, method and picture size go together."""

from __future__ import annotations

import math

from mimray.trainers.config.model import (
    ConvConfig,
    DalleConfig,
    EncoderConfig,
    SwinConfig,
    ViTConfig,
)


def check_masking(method: str, encoder: EncoderConfig) -> None:
    """Refuse an encoder that has no tokens to hide."""
    if isinstance(encoder, ConvConfig | DalleConfig):
        raise ValueError(
            f"method {method} hides tokens, which encoder {encoder.name} does not have; "
            "take a vit or swin, or methods ae, vae and dvae"
        )


def check_drops_hidden(method: str, encoder: EncoderConfig) -> None:
    """Refuse an encoder that cannot leave patches out, or whose positions are not absolute."""
    if not isinstance(encoder, ViTConfig):
        raise ValueError(
            f"method {method} with a decoder leaves hidden patches out of the encoder, "
            f"which the windows of {encoder.name} cannot do without; take a vit, or method "
            "simmim, or maskfeat with decoder_depth 0"
        )
    placeless = encoder.positions == "none" and encoder.rope == "none"
    if encoder.rel_pos_bias != "none" or placeless:
        raise ValueError(
            f"method {method} with a decoder leaves hidden patches out of the encoder, "
            "which then needs positions of its own: encoder.positions sincos or learned, or "
            "encoder.rope, and encoder.rel_pos_bias none"
        )


def check_size(encoder: EncoderConfig, image_size: tuple[int, int]) -> None:
    """Refuse a picture size that an encoder cannot divide into tokens and windows.

    Args:
        encoder: the encoder's architecture.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: the encoder's stride or its windows do not divide the size.
    """
    stride = encoder.stride
    named = (
        f"encoder.patch_size {stride}"
        if isinstance(encoder, ViTConfig)
        else f"the stride {stride} of encoder {encoder.name}"
    )
    for side, size in zip(("height", "width"), image_size, strict=True):
        if size % stride:
            below, above = size // stride * stride, (size // stride + 1) * stride
            raise ValueError(
                f"{named} does not divide data.image_size {side} {size}; "
                f"nearest sizes are {below or above} and {above}"
            )
    if isinstance(encoder, SwinConfig):
        for side, size in zip(("height", "width"), image_size, strict=True):
            tokens = size // encoder.patch_size
            for stage in range(len(encoder.depths)):
                here = tokens // 2**stage
                if here > encoder.window_size and here % encoder.window_size:
                    raise ValueError(
                        f"encoder.window_size {encoder.window_size} does not divide the {here} "
                        f"tokens along the {side} at stage {stage} (data.image_size {size}); "
                        "192 goes with windows of 6, 224 with 7"
                    )


def check_ratio(mask_ratio: float, num_patches: int) -> None:
    """Refuse a mask ratio that hides no patch, or every patch."""
    num_visible = int(num_patches * (1 - mask_ratio))
    if num_visible < 1:
        raise ValueError(
            f"method.mask_ratio {mask_ratio} leaves no visible patch of "
            f"{num_patches} at this image and patch size"
        )
    if num_visible == num_patches:
        raise ValueError(
            f"method.mask_ratio {mask_ratio} hides no patch of "
            f"{num_patches} at this image and patch size"
        )


def check_block(mask_ratio: float, min_block_patches: int, num_patches: int) -> None:
    """Refuse a least block that has more patches than the ratio hides."""
    most = int(num_patches * mask_ratio)
    if most < min_block_patches:
        raise ValueError(
            f"method.min_block_patches {min_block_patches} is more than the {most} "
            f"patches of {num_patches} that method.mask_ratio {mask_ratio} may hide"
        )


def check_units(
    mask_ratio: float, mask_unit_px: int | None, encoder: EncoderConfig, image_size: tuple[int, int]
) -> None:
    """Refuse mask units that are not whole tokens, do not divide the picture, or hide it all."""
    unit = mask_unit_px or encoder.stride
    if unit % encoder.stride:
        raise ValueError(
            f"method.mask_unit_px {unit} is not a multiple of the encoder's stride "
            f"{encoder.stride}; null hides single tokens"
        )
    for side, size in zip(("height", "width"), image_size, strict=True):
        if size % unit:
            raise ValueError(
                f"method.mask_unit_px {unit} does not divide data.image_size {side} {size}"
            )
    num_units = (image_size[0] // unit) * (image_size[1] // unit)
    hidden = math.ceil(num_units * mask_ratio)
    if hidden >= num_units:
        raise ValueError(
            f"method.mask_ratio {mask_ratio} leaves no visible unit of {num_units} of {unit} px"
        )


def check_decoder(decoder_widths: tuple[int, ...], encoder: EncoderConfig) -> None:
    """Refuse a convolutional decoder whose stages do not enlarge to the encoder's stride."""
    if not decoder_widths:
        raise ValueError("method.decoder_widths names no stage")
    # Each stage after the first doubles the grid; a pixel shuffle at the end covers the rest.
    doublings = len(decoder_widths) - 1
    if encoder.stride % 2**doublings:
        raise ValueError(
            f"method.decoder_widths names {len(decoder_widths)} stages, which enlarge "
            f"{2**doublings} times; the encoder's stride is {encoder.stride}"
        )
