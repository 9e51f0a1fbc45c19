"""The tokenizer: its loss, its codes, and what it does when they go out of use."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import CodebookCollapseError, ConfigError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.dvae import DVAE, false_colours
from mimray.trainers.models.patches import patchify

CONV = {"name": "conv", "widths": [8, 12], "depth": 1}
VIT = {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
SWIN = {
    "name": "swin",
    "width": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "patch_size": 2,
    "window_size": 2,
}
SPHERE = {"ema_decay": 0.9, "l2_normalize": True, "kmeans_init": True, "revive_below_share": 0.1}
QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": {"beta": 0.5},
    "vq-sphere": SPHERE,
    "gumbel": {"quantizer": "gumbel", "kl_weight": 0.1},
}
EACH = pytest.mark.parametrize("options", QUANTIZERS.values(), ids=QUANTIZERS.keys())


def recipe_of(options: dict[str, Any], encoder: dict[str, Any] = CONV, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": encoder,
            "method": {
                "name": "dvae",
                "codebook_size": 16,
                "code_dim": 4,
                "decoder_widths": [12, 8],
                "decoder_blocks": 1,
                **options,
            },
            "data": {"image_size": [16, 16], **data},
            "optim": {"batch_size": 8, "steps": 10},
        }
    )


def dvae_of(recipe: Recipe, seed: int = 0) -> DVAE:
    torch.manual_seed(seed)
    method = build_method(recipe)
    assert isinstance(method, DVAE)
    return method


def images_of(recipe: Recipe, count: int = 4, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, recipe.data.channels, 4, 4, generator=rng)
    return torch.nn.functional.interpolate(coarse, recipe.data.image_size, mode="bilinear")


@EACH
def test_loss__is_the_squared_error_and_what_the_quantizer_adds(options: dict[str, Any]):
    recipe = recipe_of(options)
    method, images = dvae_of(recipe).eval(), images_of(recipe)

    out = method(images)

    error = (out.prediction.detach().double() - patchify(images, 4).double()).square().mean()
    terms = {name: float(value.detach()) for name, value in out.terms.items()}
    assert terms.pop("reconstruction") == pytest.approx(float(error), abs=1e-6)
    if options.get("quantizer") == "gumbel":
        assert terms.pop("temperature") == 1
        extra = 0.1 * terms.pop("kl")
    else:
        extra = method.config.beta * terms.pop("commitment") + terms.pop("codebook", 0)
        assert extra > 1e-4
    assert not terms
    assert out.loss.item() == pytest.approx(float(error) + extra, abs=1e-5)
    assert out.mask.all()


@EACH
@pytest.mark.parametrize("encoder", [CONV, VIT, SWIN], ids=["conv", "vit", "swin"])
@pytest.mark.parametrize(("channels", "size"), [(3, (16, 16)), (1, (8, 24))])
def test_tokenizer__goes_to_codes_and_back(
    options: dict[str, Any], encoder: dict[str, Any], channels: int, size: tuple[int, int]
):
    recipe = recipe_of(options, encoder, channels=channels, image_size=size)
    method, images = dvae_of(recipe).eval(), images_of(recipe)

    codes = method.codes(images)
    decoded = method.decode_codes(codes)

    assert codes.shape == (4, *recipe.grid)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < method.vocab_size == 16
    assert not decoded.requires_grad
    torch.testing.assert_close(
        decoded, method.reconstruct(images, method(images)), rtol=0, atol=1e-5
    )
    assert torch.equal(method.codes(images), codes)
    method.train()
    method.codes(images)
    assert not method.quantizer.counts.any()


@EACH
def test_gradient__reaches_every_parameter(options: dict[str, Any]):
    recipe = recipe_of(options)
    method = dvae_of(recipe).train()
    with torch.no_grad():
        for parameter in method.parameters():  # some start at zero
            parameter.add_(0.05 * torch.randn_like(parameter))

    method(images_of(recipe)).loss.backward()

    assert not [n for n, p in method.named_parameters() if p.grad is None or not p.grad.any()]


def steps(method: DVAE, optimizer: torch.optim.Optimizer, first: int, last: int) -> list[Any]:
    """What the loop does with a method, on one worker; the loss and figures of each step."""
    rows = []
    for step in range(first, last):
        torch.manual_seed(step)
        method.train().at_step(step, 60)
        loss = method(images_of(method.recipe, seed=step % 2)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append((loss.item(), method.after_step(step + 1)))
    return rows


@EACH
def test_loss__falls_when_the_same_batches_are_seen_again(options: dict[str, Any]):
    method = dvae_of(recipe_of(options))
    rows = steps(method, torch.optim.AdamW(method.parameters(), 3e-3), 0, 60)

    assert rows[-1][0] < 0.7 * rows[0][0]


@EACH
def test_state__continues_bit_for_bit(options: dict[str, Any]):
    recipe = recipe_of({**options, "usage_window_steps": 4})
    whole, continued = dvae_of(recipe), dvae_of(recipe, seed=1)
    optimizer = torch.optim.AdamW(whole.parameters(), 3e-3)
    other = torch.optim.AdamW(continued.parameters(), 3e-3)
    steps(whole, optimizer, 0, 6)
    continued.load_state_dict({k: v.float().clone() for k, v in whole.state_dict().items()})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    assert steps(continued, other, 6, 12) == steps(whole, optimizer, 6, 12)
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


@EACH
def test_bf16__casts_the_network_and_neither_loss_nor_averages(options: dict[str, Any]):
    recipe = recipe_of(options)
    method, images = dvae_of(recipe).bfloat16().train(), images_of(recipe)

    out = method(images.bfloat16())
    out.loss.backward()
    method.after_step(1)

    assert out.prediction.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 for term in out.terms.values())
    assert all(buffer.dtype == torch.float32 for buffer in method.quantizer.buffers())
    panels = method.eval().panels(images, out)  # the loop hands over pictures in fp32
    assert panels[-1].title == "codes"


# Collapse


def collapsing(**options: Any) -> DVAE:
    """All codes but one are far from anything."""
    method = dvae_of(recipe_of({"usage_window_steps": 3, "min_usage": 0.1, **options})).train()
    far = torch.full((16, 4), 1e3)
    far[0] = 0
    method.quantizer.codebook.replace(torch.ones(16, dtype=torch.bool), far)
    return method


def test_collapse__stops_the_run_after_a_full_window():
    method = collapsing()
    images = images_of(method.recipe)
    for step in (1, 2):
        method(images)
        figures = method.after_step(step)
    wanted = {"codebook_usage": 1 / 16, "codebook_perplexity": pytest.approx(1)}
    assert figures == wanted | {"codes_revived": 0}

    method(images)
    with pytest.raises(CodebookCollapseError) as caught:
        method.after_step(3)

    error = pickle.loads(pickle.dumps(caught.value))
    assert "1 of 16 codes (6.25%)" in str(error)
    for cure in ("ema_decay", "l2_normalize", "kmeans_init", "revive_below_share", "codebook_size"):
        assert f"method.{cure}" in str(error)
    assert error.exit_code == 1
    assert error.on_every_rank


def test_collapse__of_gumbel_names_its_own_cures():
    method = collapsing(quantizer="gumbel")
    with torch.no_grad():
        method.quantizer.to_logits.bias[0] = 1e3
    method(images_of(method.recipe))

    with pytest.raises(CodebookCollapseError, match=r"method\.temperature"):
        method.after_step(3)


def test_collapse__is_borne_where_the_recipe_says_so():
    method = collapsing(min_usage=0.0)
    method(images_of(method.recipe))

    assert method.after_step(3)["codebook_usage"] == 1 / 16


# Held-out pictures and perplexity


def even(**options: Any) -> DVAE:
    """A tokenizer whose 16 codes lie on 16 corners; each place shows one of them."""
    return dvae_of(recipe_of({"min_usage": 0.0, **options})).eval()


def said_of(codes: list[int], monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The assessment of a tokenizer that gives these codes."""
    method = even(**options)
    given = torch.tensor(codes).view(-1, 1, 1, 1)
    monkeypatch.setattr(method, "codes", lambda images: images.long()[:, 0])
    return method.assess(given.float().split(5))


