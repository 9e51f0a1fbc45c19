"""iBOT: loss, centres and teacher against formulas in NumPy and fp64; views; what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimray.trainers.config.advice import advice
from mimray.trainers.config.run import Recipe, parse_recipe, resolve
from mimray.trainers.data.loader import Place, Samples, collate
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import CollapseError, ConfigError
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.ibot import IBOT
from mimray.trainers.types import DatasetFacts

VIT = {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
SMALL = {
    "name": "ibot", "num_local": 3, "local_px": 8, "head_width": 12, "bottleneck_width": 6,
    "num_prototypes": 10,
}  # fmt: skip
K, B = 10, 4


def recipe_of(
    method: dict[str, Any] | None = None,
    encoder: dict[str, Any] | None = None,
    **data: Any,
) -> Recipe:
    return parse_recipe(
        {
            "encoder": {**VIT, **(encoder or {})},
            "method": {**SMALL, **(method or {})},
            "data": {"image_size": 16, **data},
            "optim": {"batch_size": B, "steps": 20},
        }
    )


def built(recipe: Recipe) -> IBOT:
    """A method whose every weight, teacher's and centre's included, has a value of its own."""
    torch.manual_seed(0)
    method = build_method(recipe).train()
    assert isinstance(method, IBOT)
    with torch.no_grad():
        for name, tensor in method.state_dict().items():
            if "low_steps" not in name:
                tensor += 0.2 * torch.randn(tensor.shape)
    return method


def batch_of(recipe: Recipe, pictures: int = B) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    size = recipe.data.image_size
    masks = torch.rand(2, pictures, 16, generator=rng) < 0.3
    masks[0, 0] = masks[1, 1] = False  # views without a mask
    config: Any = recipe.method
    found = {
        "images": torch.randn(pictures, 3, *size, generator=rng),
        "mask": masks[0],
        "second_images": torch.randn(pictures, 3, *size, generator=rng),
        "second_mask": masks[1],
    }
    if config.num_local:
        side = config.local_px
        found["local_images"] = torch.randn(
            pictures, config.num_local, 3, side, side, generator=rng
        )
    return found


def fp64(method: IBOT, prefix: str) -> dict[str, np.ndarray]:
    state = method.state_dict()
    return {
        name.removeprefix(prefix): value.double().numpy()
        for name, value in state.items()
        if name.startswith(prefix)
    }


def gelu(x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf)
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def scores_of(tokens: torch.Tensor, head: dict[str, np.ndarray], last: str) -> np.ndarray:
    x = tokens.detach().double().numpy()
    for layer in (0, 2, 4):
        x = x @ head[f"mlp.{layer}.weight"].T + head[f"mlp.{layer}.bias"]
        x = gelu(x) if layer < 4 else x
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    direction = head[f"{last}.direction"]
    weight = direction / np.linalg.norm(direction, axis=1, keepdims=True)
    return x @ (weight * head[f"{last}.gain"]).T if f"{last}.gain" in head else x @ weight.T


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def published(
    method: IBOT, batch: dict[str, torch.Tensor], temperatures: tuple[float, float], shared: bool
) -> dict[str, float]:
    """The loss by loops over crops as the paper has them, from the encoder's tokens."""
    patch_last = "last" if shared else "patch_last"
    teacher, student = fp64(method, "averages.head."), fp64(method, "head.")
    centre = method.centre.value.double().numpy()
    patch_centre = method.patch_centre.value.double().numpy()
    views = [batch["images"], batch["second_images"]]
    masks = [batch["mask"], batch["second_mask"]]
    taught, taught_patches, said, said_patches = [], [], [], []
    for view, mask in zip(views, masks, strict=True):
        seen = method.averages("encoder", view)
        taught.append(
            softmax((scores_of(seen.prefix[:, 0], teacher, "last") - centre) / temperatures[0])
        )
        scores = scores_of(seen.tokens, teacher, patch_last)
        taught_patches.append(softmax((scores - patch_centre) / temperatures[1]))
        seen = method.encoder(view, mask, method.mask_token)
        said.append(softmax(scores_of(seen.prefix[:, 0], student, "last") / 0.1))
        said_patches.append(softmax(scores_of(seen.tokens, student, patch_last) / 0.1))
    for k in range(3):
        seen = method.encoder(batch["local_images"][:, k])
        said.append(softmax(scores_of(seen.prefix[:, 0], student, "last") / 0.1))
    losses, patch_losses = [], []
    for q in range(2):
        for v in range(len(said)):
            if v == q:
                mask = masks[q].double().numpy()
                of_patches = -(taught_patches[q] * np.log(said_patches[q])).sum(axis=-1)
                of_views = (of_patches * mask).sum(axis=-1) / mask.sum(axis=-1).clip(min=1)
                patch_losses.append(of_views.mean())
            else:
                losses.append(-(taught[q] * np.log(said[v])).sum(axis=-1).mean())
    assert len(losses) == 2 * 4
    return {"view_loss": float(np.mean(losses)), "patch_loss": float(np.mean(patch_losses))}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("trains_gain", [True, False])
