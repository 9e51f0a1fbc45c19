"""What goes with what: encoder, method and picture size held against one another."""

from __future__ import annotations

import math

from mimray.trainers.config.method import (
    AEConfig,
    BEiTConfig,
    DVAEConfig,
    FinetuneConfig,
    MAEConfig,
    MaskFeatConfig,
    MethodConfig,
    SimMIMConfig,
    VAEConfig,
)
from mimray.trainers.config.model import (
    ConvConfig,
    DalleConfig,
    EncoderConfig,
    SwinConfig,
    ViTConfig,
)

MASKING = (MAEConfig, SimMIMConfig, MaskFeatConfig, BEiTConfig)


def check_composition(
    encoder: EncoderConfig, method: MethodConfig, image_size: tuple[int, int]
) -> None:
    """Refuse what cannot work, with the reason and the nearest thing that can.

    Args:
        encoder: architecture.
        method: objective.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: they do not compose.
    """
    check_size(encoder, image_size)
    if isinstance(method, MASKING) and isinstance(encoder, ConvConfig | DalleConfig):
        raise ValueError(
            f"method {method.name} hides tokens, which encoder {encoder.name} does not have; "
            "take a vit or swin, or methods ae, vae and dvae"
        )
    if drops_hidden(method):
        assert isinstance(method, MAEConfig | MaskFeatConfig)
        if not isinstance(encoder, ViTConfig):
            raise ValueError(
                f"method {method.name} with a decoder leaves hidden patches out of the encoder, "
                f"which the windows of {encoder.name} cannot do without; take a vit, or method "
                "simmim, or maskfeat with decoder_depth 0"
            )
        if encoder.rel_pos_bias != "none" or encoder.positions == "none":
            raise ValueError(
                f"method {method.name} with a decoder leaves hidden patches out of the encoder, "
                "which then needs absolute positions: encoder.positions sincos or learned and "
                "encoder.rel_pos_bias none"
            )
    height, width = image_size
    num_patches = (height // encoder.stride) * (width // encoder.stride)
    if isinstance(method, SimMIMConfig):
        _check_units(encoder, method, image_size)
    elif isinstance(method, MASKING):
        _check_ratio(method.mask_ratio, num_patches)
    if isinstance(method, MaskFeatConfig) and encoder.stride % method.hog_cell_px:
        raise ValueError(
            f"method.hog_cell_px {method.hog_cell_px} does not divide the encoder's stride "
            f"{encoder.stride}"
        )
    if isinstance(method, BEiTConfig | MaskFeatConfig) and (
        not isinstance(method, MaskFeatConfig) or method.masking == "block"
    ):
        most = int(num_patches * method.mask_ratio)
        if most < method.min_block_patches:
            raise ValueError(
                f"method.min_block_patches {method.min_block_patches} is more than the {most} "
                f"patches of {num_patches} that method.mask_ratio {method.mask_ratio} may hide"
            )
    if isinstance(method, AEConfig | VAEConfig | DVAEConfig):
        _check_decoder(encoder, method)
    if isinstance(method, FinetuneConfig):
        if isinstance(encoder, DalleConfig):
            raise ValueError("encoder dalle makes codes of pictures; it is not for fine-tuning")
        if method.pooling == "cls" and not isinstance(encoder, ViTConfig):
            raise ValueError(
                f"encoder {encoder.name} has no class token; method.pooling mean goes with it"
            )


def drops_hidden(method: MethodConfig) -> bool:
    """Whether the encoder sees visible patches alone."""
    return isinstance(method, MAEConfig) or (
        isinstance(method, MaskFeatConfig) and method.decoder_depth > 0
    )


def check_size(encoder: EncoderConfig, image_size: tuple[int, int]) -> None:
    """Refuse a size of input that an encoder cannot cut into tokens.

    Args:
        encoder: architecture.
        image_size: (height, width) in pixels.

    Raises:
        ValueError: its stride or its windows do not divide it.
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


def _check_ratio(mask_ratio: float, num_patches: int) -> None:
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


def _check_units(encoder: EncoderConfig, method: SimMIMConfig, image_size: tuple[int, int]) -> None:
    unit = method.mask_unit_px or encoder.stride
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
    hidden = math.ceil(num_units * method.mask_ratio)
    if hidden >= num_units:
        raise ValueError(
            f"method.mask_ratio {method.mask_ratio} leaves no visible unit of {num_units} "
            f"of {unit} px"
        )


def _check_decoder(encoder: EncoderConfig, method: AEConfig | VAEConfig | DVAEConfig) -> None:
    if not method.decoder_widths:
        if isinstance(encoder, DalleConfig) and isinstance(method, DVAEConfig):
            return  # imported for its codes alone
        raise ValueError("method.decoder_widths names no stage")
    # Each stage doubles the grid; what is left of the stride is a pixel shuffle at the end.
    doublings = len(method.decoder_widths) - 1
    if encoder.stride % 2**doublings:
        raise ValueError(
            f"method.decoder_widths names {len(method.decoder_widths)} stages, which enlarge "
            f"{2**doublings} times; the encoder's stride is {encoder.stride}"
        )
