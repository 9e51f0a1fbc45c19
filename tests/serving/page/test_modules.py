"""The page's arithmetic against numpy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Opened = Callable[..., Any]

_COMPONENTS = """async ([rows, width]) => {
  const { principalComponents } = await import('/page/pca.js');
  const data = Float32Array.from(rows.flat());
  const used = Int32Array.from({length: data.length / width}, (_, i) => i);
  const { projections, explained } = principalComponents(data, width, used);
  return [projections.map(values => [...values]), explained]; }"""


@pytest.fixture
def evaluate(site: str, visit: Opened) -> Callable[..., Any]:
    return visit(site).page.evaluate


def test_components__are_those_of_an_svd(evaluate: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    scores = rng.gamma(1.0, size=(8, 300)) * np.array([9, 6, 4, 2, 1, 1, 1, 1])[:, None]
    data = (rng.normal(size=(24, 8)) @ scores + 0.1 * rng.normal(size=(24, 300))).astype("f4")
    projections, explained = evaluate(_COMPONENTS, [data.tolist(), 24])
    centred = data - data.mean(axis=1, keepdims=True)
    _, values, right = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    for component in range(3):
        wanted = values[component] * right[component]
        wanted *= np.sign((wanted**3).sum())  # the rarer side is the bright one
        np.testing.assert_allclose(projections[component], wanted, atol=0.02 * values[0] / 17)
    assert explained == pytest.approx((values[:3] ** 2).sum() / (values**2).sum(), abs=1e-3)
    again, _ = evaluate(_COMPONENTS, [data.tolist(), 24])
    assert again == projections


@pytest.mark.parametrize("shape", [(4, 1), (2, 9), (5, 30)])
def test_components__of_next_to_nothing_are_finite(
    evaluate: Callable[..., Any], shape: tuple[int, int]
) -> None:
    constant = np.ones(shape).tolist()
    projections, explained = evaluate(_COMPONENTS, [constant, shape[0]])
    assert np.isfinite(projections).all()
    assert np.shape(projections) == (3, shape[1])
    assert explained == 0


def test_components__of_a_large_map_come_at_once(evaluate: Callable[..., Any]) -> None:
    milliseconds = evaluate(
        """async () => {
          const { principalComponents } = await import('/page/pca.js');
          const data = Float32Array.from({length: 1024 * 4096}, (_, i) => Math.sin(i * i));
          const used = Int32Array.from({length: 4096}, (_, i) => i);
          const began = performance.now();
          principalComponents(data, 1024, used);
          return performance.now() - began; }"""
    )
    # A tenth to a quarter of a second; more only says that the machine is busy.
    assert milliseconds < 2500


def test_run_lengths__are_cocos(evaluate: Callable[..., Any]) -> None:
    from faster_coco_eval.core import mask as mask_api

    rng = np.random.default_rng(0)
    masks = [rng.random((h, w)) < share for h, w, share in
             ((1, 1, 1), (3, 5, 0.5), (40, 9, 0.02), (200, 300, 0.97))]  # fmt: skip
    masks[3][:, :150] = False  # a run of many digits
    for mask in masks:
        told = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
        found = evaluate(
            """async ([counts, size]) => {
                 const { decodeMask } = await import('/page/run-lengths.js');
                 return [...decodeMask(counts, size)]; }""",
            [told["counts"].decode(), list(mask.shape)],
        )
        np.testing.assert_array_equal(np.reshape(found, mask.shape[::-1]).T, mask)


def test_halves__every_one(evaluate: Callable[..., Any]) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    wanted = bits.view(np.float16).astype(np.float64)
    got = evaluate(
        """async () => { const { fromHalves } = await import('/page/safetensors.js');
             const bits = Uint16Array.from({length: 65536}, (_, i) => i);
             return [...fromHalves(bits.buffer)].map(String); }"""
    )
    np.testing.assert_array_equal(np.array([float(x) for x in got]), wanted)


def test_safetensors__both_types_and_a_cut_file(evaluate: Callable[..., Any]) -> None:
    from safetensors.numpy import save

    arrays = {
        "layer_0": np.linspace(-2, 2, 6, dtype=np.float16).reshape(1, 2, 3),
        "pooled": np.array([[1.25, -3e-8]], np.float32),
    }
    file = save(arrays, {"mimray": "{}"})
    read = """async bytes => { const { readSafetensors } = await import('/page/safetensors.js');
        const { tensors, metadata } = readSafetensors(new Uint8Array(bytes).buffer);
        return [metadata, Object.fromEntries(Object.entries(tensors)
          .map(([name, { shape, data }]) => [name, [shape, [...data]]]))]; }"""
    metadata, tensors = evaluate(read, list(file))
    assert metadata == {"mimray": "{}"}
    for name, array in arrays.items():
        shape, values = tensors[name]
        assert tuple(shape) == array.shape
        np.testing.assert_array_equal(np.reshape(values, shape), array.astype(np.float64))
    with pytest.raises(Exception, match="cut off"):
        evaluate(read, list(file[:40]))


def test_centred_similarity__is_of_features_less_their_mean(evaluate: Callable[..., Any]) -> None:
    rng = np.random.default_rng(1)
    data = rng.normal(5, 1, size=(6, 12)).astype(np.float32)
    got = evaluate(
        """async rows => {
          const { FeatureMap } = await import('/page/features.js');
          const { Grid } = await import('/page/grid.js');
          const grid = new Grid(3, 4, {
            source_size: [30, 40], input_size: [48, 64], valid_region: [0, 0, 64, 48]});
          const map = new FeatureMap(Float32Array.from(rows.flat()), 6, grid, {});
          return [false, true].map(centred => [...map.similarity(1, 2, centred)]); }""",
        data.tolist(),
    )
    for found, features in zip(got, (data, data - data.mean(axis=1, keepdims=True)), strict=True):
        unit = features / np.linalg.norm(features, axis=0)
        np.testing.assert_allclose(found, unit.T @ unit[:, 6], atol=1e-5)


def test_sizes__fit_every_model_and_the_limit(evaluate: Callable[..., Any]) -> None:
    models = [
        {"image_size": [224, 224], "patch_size": 16, "max_input_pixels": 700 * 700},
        {"image_size": [96, 96], "patch_size": 24, "max_input_pixels": 1e9},
    ]
    choices = evaluate(
        """async models => { const { sizeChoices } = await import('/page/query.js');
             return [sizeChoices(models.slice(0, 1)), sizeChoices(models)]
               .map(found => found.map(({ value }) => value)); }""",
        models,
    )
    assert choices[0] == [
        "", "224", "336", "448", "672", "keep", "keep:336", "keep:448", "keep:672", "native"
    ]  # fmt: skip
    assert choices[1] == ["", "336", "672", "keep", "keep:336", "keep:672", "native"]
