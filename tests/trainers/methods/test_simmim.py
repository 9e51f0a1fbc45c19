"""SimMIM against transformers and the definition of its loss."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.simmim import SimMIM
from mimray.trainers.models.patches import patchify, unpatchify

VIT = {"name": "vit", "width": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
SWIN = {
    "name": "swin",
    "width": 16,
    "depths": [2, 2, 2],
    "num_heads": [2, 4, 8],
    "patch_size": 2,
    "window_size": 6,
}
ENCODERS = pytest.mark.parametrize("encoder", [VIT, SWIN], ids=["vit", "swin"])


def recipe_of(encoder: dict[str, Any], loss: str = "l1", **data: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": encoder,
            "method": {"name": "simmim", "mask_unit_px": 16, "loss": loss},
            "data": {"image_size": [48, 48], **data},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )


def method_of(recipe: Recipe) -> SimMIM:
    """Biases, norms and tables are no longer at the values they start with."""
    torch.manual_seed(3)
    method = build_method(recipe)
    assert isinstance(method, SimMIM)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return method.eval()


def images_of(recipe: Recipe, count: int = 2, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, recipe.data.channels, *recipe.data.image_size, generator=rng)


def masks(recipe: Recipe, count: int = 2) -> Tensor:
    draws = [SimMIM.draw_mask(recipe, generator(0, Stream.MASK, 0, i)) for i in range(count)]
    return torch.from_numpy(np.stack(draws))


_TRANSFORMERS = [
    (r"^encoder\.cls_token", "vit.embeddings.cls_token"),
    (r"^encoder\.pos_embed", "vit.embeddings.position_embeddings"),
    (r"^encoder\.patch_embed\.proj", "BASE.embeddings.patch_embeddings.projection"),
    (r"^encoder\.patch_embed\.norm", "swin.embeddings.norm"),
    (r"^mask_token", "BASE.embeddings.mask_token"),
    (r"^encoder\.blocks", "vit.layers"),
    (r"^encoder\.layers", "swin.encoder.layers"),
    (r"^encoder\.norm", "BASE.layernorm"),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.relative", ".attention.relative_position_bias.relative"),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"^head", "decoder.0"),
]


def as_transformers(method: SimMIM, base: str) -> dict[str, Tensor]:
    """Our weights under the names, and in the layout, of `...ForMaskedImageModeling`."""
    stride, channels = method.encoder.stride, method.encoder.in_chans
    state = {}
    for ours, value in method.state_dict().items():
        name = ours
        for pattern, replacement in _TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        name = name.replace("BASE", base)
        # Theirs merges at the end of a stage what timm merges at the start of the next.
        name = re.sub(
            r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name
        )
        if ours.startswith("head"):
            value = value.unflatten(0, (stride, stride, channels)).movedim(2, 0).flatten(0, 2)
            value = value[..., None, None] if value.ndim == 2 else value
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", f"{letter}_proj")] = part
        else:
            state[name] = value
    return state


def vit_of_transformers(recipe: Recipe) -> nn.Module:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    return ViTForMaskedImageModeling(
        ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=192,
            image_size=48,
            patch_size=8,
            encoder_stride=8,
            num_channels=recipe.data.channels,
            layer_norm_eps=1e-6,
        )
    )


def swin_of_transformers(recipe: Recipe) -> nn.Module:
    from transformers import SwinConfig, SwinForMaskedImageModeling

    return SwinForMaskedImageModeling(
        SwinConfig(
            embed_dim=16,
            depths=[2, 2, 2],
            num_heads=[2, 4, 8],
            image_size=48,
            patch_size=2,
            window_size=6,
            encoder_stride=8,
            num_channels=recipe.data.channels,
        )
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("base", "encoder", "build", "enlarge"),
    [
        ("vit", {**VIT, "positions": "learned"}, vit_of_transformers, 1),
        ("swin", SWIN, swin_of_transformers, 4),
    ],
    ids=["vit", "swin"],
)
def test_simmim__equals_transformers(
    base: str, encoder: dict[str, Any], build: Any, enlarge: int, channels: int
):
    recipe = recipe_of(encoder, channels=channels)
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)
    theirs = build(recipe).eval()
    missing, unexpected = theirs.load_state_dict(as_transformers(method, base), strict=False)
    assert not unexpected
    assert all(name.endswith("relative_position_index") for name in missing)
    # Its masks are over the first grid of patches, ours over the last one.
    fine = mask.unflatten(1, (6, 6)).repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)

    ours = method(images, mask)
    reference = theirs(images, bool_masked_pos=fine.flatten(1))

    assert ours.loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
    predicted = method.reconstruct(images, ours)
    torch.testing.assert_close(predicted, reference.reconstruction, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("loss", ["l1", "l2"])
@ENCODERS
def test_loss__is_the_mean_error_over_hidden_pixels(
    encoder: dict[str, Any], loss: str, channels: int
):
    recipe = recipe_of(encoder, loss, channels=channels, image_size=[48, 96])
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)
    mask[1] |= mask[1].roll(1)  # not the same number in each picture

    out = method(images, mask)

    predicted = method.reconstruct(images, out).detach().double().numpy()
    grid = mask.numpy().reshape(2, 6, 12)
    total = count = 0.0
    for b, row, column in np.argwhere(grid):
        place = b, slice(None), slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8)
        error = np.abs(predicted[place] - images.numpy()[place])
        total += (error if loss == "l1" else error**2).sum()
        count += error.size
    assert count == mask.sum() * 64 * channels
    assert out.loss.item() == pytest.approx(total / count, abs=1e-5)
    assert torch.equal(out.target, patchify(images, 8))
    assert torch.equal(out.mask, mask)


@pytest.mark.parametrize("size", [(48, 48), (48, 96)])
@ENCODERS
def test_hidden_pixels__reach_the_targets_and_not_the_predictions(
    encoder: dict[str, Any], size: tuple[int, int]
):
    recipe = recipe_of(encoder, image_size=size)
    method, mask = method_of(recipe), masks(recipe)
    images, others = images_of(recipe, seed=1), images_of(recipe, seed=2)
    hidden = mask.unsqueeze(-1)
    swapped = torch.where(hidden, patchify(others, 8), patchify(images, 8))
    shown = torch.where(hidden, patchify(images, 8), patchify(others, 8))

    ours = method(images, mask)
    other_hidden = method(unpatchify(swapped, 8, recipe.grid), mask)
    other_visible = method(unpatchify(shown, 8, recipe.grid), mask)

    assert torch.equal(ours.prediction, other_hidden.prediction)
    assert ours.loss != other_hidden.loss
    assert (ours.prediction - other_visible.prediction).abs().max() > 1e-4


@ENCODERS
def test_visible_predictions__do_not_count(encoder: dict[str, Any]):
    recipe = recipe_of(encoder)
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)

    out = method(images, mask)
    (gradient,) = torch.autograd.grad(out.loss, out.prediction)

    assert (gradient[mask] != 0).all()
    assert not gradient[~mask].any()


@ENCODERS
def test_gradient__reaches_every_parameter(encoder: dict[str, Any]):
    recipe = recipe_of(encoder)
    method = method_of(recipe).train()

    method(images_of(recipe), masks(recipe)).loss.backward()

    learnt = {n: p for n, p in method.named_parameters() if p.requires_grad}
    without = [n for n, p in learnt.items() if p.grad is None or not p.grad.any()]
    assert not without


@ENCODERS
def test_loss__is_reduced_in_fp32_when_all_else_is_bf16(encoder: dict[str, Any]):
    recipe = recipe_of(encoder)
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)
    expected = method(images, mask).loss.item()

    out = method.bfloat16()(images.bfloat16(), mask)

    assert out.prediction.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("name", "hidden", "unit"),
    [("simmim-swin-b", 22, 1), ("simmim-vit-b", 30 * 4, 2), ("simmim-vit-b-random50", 98, 1)],
)
def test_masks__of_recipes_hide_what_was_published(name: str, hidden: int, unit: int):
    recipe = load_recipe(name)
    rows, columns = recipe.grid

    drawn = masks(recipe, 20)

    assert (drawn.sum(dim=1) == hidden).all()
    assert len({tuple(row.tolist()) for row in drawn}) == 20
    units = drawn.view(20, rows // unit, unit, columns // unit, unit)
    assert (units.amin(dim=(2, 4)) == units.amax(dim=(2, 4))).all()


def test_head__is_a_convolution_and_pixel_shuffle_with_its_rows_reordered():
    method = method_of(recipe_of(VIT))
    tokens = torch.randn(2, 36, 48, generator=torch.Generator().manual_seed(0))
    published = nn.Sequential(nn.Conv2d(48, 192, 1), nn.PixelShuffle(8))
    rows = [(row * 8 + column) * 3 + c for c in range(3) for row in range(8) for column in range(8)]
    with torch.no_grad():
        published[0].weight.copy_(method.head.weight[rows].view(192, 48, 1, 1))
        published[0].bias.copy_(method.head.bias[rows])

    theirs = published(tokens.transpose(1, 2).unflatten(2, (6, 6)))

    ours = unpatchify(method.head(tokens), 8, (6, 6))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_initialisation__is_the_official_one():
    torch.manual_seed(0)
    method = build_method(recipe_of({**VIT, "width": 256}))
    assert isinstance(method, SimMIM)

    # A 1x1 convolution of 256 channels starts uniform within 1 / 16.
    for values in (method.head.weight, method.head.bias):
        assert values.abs().max() <= 1 / 16
        assert values.std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.1)
    assert method.mask_token.shape == (1, 1, 256)
    assert method.mask_token.std().item() == pytest.approx(0.02, rel=0.2)


@ENCODERS
def test_panels__draw_the_prediction_where_it_was_hidden(encoder: dict[str, Any]):
    recipe = recipe_of(encoder, image_size=[48, 96])
    method, images = method_of(recipe), images_of(recipe)

    out = method(images)  # the mask from torch's generator
    original, masked, pasted, alone = method.panels(images, out)

    assert (out.mask.sum(dim=1) == 4 * 11).all()  # ceil(0.6 x 18) units of four tokens
    hidden = out.mask.numpy().reshape(2, 6, 12).repeat(8, axis=1).repeat(8, axis=2)
    np.testing.assert_array_equal(pasted.pixels[hidden], alone.pixels[hidden])
    np.testing.assert_array_equal(pasted.pixels[~hidden], original.pixels[~hidden])
    assert (masked.pixels[hidden] != original.pixels[hidden]).any()