def test_assess__counts_usage_and_perplexity_over_all_batches(monkeypatch: pytest.MonkeyPatch):
    found = said_of([*range(16)] * 10, monkeypatch)

    assert found.figures == {"codebook_usage": 1.0, "codebook_perplexity": pytest.approx(16)}
    assert found.warnings == ()


def test_assess__warns_of_few_codes_in_use(monkeypatch: pytest.MonkeyPatch):
    found = said_of([0, 1, 2, 3, 4, 5] * 10, monkeypatch)

    assert found.figures["codebook_usage"] == 6 / 16
    (warning,) = found.warnings
    assert "6 of 16 codes (37.5%) are used" in warning
    assert said_of([0, 1, 2, 3, 4, 5] * 10, monkeypatch, warn_usage_below=0.3).warnings == ()


def test_assess__warns_of_codes_that_are_all_in_use_and_hardly_used(
    monkeypatch: pytest.MonkeyPatch,
):
    # Usage alone would say that all is well: 100 %.
    found = said_of([0] * 4000 + [*range(16)], monkeypatch)

    assert found.figures["codebook_usage"] == 1.0
    (warning,) = found.warnings
    assert "the codes' perplexity is 1.0" in warning
    assert "method.warn_perplexity_below 10.0%" in warning


def test_assess__asks_for_no_more_codes_than_there_are_places(monkeypatch: pytest.MonkeyPatch):
    assert said_of([0, 1, 2, 3], monkeypatch).warnings == ()


