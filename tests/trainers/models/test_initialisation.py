"""Initial weights: their distribution is that of the official code."""

from __future__ import annotations

import math

import pytest
import torch

from mimray.trainers.config.model import SwinConfig, ViTConfig
from mimray.trainers.models import build_encoder


def test_vit__beit_initialisation_is_the_official_one():
    torch.manual_seed(0)
    shape = {"name": "vit", "width": 192, "depth": 4, "num_heads": 4, "patch_size": 8}
    beit = {"init": "beit", "positions": "learned", "rel_pos_bias": "shared", "layer_scale": 0.1}
    encoder = build_encoder(ViTConfig.model_validate({**shape, **beit}), (32, 48))

    # A standard normal cut at +-1 has variance 1 - 2 phi(1) / (2 Phi(1) - 1).
    density = math.exp(-0.5) / math.sqrt(2 * math.pi)
    std = 0.02 * math.sqrt(1 - 2 * density / math.erf(1 / math.sqrt(2)))
    for name, value in encoder.state_dict().items():
        if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            value = value * math.sqrt(2 * (int(name.split(".")[1]) + 1))
        if "norm" in name:
            assert torch.all(value == float(name.endswith("weight"))), name
        elif name.endswith("gamma"):
            assert torch.all(value == 0.1), name
        elif name.endswith("bias") or "table" in name:
            assert not value.any(), name
        else:
            assert value.abs().max() <= 0.02 + 1e-8, name
            tolerance = 4 / math.sqrt(value.numel())
            assert value.std().item() == pytest.approx(std, rel=tolerance), name
            assert abs(value.mean().item()) < tolerance * std, name


def test_swin__initialisation_is_the_official_one():
    torch.manual_seed(0)
    shape = {"width": 64, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 2}
    config = SwinConfig.model_validate({"name": "swin", "window_size": 6, **shape})
    for name, value in build_encoder(config, (24, 48)).state_dict().items():
        if "norm" in name:
            assert torch.all(value == float(name.endswith("weight"))), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not value.any(), name
        elif "patch_embed" not in name:
            tolerance = 5 / math.sqrt(value.numel())
            assert value.std().item() == pytest.approx(0.02, rel=tolerance), name
