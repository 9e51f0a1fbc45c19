"""Small models of timm's of the kinds that people have, with random weights."""

from __future__ import annotations

from typing import Any

import timm
import torch

SMALL: dict[str, Any] = {
    "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "img_size": 32, "num_classes": 0,
}  # fmt: skip
GATED = {"mlp_ratio": 4.0}
# timm's name of a model, and what makes it small.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2 gated": ("vit_giant_patch14_dinov2", GATED),
    "dinov2 registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2 registers gated": ("vit_giant_patch14_reg4_dinov2", GATED),
    "registers with places": (
        "vit_small_patch14_reg4_dinov2",
        {"no_embed_class": False, "qk_norm": True, "reg_tokens": 2},
    ),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3 qkv bias": ("vit_small_patch16_dinov3_qkvb", {"global_pool": "token"}),
    "dinov3 gated": ("vit_small_plus_patch16_dinov3_qkvb", {"mlp_ratio": 1.3}),
    "eva02": ("eva02_small_patch14_224", {"ref_feat_shape": (3, 3)}),
    "eva02 mlp norm": ("eva02_base_patch14_448", {"ref_feat_shape": (3, 3)}),
    "eva02 clip": ("eva02_base_patch16_clip_224", {"ref_feat_shape": (3, 3)}),
    "eva without class token": ("vit_medium_patch16_rope_reg1_gap_256", {"qk_norm": True}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "siglip2": ("vit_base_patch16_siglip_gap_224", {"act_layer": "gelu_tanh"}),
}


def small_timm(kind: str, **options: Any) -> Any:
    """A model whose every parameter matters, such as its layer scale."""
    name, changes = TIMM[kind]
    model = timm.create_model(name, **SMALL | changes | options)
    with torch.no_grad():
        for parameter in model.parameters():
            rng = torch.Generator().manual_seed(parameter.numel())
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()
