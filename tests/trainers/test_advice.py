from __future__ import annotations

import pytest

from mimray.trainers.config.advice import advice
from mimray.trainers.config.recipes import load_recipe, shipped_recipes
from mimray.trainers.config.run import resolve
from mimray.trainers.types import DatasetFacts


def given(name: str, *overrides: str, pictures: int = 1_281_167) -> list[str]:
    return advice(resolve(load_recipe(name, overrides), DatasetFacts("here", pictures, "f"), 1))


@pytest.mark.parametrize("name", shipped_recipes())
def test_advice__has_nothing_against_shipped_recipes(name: str) -> None:
    assert given(name) == []


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        # 1.5e-4 x 64 / 256 = 3.75e-5, and 4e-4 is reached with 4e-4 x 256 / 64.
        ("optim.batch_size=64", ("3.75e-05", "batch 64 / 256", "optim.base_lr=1.6e-03")),
        # 1e-3 x 4096 / 256 = 0.016, and 2.4e-3 is reached with 2.4e-3 x 256 / 4096.
        ("optim.base_lr=1e-3", ("0.016", "likely to diverge", "optim.base_lr=1.5e-04")),
        ("engine.precision=fp16", ("65504", "engine.precision=bf16")),
        ("optim.epochs=60", ("12511 of 18767 steps", "optim.warmup_steps=1876")),
    ],
)
def test_advice__warns_with_the_numbers(override: str, wanted: tuple[str, ...]) -> None:
    (warning,) = given("mae-vit-b", override)
    for part in wanted:
        assert part in warning


def test_advice__on_a_batch_that_is_too_small_for_the_codebook() -> None:
    sizes = "method.codebook_size=1024", "optim.batch_size=32", "optim.base_lr=8e-3"

    (warning,) = given("dvae-tiny", *sizes)

    # 64 places a picture; 4 x 1024 / 64 = 64 pictures, or 32 x 64 / 4 = 512 codes.
    assert "32 x 64 places / method.codebook_size 1024 = 2 encodings a code" in warning
    assert "--set optim.batch_size=64, or --set method.codebook_size=512" in warning
    for cure in ("optim.batch_size=64", "method.codebook_size=512"):
        assert given("dvae-tiny", *sizes, cure) == []


def test_advice__on_a_batch_that_is_most_of_the_data() -> None:
    (warning,) = given("mae-tiny", pictures=128)
    assert "a global batch of 64 is 50% of the 128 pictures" in warning
    assert "2.0 updates" in warning


def test_advice__on_a_teacher_that_keeps_its_start() -> None:
    short = "optim.steps=60", "optim.warmup_steps=6"

    (warning,) = given("adapt-tiny", "method.init=start", *short)

    # The product of .98 + .02 x (1 - cos(pi k / 60)) / 2 over k = 0 to 59 is .541.
    assert "54% of the exported weights are the start's" in warning
    assert "--set method.momentum=0.833333" in warning
    assert given("adapt-tiny", "method.init=start", *short, "method.momentum=0.833333") == []