def test_loss__equals_the_published_loops_in_fp64(shared: bool, trains_gain: bool):
    recipe = recipe_of(
        {
            "shared_head": shared,
            "trains_gain": trains_gain,
            "patch_weight": 0.7,
            "temperature": {"start": 0.07, "warmup_start": 0.04, "warmup_steps": 10},
            "patch_temperature": 0.05,
        }
    )
    method, batch = built(recipe), batch_of(recipe)
    method.at_step(5, 20)
    with torch.no_grad():
        expected = published(method, batch, (0.055, 0.05), shared)
        output = method(**batch)

    assert {k: float(v) for k, v in output.terms.items()} == pytest.approx(expected, abs=1e-5)
    total = expected["view_loss"] + 0.7 * expected["patch_loss"]
    assert float(output.loss) == pytest.approx(total, abs=1e-5)
    assert torch.equal(output.mask, batch["mask"])
    assert output.prediction.shape == output.target.shape == (B, 16, 16)


def test_loss__is_the_mean_over_micro_batches():
    recipe = recipe_of()
    method, batch = built(recipe), batch_of(recipe)
    with torch.no_grad():
        whole = method(**batch).loss
        parts = [
            method(**{name: value[i : i + 1] for name, value in batch.items()}).loss
            for i in range(B)
        ]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), rel=1e-5)


