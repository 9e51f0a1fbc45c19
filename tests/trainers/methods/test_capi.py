"""CAPI: its loss against NumPy, what is predicted and exported, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimray.trainers.bundles import load_bundle
from mimray.trainers.config.advice import advice
from mimray.trainers.config.capi import CAPIConfig
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe, resolve
from mimray.trainers.cost import estimate
from mimray.trainers.data.loader import Place, Samples
from mimray.trainers.data.sources import open_source
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.errors import CollapseError, ConfigError
from mimray.trainers.methods.capi import CAPI
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

Array = NDArray[np.float64]

VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
METHOD = {
    "name": "capi", "predict_ratio": 0.3, "num_clusters": 10, "assignment_group": 4,
    "decoder_width": 12, "decoder_depth": 2, "decoder_num_heads": 3,
}  # fmt: skip
BATCH, PLACES = 8, 24


def recipe_of(**changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": VIT,
        "method": METHOD,
        "data": {"image_size": [32, 48], "num_workers": 0},
        "optim": {"batch_size": BATCH, "steps": 4},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse_recipe(tree)


def capi_of(recipe: Recipe | None = None) -> CAPI:
    """A method whose teacher, predictions and clusters differ from place to place."""
    torch.manual_seed(1)
    method = build_method(recipe or recipe_of())
    assert isinstance(method, CAPI)
    assert method.averages is not None
    for name, value in (*method.named_parameters(), *method.averages.named_buffers()):
        if value.is_floating_point() and "residuals" not in name:
            value.data += 0.1 * torch.randn_like(value)
    return method.train()


def pictures(count: int = BATCH) -> Tensor:
    return torch.randn(count, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def masks(method: CAPI, count: int = BATCH) -> Tensor:
    drawn = [method.draw_mask(method.recipe, np.random.default_rng(i)) for i in range(count)]
    return torch.from_numpy(np.stack(drawn))


# The formula


def normalised(x: Array) -> Array:
    found: Array = x / np.sqrt((x**2).sum(-1, keepdims=True))
    return found


def log_shares(scores: Array, temperature: float) -> Array:
    scaled = scores / temperature
    shifted: Array = scaled - scaled.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def balanced(scores: Array, temperature: float, rounds: int) -> Array:
    """Assignments [P, K] of the pictures of one place."""
    q: Array = np.exp((scores - scores.max()) / temperature)
    for _ in range(rounds):
        q = q / q.sum(axis=0, keepdims=True)
        q = q / q.sum(axis=1, keepdims=True)
    return q


def test_loss__equals_numpy_in_fp64():
    method = capi_of(recipe_of(method={"sinkhorn_rounds": 2, "assignment_temperature": 0.2}))
    assert method.averages is not None
    images, mask = pictures(), masks(method)
    priority = torch.rand(BATCH, PLACES)

    output = method(images, mask, priority)

    weights = {n: p.detach().double().numpy() for n, p in method.named_parameters()}
    teacher = method.averages("encoder", images).tokens.double().numpy()  # B N D
    scores = normalised(teacher) @ weights["clusters.linear.weight"].T
    scores = scores + weights["clusters.linear.bias"]
    assigned = np.empty_like(scores)
    for group in (slice(0, 4), slice(4, 8)):
        for place in range(PLACES):
            assigned[group, place] = balanced(scores[group, place], 0.2, 2)
    clustering = -(assigned * log_shares(scores, 0.12)).sum(-1).mean()
    # int(24 x .65) = 15 hidden, int(15 x .3) = 4 of them predicted.
    places = np.stack(
        [np.argsort(np.where(m, p, -1))[::-1][:4] for m, p in zip(mask, priority, strict=True)]
    )
    assert mask.gather(1, torch.from_numpy(places)).all()
    with torch.no_grad():
        seen = method.encoder(images, mask)
        predicted = method.decoder(seen.tokens, seen.prefix, mask, torch.from_numpy(places))
    rows = weights["head.gain"] * normalised(weights["head.direction"])
    logits = normalised(predicted.double().numpy()) @ rows.T  # B 4 K
    target = np.take_along_axis(assigned, places[..., None], axis=1)
    prediction = -(target * log_shares(logits, 0.12)).sum(-1).mean()
    entropy = -(assigned * np.log(assigned)).sum(-1).mean() / math.log(10)
    assert output.loss.item() == pytest.approx(prediction + clustering, rel=1e-5)
    terms = {name: value.item() for name, value in output.terms.items()}
    assert terms == pytest.approx(
        {"prediction_loss": prediction, "clustering_loss": clustering, "target_entropy": entropy},
        rel=1e-5,
    )
    np.testing.assert_allclose(output.target.numpy(), target, atol=1e-5)


def test_loss__neither_part_moves_the_other():
    method = capi_of()
    output = method(pictures(), masks(method), torch.rand(BATCH, PLACES))
    named = {n: p for n, p in method.named_parameters() if p.requires_grad}

    for term, own in (("clustering_loss", True), ("prediction_loss", False)):
        found = torch.autograd.grad(
            output.terms[term], list(named.values()), retain_graph=True, allow_unused=True
        )
        moved = {n for n, g in zip(named, found, strict=True) if g is not None and g.abs().max()}
        assert moved == {n for n in named if n.startswith("clusters.") == own}


def test_assignments__no_cluster_stands_for_a_place():
    """A teacher that tells places apart but no pictures shares every patch out evenly."""
    method = capi_of()
    tokens = torch.randn(1, PLACES, 1, 16).expand(2, PLACES, 4, 16)

    clustered = method.cluster(tokens)

    torch.testing.assert_close(clustered.assigned, torch.full((2, PLACES, 4, 10), 0.1))


# What is predicted


@given(
    num_patches=st.integers(2, 1024),
    mask_ratio=st.floats(0.01, 0.99),
    predict_ratio=st.floats(0.001, 1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=100)
def test_places__are_hidden_ones_of_an_exact_number(
    num_patches: int, mask_ratio: float, predict_ratio: float, seed: int
):
    config = CAPIConfig(name="capi", mask_ratio=mask_ratio, predict_ratio=predict_ratio)
    hidden = max(1, config.num_hidden(num_patches))
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.permuted(np.tile(np.arange(num_patches) < hidden, (3, 1)), axis=1))
    method = CAPI.__new__(CAPI)
    torch.nn.Module.__init__(method)
    method.config = config

    places = method.places(mask, torch.from_numpy(rng.random(mask.shape).astype(np.float32)))

    assert places.shape == (3, max(1, int(hidden * predict_ratio)))
    assert mask.gather(1, places).all()
    assert all(len(row.unique()) == places.shape[1] for row in places)


def test_places__published_numbers():
    config = CAPIConfig(name="capi")
    assert (config.num_hidden(256), config.num_predicted(166)) == (166, 8)


def test_places__of_a_sample_are_always_the_same(tmp_path: Path):
    for name in "ab":
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / f"{name}.png")
    recipe = recipe_of()
    made = [
        Samples(open_source(str(tmp_path)), recipe, inputs_of(recipe))[Place(epoch, index)].inputs
        for epoch, index in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]

    for name in ("mask", "priority"):
        assert made[0][name].shape == (PLACES,)
        np.testing.assert_array_equal(made[0][name], made[1][name])
        assert not np.array_equal(made[0][name], made[2][name])
        assert not np.array_equal(made[0][name], made[3][name])


def test_places__are_those_of_the_largest_numbers_and_all_in_evaluation():
    method = capi_of()
    mask = masks(method)
    priority = torch.rand(BATCH, PLACES)

    chosen = method.places(mask, priority)
    everything = method.eval().places(mask, priority)

    for b in range(BATCH):
        hidden = priority[b][mask[b]]
        assert priority[b][chosen[b]].min() == hidden.sort(descending=True).values[3]
    assert torch.equal(everything, mask.nonzero()[:, 1].reshape(BATCH, 15))


def test_prediction__knows_nothing_of_hidden_pixels():
    method = capi_of().eval()
    images, mask = pictures(4), masks(method, 4)
    other = images.clone()
    hidden = mask.reshape(4, 1, 4, 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other[hidden.expand_as(other)] = 0.0

    one, two = method(images, mask), method(other, mask)

    torch.testing.assert_close(one.prediction, two.prediction)
    assert (one.target - two.target).abs().max() > 0.01


# Through a run


def facts(count: int = 100) -> DatasetFacts:
    return DatasetFacts("here", count, "f1")


def test_bundle__has_the_teacher(tmp_path: Path):
    recipe = recipe_of()
    method = capi_of(recipe).eval()
    assert method.averages is not None
    state = {name: value.detach().float() for name, value in method.state_dict().items()}
    plan = resolve(recipe, facts(), 1)
    write_bundle(RunDir(str(tmp_path / "run")), plan, state, step=1, name="a", command="test")

    encoder = load_bundle(tmp_path / "run")

    images = pictures(2)
    found, ours = encoder(images).tokens, method.averages("encoder", images).tokens
    torch.testing.assert_close(found, ours)
    assert (found - method.encoder(images).tokens).abs().max() > 0.01


def test_collapse__of_the_teacher_ends_the_run_with_the_reason():
    method = capi_of(recipe_of(method={"collapse_steps": 3}))
    images = pictures(1).expand(BATCH, -1, -1, -1)
    for step in (1, 2):
        method(images, masks(method))
        assert method.after_step(step)["output_std_share"] < 0.01
    method(images, masks(method))
    with pytest.raises(CollapseError, match=r"step 3: .*method\.min_std_share 0\.01 for 3 steps"):
        method.after_step(3)


def test_panels__show_the_teachers_clusters_and_predicted_ones_where_hidden():
    method = capi_of().eval()
    images, mask = pictures(3), masks(method, 3)
    with torch.no_grad():
        panels = method.panels(images, method(images, mask))

    titles = [panel.title for panel in panels]
    assert titles == ["original", "masked", "teacher's tokens", "teacher's clusters",
                      "predicted clusters"]  # fmt: skip
    assert {panel.pixels.shape for panel in panels} == {(3, 32, 48, 3)}
    theirs, ours = panels[3].pixels, panels[4].pixels
    visible = (~mask).reshape(3, 4, 6).repeat_interleave(8, 1).repeat_interleave(8, 2).numpy()
    np.testing.assert_array_equal(ours[visible], theirs[visible])
    assert (ours[~visible] != theirs[~visible]).any()
    colours = {tuple(c) for c in theirs.reshape(-1, 3)}
    assert {tuple(c) for c in ours.reshape(-1, 3)} <= colours
    assert 1 < len(colours) <= 10


@pytest.mark.parametrize("name", ["capi-tiny", "capi-vit-s", "capi-vit-b"])
def test_recipe__is_planned_with_the_work_that_is_done(name: str):
    recipe = load_recipe(name)
    plan = resolve(recipe, facts(10**6), 8 if name == "capi-vit-b" else 1)
    assert not [line for line in advice(plan) if "cluster" in line]

    cost = estimate(plan, "bf16")

    flops = cost.plain.forward_flops
    assert set(flops) == {"encoder", "decoder", "head", "teacher", "clusters"}
    # Four patches of ten are seen by the student.
    assert 0.2 < flops["encoder"] / flops["teacher"] < 0.45
    num_places = recipe.grid[0] * recipe.grid[1]
    width, config = recipe.encoder.width, recipe.method  # type: ignore[union-attr]
    assert isinstance(config, CAPIConfig)
    assert flops["clusters"] == pytest.approx(2 * num_places * width * config.num_clusters)
    predicted = config.num_predicted(config.num_hidden(num_places))
    products = 2 * predicted * config.decoder_width * config.num_clusters
    assert flops["head"] == pytest.approx(products)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"name": "conv", "widths": [8, 8, 8], "depth": 1}}, "hides tokens"),
        (
            {"encoder": {"name": "swin", "width": 8, "depths": [1, 1], "num_heads": [1, 2],
                         "patch_size": 4, "window_size": 2}},
            "leaves hidden patches out",
        ),
        ({"encoder": VIT | {"positions": "none"}}, "positions of its own"),
        ({"data": {"image_size": 8}}, r"hides int\(1 x 0\.65\) = 0 of the 1 patches"),
        ({"method": METHOD | {"mask_ratio": 0.04}}, r"hides int\(24 x 0\.04\) = 0 of the 24"),
        ({"method": METHOD | {"mask_ratio": 1.0}}, r"method\.mask_ratio"),
        ({"method": METHOD | {"predict_ratio": 0}}, r"method\.predict_ratio"),
        ({"method": METHOD | {"assignment_group": 1}}, r"method\.assignment_group"),
        ({"method": METHOD | {"decoder_width": 10}}, r"method\.decoder_width 10"),
        ({"method": METHOD | {"momentum": 1.0}}, "keeps the teacher at its start"),
        ({"method": METHOD | {"momentum": {"start": 0.9, "end": 1.2}}}, "between 0 and 1"),
    ],
)  # fmt: skip
def test_recipe__that_cannot_work_is_refused(changes: dict[str, Any], message: str):
    tree = {
        "encoder": VIT, "method": METHOD, "data": {"image_size": [32, 48]},
        "optim": {"batch_size": BATCH, "steps": 4},
    } | changes  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": {"num_clusters": 97}},
            r"num_clusters 97 is more .*method\.assignment_group 4 pictures x 24 places = 96 .*"
            r"num_clusters=96",
        ),
        (
            {"method": {"assignment_group": 3}},
            r"normalises over 3 pictures.* 8 x 1 = 8 pictures.*optim\.batch_size=6, a multiple",
        ),
        (
            {"method": {"assignment_group": 16}},
            r"normalises over 16 pictures.* 8 x 1 = 8 pictures.*optim\.batch_size=16, a multiple",
        ),
        (
            {"engine": {"micro_batch_size": 2}},
            r"normalises over 4 pictures.* 2 x 1 = 2 pictures.*another engine\.micro_batch_size",
        ),
    ],
)
def test_plan__that_cannot_work_is_refused_with_the_arithmetic(
    changes: dict[str, Any], message: str
):
    engine = changes.pop("engine", {})
    recipe = recipe_of(**changes)
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update=engine)})
    with pytest.raises(ConfigError, match=message):
        resolve(recipe, facts(), 1)


def test_plan__warns_of_a_teacher_that_keeps_its_start():
    slow = recipe_of(method={"momentum": {"warmup_start": 1, "warmup_steps": 4, "start": 0.5}})
    found = [line for line in advice(resolve(slow, facts(), 1)) if "method.momentum" in line]
    # Of weights 1, .875, .75 and .625 at the four updates.
    assert found[0].startswith("method.momentum averages over longer than the run: 41% of the")
    quick = recipe_of(method={"momentum": 0.1})
    assert not any("method.momentum" in line for line in advice(resolve(quick, facts(), 1)))


def test_plan__warns_of_more_clusters_than_a_group_tells_apart():
    plan = resolve(recipe_of(method={"num_clusters": 90}), facts(), 1)
    assert any("shared out among 22.5 clusters" in line for line in advice(plan))
