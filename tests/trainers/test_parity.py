"""Our models against other people's code, and against formulas written a second time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.convert import export_timm, export_transformers
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.load import load_method
from mimray.trainers.methods.mae import MAE
from mimray.trainers.models import build_encoder
from mimray.trainers.models.decoders import MAEDecoder
from mimray.trainers.models.patches import patchify, unpatchify
from mimray.trainers.models.positions import sincos_2d


def recipe_of(**changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": {
            "name": "vit",
            "width": 48,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 8,
            "mlp_ratio": 3.0,
        },
        "method": {
            "name": "mae",
            "decoder_width": 32,
            "decoder_depth": 2,
            "decoder_num_heads": 2,
        },
        "data": {"image_size": [32, 32]},
        "optim": {"batch_size": 8, "steps": 10},
    }
    for section, keys in changes.items():
        tree[section] |= keys
    return parse_recipe(tree)


def trained_like(recipe: Recipe, seed: int = 3) -> MAE:
    """A method whose biases and norms are no longer at the values they start with."""
    torch.manual_seed(seed)
    method = build_method(recipe)
    assert isinstance(method, MAE)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return method.eval()


def bundle_of(method: MAE, folder: Path, *, decoder: bool = True) -> Path:
    recipe = method.recipe
    card = BundleCard(
        name="parity",
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        mean=recipe.data.mean,
        std=recipe.data.std,
        layers=(0, 2),
        method="mae",
        data_fingerprint="f1n9e2",
        recipe=recipe.model_dump(mode="json"),
    )
    rest = {k: v for k, v in method.state_dict().items() if not k.startswith("encoder.")}
    save_bundle(folder, card, method.encoder.state_dict(), rest if decoder else None)
    return folder


def masks(recipe: Recipe, count: int) -> Tensor:
    draws = [MAE.draw_mask(recipe, generator(0, Stream.MASK, 0, i)) for i in range(count)]
    return torch.from_numpy(np.stack(draws))


def images_of(recipe: Recipe, count: int = 4, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, recipe.data.channels, *recipe.data.image_size, generator=rng)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_mae__equals_transformers(tmp_path: Path, norm_pix_loss: bool, channels: int):
    from transformers import ViTMAEForPreTraining

    recipe = recipe_of(method={"norm_pix_loss": norm_pix_loss}, data={"channels": channels})
    method = trained_like(recipe)
    export_transformers(bundle_of(method, tmp_path / "bundle"), tmp_path / "out")
    theirs, info = ViTMAEForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    images, mask = images_of(recipe), masks(recipe, 4)

    ours = method(images, mask)
    reference = theirs.eval()(images, noise=mask.float() + torch.rand(mask.shape) / 2)

    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(reference.mask.bool(), mask)
    assert ours.loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
    torch.testing.assert_close(ours.prediction, reference.logits, rtol=0, atol=1e-5)
    reloaded = load_method(tmp_path / "bundle")(images, mask)
    assert torch.equal(reloaded.prediction, ours.prediction)


@pytest.mark.parametrize("size", [(32, 32), (24, 48)])
@pytest.mark.parametrize("channels", [1, 3])
def test_encoder__equals_timm(tmp_path: Path, size: tuple[int, int], channels: int):
    import timm

    recipe = recipe_of(data={"image_size": size, "channels": channels})
    method = trained_like(recipe)
    export_timm(bundle_of(method, tmp_path / "bundle", decoder=False), tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = images_of(recipe)

    ours = method.encoder(images)

    tokens = torch.cat([ours.prefix, ours.tokens], dim=1)
    torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs(images), ours.pooled, rtol=0, atol=1e-5)
    (theirs_maps,) = theirs.forward_intermediates(images, indices=[1], norm=True)[1]
    (ours_maps,) = method.encoder.features(images, layers=[1])
    torch.testing.assert_close(theirs_maps, ours_maps, rtol=0, atol=1e-5)
    data = timm.data.resolve_data_config({}, model=theirs)
    assert data["input_size"] == (channels, *size)
    assert (tuple(data["mean"]), tuple(data["std"])) == (recipe.data.mean, recipe.data.std)
    assert (data["crop_mode"], data["crop_pct"]) == ("squash", 1.0)


class Reference:
    """A whole MAE in float64 numpy, written from the paper with loops over patches."""

    def __init__(self, state: dict[str, Tensor], heads: int, decoder_heads: int) -> None:
        self.w = {k: v.double().numpy() for k, v in state.items()}
        self.heads, self.decoder_heads = heads, decoder_heads

    def patches(self, image: np.ndarray, p: int) -> np.ndarray:
        _, height, width = image.shape
        rows = [
            image[:, y : y + p, x : x + p].transpose(1, 2, 0).ravel()
            for y in range(0, height, p)
            for x in range(0, width, p)
        ]
        return np.stack(rows)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def block(self, x: np.ndarray, name: str, heads: int) -> np.ndarray:
        q, k, v = np.split(self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv"), 3, -1)
        d = q.shape[-1] // heads
        out = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            score = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d))
            out.append(score / score.sum(-1, keepdims=True) @ v[:, part])
        x = x + self.linear(np.concatenate(out, -1), f"{name}.attn.proj")
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        return x + self.linear(gelu, f"{name}.mlp.fc2")

    def loss(self, image: np.ndarray, mask: np.ndarray, p: int, depths: tuple[int, int]) -> float:
        flat = self.patches(image, p)
        weight = self.w["encoder.patch_embed.proj.weight"]  # D C p p
        kernel = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
        x = flat @ kernel.T + self.w["encoder.patch_embed.proj.bias"]
        positions = self.w["encoder.pos_embed"][0]
        first = self.w["encoder.cls_token"][0] + positions[:1]
        x = np.concatenate([first, (x + positions[1:])[~mask]])
        for i in range(depths[0]):
            x = self.block(x, f"encoder.blocks.{i}", self.heads)
        x = self.linear(self.norm(x, "encoder.norm"), "decoder.embed")
        full = np.repeat(self.w["decoder.mask_token"][0], len(mask), axis=0)
        full[~mask] = x[1:]
        x = np.concatenate([x[:1], full]) + self.w["decoder.pos_embed"][0]
        for i in range(depths[1]):
            x = self.block(x, f"decoder.blocks.{i}", self.decoder_heads)
        predicted = self.linear(self.norm(x, "decoder.norm"), "decoder.pred")[1:]
        return float(((predicted - flat) ** 2).mean(-1)[mask].mean())


def test_mae__wide_input_of_five_channels_equals_numpy():
    # No recipe reads five channels, so the parts are put together by hand.
    recipe = recipe_of(data={"image_size": (16, 40)})
    method = trained_like(recipe)
    method.encoder = build_encoder(recipe.encoder, (16, 40), in_chans=5)
    method.decoder = MAEDecoder(48, 32, 2, 2, (2, 5), out_dim=8 * 8 * 5)
    images, mask = torch.randn(1, 5, 16, 40, generator=torch.Generator().manual_seed(1)), None
    mask = masks(recipe, 1)

    loss = method(images, mask).loss.item()

    reference = Reference(method.state_dict(), heads=4, decoder_heads=2)
    expected = reference.loss(images[0].double().numpy(), mask[0].numpy(), 8, (3, 2))
    assert loss == pytest.approx(expected, abs=1e-5)


def test_mae__hidden_pixels_do_not_reach_the_encoder():
    recipe = recipe_of(data={"image_size": (16, 40)})
    method, mask = trained_like(recipe), masks(recipe, 2)
    images, others = images_of(recipe, 2, seed=1), images_of(recipe, 2, seed=2)
    hidden = mask[..., None].expand(-1, -1, 8 * 8 * 3)
    swapped = torch.where(hidden, patchify(others, 8), patchify(images, 8))

    ours = method(images, mask)
    theirs = method(unpatchify(swapped, 8, (2, 5)), mask)

    assert torch.equal(ours.prediction, theirs.prediction)
    assert ours.loss != theirs.loss


@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    quarter=st.integers(1, 8),
    num_prefix=st.integers(0, 2),
)
@settings(max_examples=30)
def test_sincos__equals_the_formula_written_out(
    grid: tuple[int, int], quarter: int, num_prefix: int
):
    table = sincos_2d(4 * quarter, grid, num_prefix)

    rows, columns = grid
    expected = np.zeros((num_prefix + rows * columns, 4 * quarter))
    for r in range(rows):
        for c in range(columns):
            for i in range(quarter):
                rate = 10000 ** (-i / quarter)
                expected[num_prefix + r * columns + c, i::quarter] = (
                    math.sin(c * rate),
                    math.cos(c * rate),
                    math.sin(r * rate),
                    math.cos(r * rate),
                )
    np.testing.assert_allclose(table.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [(7, 7), (3, 5)])
def test_sincos__equals_transformers(grid: tuple[int, int]):
    from transformers.models.vit_mae import modeling_vit_mae

    theirs = modeling_vit_mae.build_2d_sinusoidal_position_embedding(*grid, 48, cls_token=True)

    # Theirs puts the row first, and its ViTMAE swaps the halves to fit published weights.
    ours = sincos_2d(48, grid, num_prefix=1)
    assert torch.equal(ours, torch.cat([theirs[:, 24:], theirs[:, :24]], dim=1))


@given(
    patch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 6),
    batch=st.integers(1, 3),
)
@settings(max_examples=40)
def test_patches__unpatchify_is_the_inverse_and_order_is_row_major(
    patch: int, grid: tuple[int, int], channels: int, batch: int
):
    height, width = grid[0] * patch, grid[1] * patch
    images = torch.arange(batch * channels * height * width).reshape(batch, channels, height, width)
    images = images.float()

    patches = patchify(images, patch)

    assert torch.equal(unpatchify(patches, patch, grid), images)
    corner = patches.reshape(batch, *grid, patch, patch, channels)[:, -1, -1]
    assert torch.equal(corner, images[:, :, -patch:, -patch:].permute(0, 2, 3, 1))


def test_initialisation__is_the_official_one():
    torch.manual_seed(0)
    encoder = {"name": "vit", "width": 192, "num_heads": 4, "mlp_ratio": 4.0}
    method = build_method(recipe_of(encoder=encoder, method={"decoder_width": 128}))
    state = method.state_dict()

    weights = [k for k, v in state.items() if v.ndim == 2]
    for name in [*weights, "encoder.patch_embed.proj.weight"]:
        weight = state[name].flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
    for name, value in state.items():
        if "norm" in name and name.endswith("weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert not value.any(), name
    for name in ("encoder.cls_token", "decoder.mask_token"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.25)
        assert state[name].mean().abs().item() < 0.01
    frozen = {n for n, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}


def test_encoder__another_input_size_keeps_its_own_grid():
    encoder = build_encoder(
        ViTConfig.model_validate({"name": "vit", "width": 8, "depth": 1, "num_heads": 1}), (32, 32)
    )

    features = encoder(torch.zeros(1, 3, 16, 64))

    assert (features.grid, features.tokens.shape) == ((1, 4), (1, 4, 8))
    with pytest.raises(ValueError, match="24x32"):
        encoder(torch.zeros(1, 3, 24, 32))
