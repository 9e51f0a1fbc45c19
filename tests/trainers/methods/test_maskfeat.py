"""MaskFeat against timm's blocks, our own MAE and the definition of its loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.maskfeat import MaskFeat
from mimray.trainers.models.patches import patchify, unpatchify

VIT = {"name": "vit", "width": 48, "depth": 2, "num_heads": 4, "patch_size": 8}
SWIN = {"name": "swin", "width": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
HEAD = {"mask_ratio": 0.5, "min_block_patches": 2, "hog_cell_px": 4}
DECODER = {
    "masking": "random",
    "mask_ratio": 0.75,
    "hog_cell_px": 4,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}
VARIANTS = pytest.mark.parametrize(
    ("encoder", "options"),
    [(VIT, HEAD), (VIT, DECODER), (SWIN, HEAD)],
    ids=["vit-head", "vit-decoder", "swin-head"],
)


def recipe_of(encoder: dict[str, Any], options: dict[str, Any], **data: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": encoder,
            "method": {"name": "maskfeat", **options},
            "data": {"image_size": [32, 32], **data},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )


def method_of(recipe: Recipe) -> MaskFeat:
    """Biases and norms are no longer at the values they start with."""
    torch.manual_seed(3)
    method = build_method(recipe)
    assert isinstance(method, MaskFeat)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return method.eval()


def images_of(recipe: Recipe, count: int = 2, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, recipe.data.channels, *recipe.data.image_size, generator=rng)


def masks(recipe: Recipe, count: int = 2) -> Tensor:
    draws = [MaskFeat.draw_mask(recipe, generator(0, Stream.MASK, 0, i)) for i in range(count)]
    return torch.from_numpy(np.stack(draws))


def test_head__predicts_as_timms_vit_with_mask_tokens_does():
    from timm.models.vision_transformer import VisionTransformer

    recipe = recipe_of(VIT, HEAD, image_size=[16, 40])
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)
    theirs = VisionTransformer((16, 40), 8, embed_dim=48, depth=2, num_heads=4, num_classes=0)
    theirs.load_state_dict(method.encoder.state_dict())

    x = theirs.patch_embed(images)  # B N D
    hidden = mask.unsqueeze(-1).float()
    x = theirs._pos_embed(x * (1 - hidden) + method.mask_token * hidden)
    for block in theirs.blocks:
        x = block(x)
    expected = theirs.norm(x)[:, 1:] @ method.head.weight.T + method.head.bias

    torch.testing.assert_close(method(images, mask).prediction, expected, rtol=0, atol=1e-5)


def test_decoder__predicts_as_mae_does_with_the_same_weights():
    # 16 bins in 2 x 2 cells are as many values a channel as 8 x 8 pixels.
    recipe = recipe_of(VIT, {**DECODER, "hog_bins": 16}, image_size=[16, 40])
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)
    tree = recipe.model_dump(mode="json")
    tree["method"] = {"name": "mae"} | {k: v for k, v in DECODER.items() if "decoder" in k}
    mae = build_method(parse_recipe(tree)).eval()
    mae.load_state_dict(method.state_dict())

    found = method(images, mask).prediction

    assert torch.equal(found, mae(images, mask).prediction)


@VARIANTS
def test_loss__is_the_mean_over_the_values_of_hidden_patches(
    encoder: dict[str, Any], options: dict[str, Any]
):
    recipe = recipe_of(encoder, options)
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)
    mask[1] = mask[0] if "decoder_depth" in options else mask[0].roll(1) | mask[0]

    out = method(images, mask)

    prediction = out.prediction.detach().double().numpy()
    errors = [
        (prediction[b, n, p] - float(out.target[b, n, p])) ** 2
        for b, n in np.argwhere(mask.numpy())
        for p in range(out.target.shape[-1])
    ]
    assert out.loss.item() == pytest.approx(np.mean(errors), abs=1e-5)
    assert torch.equal(out.target, method.hog(images))
    assert torch.equal(out.mask, mask)


@VARIANTS
def test_hidden_pixels__reach_the_targets_and_not_the_predictions(
    encoder: dict[str, Any], options: dict[str, Any]
):
    recipe = recipe_of(encoder, options)
    method, mask = method_of(recipe), masks(recipe)
    stride, grid = method.encoder.stride, recipe.grid
    images, others = images_of(recipe, seed=1), images_of(recipe, seed=2)
    hidden = mask.unsqueeze(-1)
    swapped = torch.where(hidden, patchify(others, stride), patchify(images, stride))
    shown = torch.where(hidden, patchify(images, stride), patchify(others, stride))

    ours = method(images, mask)
    other_hidden = method(unpatchify(swapped, stride, grid), mask)
    other_visible = method(unpatchify(shown, stride, grid), mask)

    assert torch.equal(ours.prediction, other_hidden.prediction)
    assert not torch.equal(ours.target, other_hidden.target)
    assert (ours.prediction - other_visible.prediction).abs().max() > 1e-4


@VARIANTS
def test_gradient__reaches_every_parameter(encoder: dict[str, Any], options: dict[str, Any]):
    recipe = recipe_of(encoder, options)
    method = method_of(recipe).train()

    method(images_of(recipe), masks(recipe)).loss.backward()

    learnt = {n: p for n, p in method.named_parameters() if p.requires_grad}
    without = [n for n, p in learnt.items() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("encoder", "options", "size"),
    [(VIT, HEAD, (16, 40)), (VIT, DECODER, (40, 16)), (SWIN, HEAD, (32, 64))],
    ids=["vit-head", "vit-decoder", "swin-head"],
)
def test_maskfeat__takes_wide_pictures_of_one_channel_or_three(
    encoder: dict[str, Any], options: dict[str, Any], size: tuple[int, int], channels: int
):
    recipe = recipe_of(encoder, options, image_size=size, channels=channels)
    method = method_of(recipe)

    out = method(images_of(recipe))  # the mask from torch's generator

    rows, columns = recipe.grid
    assert out.prediction.shape == out.target.shape == (2, rows * columns, channels * 9 * 4)
    assert out.mask.any()
    assert torch.isfinite(out.loss)


def test_loss__falls_when_the_same_batch_is_seen_again():
    recipe = recipe_of(VIT, HEAD)
    method, images, mask = method_of(recipe).train(), images_of(recipe), masks(recipe)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = method(images, mask).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]


def test_masks__of_the_papers_recipe_are_blocks_of_at_most_78_patches():
    recipe = load_recipe("maskfeat-vit-b")

    counts = masks(recipe, 200).sum(dim=1)

    assert recipe.grid == (14, 14)
    assert counts.max() <= 78
    assert counts.float().mean() > 70
    assert len(counts.unique()) > 3


def test_masks__of_the_other_recipe_are_three_quarters_at_random():
    recipe = load_recipe("maskfeat-vit-b-mae")

    drawn = masks(recipe, 20)

    assert (drawn.sum(dim=1) == 147).all()
    assert len({tuple(row.tolist()) for row in drawn}) == 20


@pytest.mark.parametrize("name", ["maskfeat-vit-b", "maskfeat-vit-b-mae"])
def test_recipes__predict_108_values_a_patch(name: str):
    recipe = load_recipe(name, ["encoder.depth=1"])

    method = build_method(recipe)

    assert isinstance(method, MaskFeat)
    assert method.hog.out_dim == 108
    assert (method.decoder is None) == (name == "maskfeat-vit-b")


def test_block_masks__are_refused_where_hidden_patches_are_left_out():
    with pytest.raises(ConfigError, match="method.masking"):
        recipe_of(VIT, {**DECODER, "masking": "block", "min_block_patches": 2})


@VARIANTS
def test_panels__show_true_histograms_where_patches_were_visible(
    encoder: dict[str, Any], options: dict[str, Any]
):
    recipe = recipe_of(encoder, options)
    method, images, mask = method_of(recipe), images_of(recipe), masks(recipe)

    original, masked, true, predicted = method.panels(images, method(images, mask))

    assert original.pixels.shape == masked.pixels.shape == (2, 32, 32, 3)
    assert "HOG" in true.title
    assert "HOG" in predicted.title
    height, width = true.pixels.shape[1:3]
    assert max(height, width) >= 192
    rows, columns = recipe.grid
    places = mask.numpy().reshape(2, rows, columns)
    hidden = places.repeat(height // rows, axis=1).repeat(width // columns, axis=2)
    same = (true.pixels == predicted.pixels).all(axis=-1)
    assert same[~hidden].all()
    assert not same[hidden].all()


def test_maskfeat__has_no_pixels_to_reconstruct():
    recipe = recipe_of(VIT, HEAD)
    method, images = method_of(recipe), images_of(recipe)

    with pytest.raises(NotImplementedError, match="MaskFeat"):
        method.reconstruct(images, method(images))
