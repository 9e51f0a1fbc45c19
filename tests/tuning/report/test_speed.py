from __future__ import annotations

import math

import pytest
import torch

from mimray.trainers.config.recipes import load_recipe
from mimray.tuning.report.speed import encoder_speed, token_bound

SMALL = ["encoder.depth=1", "encoder.width=32", "encoder.num_heads=2", "data.image_size=32"]


def test_encoder_speed__measures_each_ratio_and_leaves_randomness_alone():
    recipe = load_recipe("mae-tiny", SMALL)
    before = torch.random.get_rng_state()

    found = encoder_speed(recipe, [0.25, 0.75], batch=2, rounds=1)

    assert list(found) == [0.25, 0.75]
    assert all(math.isfinite(times) and times > 0 for times in found.values())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_encoder_speed__is_nothing_where_mask_tokens_take_the_place_of_hidden_ones():
    assert encoder_speed(load_recipe("simmim-swin-tiny", []), [0.5]) == {}


@pytest.mark.parametrize(("ratio", "times"), [(0.15, 197 / 167), (0.75, 197 / 50), (0.9, 197 / 20)])
def test_token_bound__counts_as_the_encoder_does(ratio: float, times: float):
    assert token_bound(ratio, 196) == pytest.approx(times)


def test_token_bound__tends_to_the_share_that_is_seen():
    assert token_bound(0.75) == 4
    assert token_bound(0.75, 10**6) == pytest.approx(4, rel=1e-5)
    assert token_bound(1.0) == math.inf