def test_gradients__reach_the_student_alone_and_all_of_it():
    method = built(recipe_of())
    method(**batch_of(method.recipe)).loss.backward()
    gradients = {n: p.grad for n, p in method.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert not any(name.startswith("averages.") for name in gradients)
    assert method.mask_token.grad.abs().max() > 0
    fresh = build_method(recipe_of())
    assert not fresh.mask_token.any()


def test_centres__move_once_a_step_by_all_micro_batches():
    recipe = recipe_of({"centre_momentum": 0.8, "shared_head": False})
    method, batch = built(recipe), batch_of(recipe)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    head = fp64(method, "averages.head.")
    with torch.no_grad():
        seen = [method.averages("encoder", batch[name]) for name in ("images", "second_images")]
    means = {
        "centre": np.concatenate([scores_of(s.prefix[:, 0], head, "last") for s in seen]),
        "patch_centre": np.concatenate([scores_of(s.tokens, head, "patch_last") for s in seen]),
    }
    for i in range(2):
        method(**{name: value[2 * i : 2 * i + 2] for name, value in batch.items()})
    assert torch.equal(method.centre.value, before["centre.value"])

    method.after_step(1)

    for name, scores in means.items():
        old = before[f"{name}.value"].double().numpy()
        wanted = 0.8 * old + 0.2 * scores.reshape(-1, K).mean(axis=0)
        found = method.get_buffer(f"{name}.value").double().numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_evaluation__moves_no_centre_and_counts_for_no_figure():
    method = built(recipe_of()).eval()
    with torch.no_grad():
        method(**batch_of(method.recipe))
    assert not method.centre.sums.any()
    assert not method.watch.num_outputs.any()


def test_sinkhorn__balances_over_each_group_alone():
    recipe = recipe_of({"centring": "sinkhorn", "assignment_group": 2, "sinkhorn_rounds": 30})
    method, batch = built(recipe), batch_of(recipe)
    views = torch.stack([batch["images"], batch["second_images"]], dim=1).flatten(0, 1)
    everything = torch.ones(2 * B, 16, dtype=torch.bool)

    found = method.teach(views, everything)
    half = method.teach(views[: 2 * 2], everything[: 2 * 2])

    torch.testing.assert_close(found.views[:2], half.views, atol=1e-6, rtol=1e-5)
    patches = found.patches.unflatten(0, (2, -1))  # group 2 x 2 x 16 K
    torch.testing.assert_close(patches[0], half.patches, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.views.sum(dim=-1), torch.ones(B, 2))
    torch.testing.assert_close(
        patches.sum(dim=1), torch.full((2, K), 2 * 2 * 16 / K), rtol=0.05, atol=0
    )
    assert recipe.method.assignment_pictures == 2
    assert recipe_of().method.assignment_pictures == 1


def test_schedules__of_temperatures_and_momentum_are_the_published_ones():
    recipe = recipe_of(
        {
            "temperature": {"start": 0.07, "warmup_start": 0.04, "warmup_steps": 30},
            "patch_temperature": {"start": 0.06, "warmup_start": 0.04, "warmup_steps": 10},
            "momentum": {"start": 0.9995, "end": 1.0},
        }
    )
    method = built(recipe)
    for step in (0, 1, 10, 29, 30, 77, 100):
        method.at_step(step, 100)
        wanted = [0.04 + (t - 0.04) * min(1, step / n) for t, n in ((0.07, 30), (0.06, 10))]
        assert method.temperatures == pytest.approx(wanted)
        momentum = method.averages.momentum.at(step, 100)
        assert momentum == pytest.approx(
            1 - 0.0005 * (math.cos(math.pi * step / 100) + 1) / 2, abs=1e-12
        )


def test_teacher__begins_as_the_student_and_does_not_drop_paths():
    torch.manual_seed(0)
    method = build_method(recipe_of(encoder={"drop_path": 0.5, "depth": 3})).train()
    images = torch.randn(8, 3, 16, 16)
    first, again = (method.averages("encoder", images).tokens for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(method.encoder(images).tokens, method.encoder(images).tokens)
    torch.testing.assert_close(method.eval().encoder(images).tokens, first)


def test_masks__are_none_on_half_of_the_views_and_of_a_drawn_share_on_the_others():
    for masking in ("block", "random"):
        recipe = recipe_of({"masking": masking, "num_local": 0}, image_size=56)
        shares = np.array(
            [IBOT.draw_mask(recipe, generator(0, Stream.MASK, 0, i)).mean() for i in range(600)]
        )
        assert np.mean(shares == 0) == pytest.approx(0.5, abs=0.06)
        hidden = shares[shares > 0]
        assert hidden.max() <= 0.5 + 1 / 196
        assert hidden.mean() == pytest.approx(0.29, abs=0.03)
        if masking == "random":
            assert hidden.min() >= 0.1


def test_views__have_crops_colours_and_masks_of_their_own_and_repeat(tmp_path: Path):
    recipe = recipe_of({"jitter_share": 1.0}, crop_scale=[0.3, 1.0])
    inputs = inputs_of(recipe)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(tmp_path / f"{i}.png")
    samples = Samples(open_source(str(tmp_path)), recipe, inputs)

    def made(index: int) -> dict[str, torch.Tensor]:
        return collate([samples[Place(0, index)]]).inputs

    first, again, other = made(1), made(1), made(2)
    assert {name: tuple(value.shape) for name, value in first.items()} == {
        "images": (1, 3, 16, 16),
        "mask": (1, 16),
        "second_images": (1, 3, 16, 16),
        "second_mask": (1, 16),
        "local_images": (1, 3, 3, 8, 8),
    }
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert "mask" in name or not torch.equal(value, other[name]), name
    assert not torch.equal(first["images"], first["second_images"])
    assert not torch.equal(first["local_images"][:, 0], first["local_images"][:, 1])


def test_panels__show_both_networks_in_colours():
    method = built(recipe_of()).eval()
    batch = batch_of(method.recipe)
    with torch.no_grad():
        panels = method.panels(batch["images"], method(**batch))
    titles = [panel.title for panel in panels]
    assert titles == ["original", "masked", "teacher's tokens", "student's tokens"]
    assert {panel.pixels.shape for panel in panels} == {(B, 16, 16, 3)}
    assert panels[2].pixels.std() > 10


def test_run__that_collapses_stops_and_says_why():
    # Without a centre, without a sharper teacher, and with a teacher that is the student.
    recipe = recipe_of(
        {
            "centre_momentum": 1.0, "temperature": 0.1, "patch_temperature": 0.1,
            "collapse_steps": 5, "min_std_share": 0.05, "num_local": 0,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    method = build_method(recipe).train()
    optimizer = torch.optim.AdamW(method.parameters(), lr=0.02)
    batch = batch_of(recipe, 8)
    shares: list[float] = []

    def learn() -> None:
        for step in range(300):
            optimizer.zero_grad()
            method(**batch).loss.backward()
            optimizer.step()
            trained = dict(method.named_parameters()).items()
            followed = [(n, p) for n, p in trained if method.averages.follows(n)]
            method.averages.update(followed, momentum=0.5)
            shares.append(method.after_step(step + 1)["output_std_share"])

    with pytest.raises(CollapseError, match=r"method\.min_(std|entropy)_share") as caught:
        learn()

    assert shares[0] > 0.1
    assert "start over with --fresh" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "encoder", "data", "said"),
    [
        ({"mask_ratio": [0.5, 0.1]}, {}, {}, r"mask_ratio \[0.5, 0.1\] must rise"),
        ({"mask_ratio": [0.1, 1.0]}, {}, {}, "leaves no visible patch"),
        ({"mask_ratio": [0.01, 0.5]}, {}, {}, r"hide no patch of 16 .* is 0.0625"),
        ({"local_px": 2}, {}, {}, r"local_px 2 is not a whole number of patches of 4 .* is 4"),
        ({"local_px": 10}, {}, {}, "nearest are 8 and 12"),
        ({"local_px": 32}, {}, {}, "more than data.image_size 16x16"),
        ({"local_scale": [0.3, 0.1]}, {}, {}, "local_scale"),
        ({"blur_px": [2, 0.1]}, {}, {}, "blur_px"),
        ({"temperature": 0}, {}, {}, "temperature must be above 0"),
        ({"momentum": 1}, {}, {}, "momentum 1: a momentum is at least 0 and below 1"),
        ({"centring": "sinkhorn"}, {}, {}, "assignment_group does not say"),
        ({"assignment_group": 2}, {}, {}, "assignment_group: of no use to centring mean"),
        ({}, {"class_token": False}, {}, "pooling mean goes with it"),
    ],
)
def test_recipe__with_a_key_that_cannot_be_is_refused(
    method: dict[str, Any], encoder: dict[str, Any], data: dict[str, Any], said: str
):
    with pytest.raises(ConfigError, match=said):
        recipe_of(method, encoder, **data)


def test_plan__refuses_data_and_batches_that_are_too_small():
    with pytest.raises(ConfigError, match=r"num_prototypes 10 is more than the 9 pictures.*=4"):
        resolve(recipe_of(), DatasetFacts("here", 9, "f"), 1)
    with pytest.raises(ConfigError, match=r"log 8 / log 10 = 0\.903"):
        resolve(recipe_of({"min_entropy_share": 0.95}), DatasetFacts("here", 99, "f"), 1)
    groups = recipe_of({"centring": "sinkhorn", "assignment_group": 3})
    with pytest.raises(ConfigError, match=r"normalises over 3 pictures.*4 x 1 = 4"):
        resolve(groups, DatasetFacts("here", 99, "f"), 1)


def test_recipe__takes_one_number_for_a_ratio_that_is_not_drawn():
    assert recipe_of({"mask_ratio": 0.25}).method.mask_ratio == (0.25, 0.25)


def test_advice__warns_of_a_teacher_that_is_not_sharper():
    facts = DatasetFacts("here", 99, "f")
    said = "\n".join(advice(resolve(recipe_of({"temperature": 0.1}), facts, 1)))
    assert "method.temperature 0.1 is not below method.student_temperature 0.1" in said
    assert "student_temperature" not in "\n".join(advice(resolve(recipe_of(), facts, 1)))
