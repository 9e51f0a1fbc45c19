"""Every method with every encoder: what composes trains, what does not says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method, method_class

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
    "swin": {
        "name": "swin", "width": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4,
        "window_size": 2,
    },
    "conv": {"name": "conv", "widths": [8, 8, 8], "depth": 1},
}  # fmt: skip
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
CONVOLUTIONS = {"decoder_widths": [8, 8], "decoder_blocks": 1}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", **DECODER},
    "simmim": {"name": "simmim", "mask_unit_px": 16},
    "maskfeat": {"name": "maskfeat", "min_block_patches": 4},
    "maskfeat-decoder": {"name": "maskfeat", "masking": "random", "mask_ratio": 0.75, **DECODER},
    "beit": {
        "name": "beit", "vocab_size": 8, "tokenizer_image_size": [32, 48], "min_block_patches": 4,
    },
    "distill": {"name": "distill", "min_block_patches": 4, "teacher_width": 16},
    "distill-plain": {
        "name": "distill", "mask_ratio": 0, "pooled_weight": 1, "teacher_width": 16,
    },
    "capi": {"name": "capi", "num_clusters": 8, "assignment_group": 2, **DECODER},
    "ibot": {
        "name": "ibot", "local_px": 16, "pooling": "mean", "num_prototypes": 8, "head_width": 16,
        "bottleneck_width": 8,
    },
    "ae": {"name": "ae", "latent_dim": 4, **CONVOLUTIONS},
    "vae": {"name": "vae", "latent_dim": 4, **CONVOLUTIONS},
    "dvae": {"name": "dvae", "codebook_size": 8, "code_dim": 4, **CONVOLUTIONS},
}  # fmt: skip
REFUSED = {
    ("mae", "swin"): "windows",
    ("capi", "swin"): "windows",
    ("maskfeat-decoder", "swin"): "windows",
    **{
        (name, "conv"): "hides tokens"
        for name in ("mae", "simmim", "beit", "distill", "ibot", "capi")
    },
    ("maskfeat", "conv"): "hides tokens",
    ("maskfeat-decoder", "conv"): "hides tokens",
}
PAIRS = [(method, encoder) for method in METHODS for encoder in ENCODERS]


class Codes:
    """A tokenizer with one answer."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def to(self, device: torch.device) -> Codes:
        return self

    def codes(self, images: Tensor) -> Tensor:
        return torch.arange(24).remainder(8).view(1, 4, 6).expand(len(images), -1, -1)

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError


def teacher_card(channels: int) -> BundleCard:
    """An untrained teacher, of another grid than any student's."""
    half = [0.5] * channels
    tree = {"name": "t", "encoder": ENCODERS["vit"], "image_size": [24, 24], "mean": half}
    return BundleCard.model_validate({**tree, "std": half, "channels": channels})


def recipe_of(method: str, encoder: str, channels: int) -> Recipe:
    return parse_recipe(
        {
            "encoder": ENCODERS[encoder],
            "method": METHODS[method],
            "data": {"image_size": [32, 48], "channels": channels},
            "optim": {"batch_size": 2, "steps": 2},
        }
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("method", "encoder"), [pair for pair in PAIRS if pair not in REFUSED])
def test_pair__learns_from_pictures_that_are_not_square(
    method: str, encoder: str, channels: int
) -> None:
    recipe = recipe_of(method, encoder, channels)
    torch.manual_seed(0)
    model = build_method(recipe).train()
    if method == "beit":
        model.attach(Codes(recipe))  # type: ignore[operator]
    if recipe.method.name == "distill":
        model.expect("teacher", teacher_card(channels))
    images = torch.randn(2, channels, 32, 48)

    output = model(images)
    output.loss.backward()

    assert torch.isfinite(output.loss)
    assert output.mask.shape == (2, 24)
    assert output.mask.dtype == torch.bool
    unused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert unused == []


@pytest.mark.parametrize(("method", "encoder"), REFUSED, ids=str)
def test_pair__that_cannot_work_is_refused_with_the_reason(method: str, encoder: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[method, encoder]):
        recipe_of(method, encoder, 3)


@pytest.mark.parametrize("name", sorted({m["name"] for m in METHODS.values()}))
def test_name__leads_to_its_class(name: str) -> None:
    assert method_class(name).__name__.lower() == name
