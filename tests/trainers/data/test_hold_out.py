from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.data.hold_out import HoldOut, choose, validation_split
from mimray.trainers.data.selection import open_training
from mimray.trainers.data.sources import open_source


def names(count: int) -> list[str]:
    return [f"cat/{number:04}.jpg" for number in range(count)]


def test_choose__is_stratified_and_leaves_one_on_either_side() -> None:
    classes = np.repeat([0, 1, 2, 3, -1], [100, 10, 2, 1, 5])
    learnt, held = choose(names(len(classes)), HoldOut(0.2), classes)
    assert sorted([*learnt, *held]) == list(range(len(classes)))
    counts = {int(k): int(np.sum(classes[held] == k)) for k in np.unique(classes)}
    assert counts == {-1: 0, 0: 20, 1: 2, 2: 1, 3: 0}
    _, most = choose(names(2), HoldOut(0.99), np.zeros(2, dtype=np.int64))
    assert len(most) == 1


def test_choose__follows_identity_and_seed_not_the_order() -> None:
    given = names(200)
    classes = np.arange(200) % 3

    def held(order: np.ndarray, rule: HoldOut) -> set[str]:
        shuffled = [given[i] for i in order]
        return {shuffled[i] for i in choose(shuffled, rule, classes[order])[1]}

    plain, mixed = np.arange(200), np.random.default_rng(0).permutation(200)
    assert held(plain, HoldOut()) == held(mixed, HoldOut())
    assert held(plain, HoldOut()) != held(plain, HoldOut(seed=1))
    assert held(plain, HoldOut(0.1)) < held(plain, HoldOut(0.3)), "a larger share only adds"


def test_choose__equal_identities_are_parted_too() -> None:
    learnt, held = choose(["image.jpg"] * 10, HoldOut(0.3))
    assert (len(learnt), len(held)) == (7, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for kind, count in (("cat", 5), ("dog", 10)):
        for number in range(count):
            path = tmp_path / "pictures" / kind / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return tmp_path / "pictures"


def test_validation_split__a_lone_split_is_what_is_learnt_from(folder: Path) -> None:
    assert validation_split(str(folder)) is None
    (folder.parent / "one").mkdir()
    folder.rename(folder.parent / "one/test")
    assert validation_split(str(folder.parent / "one")) is None


def test_open_training__leaves_out_what_is_held_out(folder: Path) -> None:
    uri = str(folder)
    whole = open_source(uri)
    learnt, held = choose(whole.identities(), HoldOut(), whole.labels())
    assert len(held) == 3
    plain = load_recipe("mae-tiny")
    kept = load_recipe("mae-tiny", ["data.val_share=0.2"])
    assert len(open_training(uri, plain)) == 15, "nothing is held out of pre-training by default"
    source = open_training(uri, kept)
    assert [source.name(i) for i in range(len(source))] == [whole.name(int(i)) for i in learnt]
    limited = open_training(uri, load_recipe("mae-tiny", ["data.val_share=0.2", "data.limit=4"]))
    assert set(limited.identities()) < set(source.identities())


def test_open_training__holds_nothing_out_of_data_with_a_split(folder: Path) -> None:
    place = folder.parent / "split"
    for split in ("train", "val"):
        (place / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(place / split / "a.png")
        Image.new("RGB", (8, 8)).save(place / split / "b.png")
    assert len(open_training(str(place), load_recipe("mae-tiny", ["data.val_share=0.5"]))) == 2
