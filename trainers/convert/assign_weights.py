"""Assigns weights to the modules they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.maskfeat import MaskFeatConfig
from mimray.trainers.config.model import ConvConfig, DalleConfig, EncoderConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.config.simmim import SimMIMConfig
from mimray.trainers.models import build_encoder
from mimray.trainers.models.decoders import mae_decoder
from mimray.trainers.models.hog import HOG

Shapes = Mapping[str, torch.Size]


def encoder_shapes(encoder: EncoderConfig, size: tuple[int, int], channels: int) -> Shapes:
    """Shapes of an encoder's parameters; no encoder is made.

    Args:
        encoder: architecture.
        size: (height, width) of the input, pixels.
        channels: channels of the input.
    """
    with torch.device("meta"):
        return _shapes(build_encoder(encoder, size, channels))


def method_shapes(recipe: Recipe) -> Shapes:
    """Shapes of a method's parameters beside its encoder's.

    Args:
        recipe: recipe of mae, beit, simmim, or maskfeat without a decoder.
    """
    encoder, method, channels = recipe.encoder, recipe.method, recipe.data.channels
    if isinstance(method, MAEConfig):
        with torch.device("meta"):
            decoder = mae_decoder(recipe)
        return _shapes(nn.ModuleDict({"decoder": decoder}))
    if isinstance(method, BEiTConfig):
        out_dim = method.vocab_size
    elif isinstance(method, SimMIMConfig):
        out_dim = encoder.stride**2 * channels
    else:
        assert isinstance(method, MaskFeatConfig)
        out_dim = HOG(channels, method.hog_bins, method.hog_cell_px, encoder.stride).out_dim
    assert not isinstance(encoder, ConvConfig | DalleConfig)
    return {
        "mask_token": torch.Size((1, 1, encoder.width)),  # in a swin of the first stage
        "head.weight": torch.Size((out_dim, encoder.out_width)),
        "head.bias": torch.Size((out_dim,)),
    }


class Assignment(NamedTuple):
    """Parameters that match, and in words those that do not.

    Attributes:
        kept: parameters of the wanted names and shapes.
        missing: wanted names that none of them has.
        left_out: names of the parameters that are not kept.
        problems: a line for each name that does not match.
    """

    kept: dict[str, Tensor]
    missing: tuple[str, ...]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]


def assign_weights(state: Mapping[str, Tensor], wanted: Shapes) -> Assignment:
    """Assign parameters to the names and shapes wanted.

    Args:
        state: parameters by name.
        wanted: shapes by the names wanted.
    """
    kept = {k: v for k, v in state.items() if wanted.get(k) == v.shape}
    problems = [f"missing {k}" for k in wanted if k not in state]
    for key, value in state.items():
        if key not in wanted:
            problems.append(f"unexpected {key}")
        elif key not in kept:
            problems.append(f"{key} is {tuple(value.shape)}, wanted {tuple(wanted[key])}")
    return Assignment(
        kept,
        missing=tuple(k for k in wanted if k not in kept),
        left_out=tuple(k for k in state if k not in kept),
        problems=tuple(problems),
    )


def _shapes(module: nn.Module) -> Shapes:
    return {key: value.shape for key, value in module.state_dict().items()}