def test_assess__wants_ten_encodings_a_code():
    # 16 x 10 codes over the 4 x 4 places of a picture.
    assert even().pictures_to_assess == 10


def test_perplexity__that_is_low_is_warned_of_once(caplog: pytest.LogCaptureFixture):
    method = collapsing(min_usage=0.0, usage_window_steps=2)
    for step in range(1, 9):
        method(images_of(method.recipe))
        method.after_step(step)

    (record,) = caplog.records
    assert "step 2: the codes' perplexity is 1 of 16 (6.2%)" in record.getMessage()


def test_perplexity__of_few_encodings_is_low_only_for_so_many(caplog: pytest.LogCaptureFixture):
    method = dvae_of(
        recipe_of({"codebook_size": 2048, "min_usage": 0.0, "usage_window_steps": 1})
    ).train()
    encodings = method.recipe.optim.batch_size * 16
    assert encodings < 0.1 * 2048

    method.quantizer.counts[:encodings] = 1  # a code for each is the most that can be
    method.after_step(1)

    assert not caplog.records
    method.quantizer.counts[0] = encodings
    method.after_step(2)
    assert f"perplexity is 1 of {encodings}" in caplog.text


def test_assess__holds_the_perplexity_against_the_encodings(monkeypatch: pytest.MonkeyPatch):
    assert said_of([0], monkeypatch, warn_perplexity_below=0.5).warnings == ()


# Recipes


def test_config__refuses_the_threshold_that_did_not_know_the_batch():
    with pytest.raises(ConfigError, match=r"revive_below, uses a step.*revive_below_share"):
        recipe_of({"revive_below": 2.0})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kl_weight": 1.0}, "method.kl_weight"),
        ({"quantizer": "gumbel", "ema_decay": 0.9}, "method.ema_decay"),
        ({"quantizer": "gumbel", "kmeans_init": True}, "method.kmeans_init"),
        ({"quantizer": "gumbel", "temperature": 0.01}, "min_temperature"),
    ],
)
def test_config__refuses_what_the_quantizer_would_not_look_at(options: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        recipe_of(options)


@pytest.mark.parametrize("name", ["dvae-vq-8192", "dvae-gumbel-8192"])
def test_recipes__give_beit_its_grid_and_vocabulary(name: str):
    recipe = load_recipe(name)
    method = dvae_of(recipe)

    codes = method.eval().codes(torch.zeros(1, 3, 112, 112))

    assert codes.shape == (1, 14, 14)
    assert method.vocab_size == 8192
    assert recipe.optim.betas == (0.9, 0.99)
    assert recipe.optim.weight_decay.start == pytest.approx(1e-4)


# Pictures


@EACH
def test_panels__show_the_codes_beside_the_pictures(options: dict[str, Any]):
    recipe = recipe_of(options)
    method, images = dvae_of(recipe).eval(), images_of(recipe)

    original, drawn, codes = method.panels(images, method(images))

    assert [p.title for p in (original, drawn, codes)] == ["original", "reconstruction", "codes"]
    assert original.pixels.shape == drawn.pixels.shape == codes.pixels.shape == (4, 16, 16, 3)
    cells = codes.pixels.reshape(4, 4, 4, 4, 4, 3)
    assert (cells == cells[:, :, :1, :, :1]).all()
    colours = {tuple(c) for c in cells[:, :, 0, :, 0].reshape(-1, 3)}
    assert len(colours) == len(method.codes(images).unique())


def test_false_colours__are_alike_where_codes_are():
    angle = torch.arange(64) / 64 * math.pi
    table = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0.1 * (3 * angle).cos()], dim=1)

    colours = false_colours(table).astype(int)

    assert colours.shape == (64, 3)
    assert colours.min() == 0
    assert colours.max() == 255
    neighbours = np.abs(np.diff(colours[:, 2]))
    assert neighbours.max() < 0.1 * 255
