"""Pooling, pyramid and narrow types against formulas, and one pass against two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mimray.serving.inference.options import Options
from mimray.serving.inference.outputs import compute_outputs, narrowed, pool, resample
from mimray.trainers.bundles import load_bundle
from mimray.trainers.types import Features


def _features(seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 12, 8, generator=generator)
    prefix = torch.randn(2, 1, 8, generator=generator)
    return Features(tokens, prefix, tokens.mean(1), (3, 4))


def test_pool__against_numpy() -> None:
    features = _features()
    tokens = features.tokens.numpy().astype(np.float64)
    np.testing.assert_allclose(pool(features, "mean", None), tokens.mean(1), atol=1e-6)
    np.testing.assert_array_equal(pool(features, "cls", None), features.prefix[:, 0])
    gem = (np.maximum(tokens, 1e-6) ** 3).mean(1) ** (1 / 3)
    np.testing.assert_allclose(pool(features, "gem", None), gem, atol=1e-5)
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[0, :5] = valid[1] = True
    expected = np.stack([tokens[0, :5].mean(0), tokens[1].mean(0)])
    np.testing.assert_allclose(pool(features, "mean", valid), expected, atol=1e-6)


def test_resample__has_no_parameters() -> None:
    maps = torch.arange(12.0).view(1, 1, 3, 4)
    assert resample(maps, 16, 16) is maps
    down = resample(maps, 16, 32)
    assert down.tolist() == [[[[5, 7], [9, 11]]]]  # a row that fills no window is kept
    up = resample(maps, 16, 4)
    assert up.shape == (1, 1, 12, 16)
    # Where a pixel of the finer map lies over the centre of a coarse one: (4 * r + 1.5) / 4.
    corner = up[0, 0, :2, :2].mean()
    assert corner == pytest.approx(0.0)
    np.testing.assert_allclose(up.mean(), maps.mean(), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (3, 8, 2, 4)])
def test_narrowed__int8_is_within_half_a_step(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(shape, generator=generator)
    values[0] = 0
    found = narrowed("x", values, "int8")
    assert found["x"].dtype == torch.int8
    scale = found["x_scale"]
    assert (found["x"].float() * scale - values).abs().le(scale / 2 + 1e-7).all()
    assert found["x"][0].eq(0).all()
    assert narrowed("x", values, "bfloat16")["x"].dtype == torch.bfloat16


def test_compute_outputs__one_pass_is_two(bundles: dict[str, Path]) -> None:
    encoder = load_bundle(bundles["alpha"])
    images = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(2))
    options = Options(tokens=True, layers=(0, 2), pyramid=2, norm=False)
    found = compute_outputs(encoder, images, None, options)
    torch.testing.assert_close(found["tokens"], encoder(images).tokens)
    torch.testing.assert_close(found["pooled"], encoder(images).pooled)
    for layer, expected in zip((0, 2), encoder.features(images, (0, 2), norm=False), strict=True):
        torch.testing.assert_close(found[f"layer_{layer}"], expected)
    assert {k: v.shape[2:] for k, v in found.items() if k.startswith("pyramid")} == {
        "pyramid_4": (12, 16), "pyramid_8": (6, 8), "pyramid_16": (3, 4), "pyramid_32": (2, 2)
    }  # fmt: skip
    alone = compute_outputs(encoder, images, None, Options(pooled=False, layers=(0,), norm=False))
    assert list(alone) == ["layer_0"]
    torch.testing.assert_close(alone["layer_0"], found["layer_0"])


def test_compute_outputs__swin_has_a_pyramid_of_its_own() -> None:
    from mimray.trainers.bundles import BundleCard, FrozenEncoder
    from mimray.trainers.config.model import SwinConfig
    from mimray.trainers.models import build_encoder

    torch.manual_seed(0)
    config = SwinConfig(
        name="swin", width=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=2
    )
    encoder = build_encoder(config, (64, 64), 3)
    card = BundleCard(
        name="s", encoder=config, image_size=(64, 64), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    frozen = FrozenEncoder(encoder, card)
    images = torch.randn(1, 3, 64, 64)
    found = compute_outputs(frozen, images, None, Options(tokens=True, layers=(1,), pyramid=3))
    torch.testing.assert_close(found["tokens"], frozen(images).tokens)
    stages = frozen.features(images, (0, 1, 2, 3))
    for stride, stage in zip((4, 8, 16, 32), stages, strict=True):
        torch.testing.assert_close(found[f"pyramid_{stride}"], stage)
