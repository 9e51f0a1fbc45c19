"""The note that an encoder was trained on pictures that are held out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.data.hold_out import HoldOut
from mimray.trainers.data.selection import open_training
from mimray.trainers.evaluation.features.pooled import seen_before
from mimray.trainers.evaluation.score import Part, Setting
from mimray.trainers.evaluation.splits import open_splits


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(0)
    for label in "ab":
        (folder / label).mkdir()
        for number in range(10):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def encoder(place: Path, *overrides: str, **changed: Any) -> Any:
    """An encoder's card after training on the place."""
    recipe = load_recipe("mae-tiny", ["data.image_size=32", *overrides])
    trained = open_training(str(place), recipe)
    card = {
        "data_fingerprint": trained.facts.fingerprint,
        "recipe": recipe.model_dump(mode="json"),
    }
    return SimpleNamespace(untrained=False, card=lambda: SimpleNamespace(**(card | changed)))


def setting(place: Path, part: Part | None = None) -> Setting:
    return Setting(
        str(place), None, None, 0, False, "cpu", place, lambda *_: None,
        hold_out=HoldOut(0.2), part=part,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ([], "the pictures held out"),
        (["data.limit=19"], "the pictures held out"),
        (["data.val_share=0.1"], "2 of 4 pictures held out"),
        (["data.val_share=0.2"], ""),
        (["data.val_share=0.2", "data.val_seed=3"], "the pictures held out"),
    ],
)
def test_seen_before__counts_what_the_recipe_took(
    place: Path, overrides: list[str], told: str
) -> None:
    notes = seen_before(encoder(place, *overrides), open_splits(setting(place)))
    assert [note.partition("trained on ")[2].partition(", too")[0] for note in notes] == (
        [told] if told else []
    )


def test_seen_before__tells_nothing_of_other_data(place: Path, tmp_path: Path) -> None:
    splits = open_splits(setting(place))
    assert not seen_before(encoder(place, data_fingerprint="another"), splits)
    assert not seen_before(encoder(place, recipe={"unknown": 1}, data_fingerprint="x"), splits)
    assert seen_before(encoder(place, recipe={}), splits)  # all of it, by the fingerprint alone
    part = open_splits(setting(place, Part("report", 0.5, 0)))
    (note,) = seen_before(encoder(place, "data.limit=19"), part)
    assert "trained on the pictures held out" in note
