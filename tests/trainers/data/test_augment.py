"""Augmentation for fine-tuning is counted: RandAugment and random erasing, against timm."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.erasing import erase
from mimray.trainers.data.loader import Place, Samples, make_loader
from mimray.trainers.data.rng import Stream, generator, global_generators
from mimray.trainers.data.selection import Selection, open_training, with_classes
from mimray.trainers.data.sources import open_source
from mimray.trainers.data.transforms import auto_augment
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.methods.catalogue import inputs_of

POLICY = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures of each of three classes."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for number in range(7):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def plan_of(folder: Path, world_size: int = 1, **data: object) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 8, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {"name": "finetune"},
            "data": {"image_size": 16, "num_workers": 0, "auto_augment": POLICY, **data},
            "optim": {"batch_size": 8, "steps": 6},
        }
    )
    source = open_training(str(folder), recipe)
    return resolve(with_classes(recipe, source), source.facts, world_size)


def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_auto_augment__is_timms_with_the_samples_own_numbers():
    image = picture()
    hyperparameters = {"translate_const": int(32 * 0.45), "img_mean": (124, 116, 104),
                       "interpolation": Image.Resampling.BICUBIC}  # fmt: skip
    theirs = rand_augment_transform(POLICY, hyperparameters)
    changed = 0

    for index in range(10):
        found = auto_augment(generator(1, Stream.VIEW, 0, index), image, POLICY, MEAN, "bicubic")
        with global_generators(generator(1, Stream.VIEW, 0, index)):
            wanted = theirs(image)

        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
        changed += not np.array_equal(np.asarray(found), np.asarray(image))
    assert changed > 5


def test_auto_augment__leaves_global_generators_as_they_were():
    random.seed(7)
    np.random.seed(7)
    alone = random.random(), np.random.rand()
    random.seed(7)
    np.random.seed(7)

    auto_augment(generator(1, Stream.VIEW, 0, 0), picture(), POLICY, MEAN, "bicubic")

    assert (random.random(), np.random.rand()) == alone


def test_views__the_same_place_is_the_same_pixels_and_another_epoch_is_not(data: Path):
    plan = plan_of(data)
    views = Samples(open_source(str(data)), plan.recipe, inputs_of(plan.recipe))
    plain = Samples(
        open_source(str(data)),
        plan_of(data, auto_augment="").recipe,
        inputs_of(plan_of(data, auto_augment="").recipe),
    )

    first, again, later = (views[Place(epoch, 4)] for epoch in (0, 0, 1))

    np.testing.assert_array_equal(first.inputs["images"], again.inputs["images"])
    assert not np.array_equal(first.inputs["images"], later.inputs["images"])
    assert any(
        not np.array_equal(views[Place(0, i)].inputs["images"], plain[Place(0, i)].inputs["images"])
        for i in range(21)
    )


@pytest.mark.parametrize("policy", ["m9", "rand-x3", "rand-m", "augmix-m3"])
def test_auto_augment__another_form_is_refused(policy: str, data: Path):
    with pytest.raises(ConfigError, match=r"data\.auto_augment"):
        plan_of(data, auto_augment=policy)


def erased(count: int, epoch: int = 0, first: int = 0, probability: float = 1.0) -> torch.Tensor:
    images = torch.full((count, 3, 40, 48), 9.0)
    indices = np.arange(first, first + count)
    epochs = np.full(count, epoch)
    return erase(images, probability, seed=5, epochs=epochs, indices=indices)


def test_erase__is_counted_by_sample():
    together, alone = erased(6), torch.cat([erased(1, first=i) for i in range(6)])

    assert torch.equal(together, alone)
    assert not torch.equal(together, erased(6, epoch=1))


def test_erase__rectangles_and_noise_are_distributed_as_timms():
    count = 1500
    found = erased(count)
    torch.manual_seed(0)
    random.seed(0)
    theirs = RandomErasing(1.0, mode="pixel", device="cpu")(torch.full((count, 3, 40, 48), 9.0))

    for images in (found, theirs):
        gone = (images != 9.0).all(dim=1)  # B H W
        noise = images.permute(0, 2, 3, 1)[gone]
        assert noise.mean().abs() < 0.01
        assert abs(noise.std() - 1) < 0.01
    areas = [(images != 9.0).all(dim=1).float().mean(dim=(1, 2)) for images in (found, theirs)]
    assert areas[0].min() > 0.015
    assert areas[0].max() < 0.35
    shares = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(
        areas[0].quantile(shares), areas[1].quantile(shares), atol=0.02, rtol=0
    )
    rows = [(images != 9.0).all(dim=1).any(dim=2).float().sum(dim=1) for images in (found, theirs)]
    assert abs(rows[0].mean() - rows[1].mean()) < 0.7


def test_erase__as_often_as_asked():
    hit = (erased(2000, probability=0.25) != 9.0).flatten(1).any(dim=1)

    assert abs(hit.float().mean() - 0.25) < 0.03


@pytest.mark.parametrize("world_size", [1, 2])
def test_loader__labels_are_those_of_the_pictures(world_size: int, data: Path):
    plan, source = plan_of(data, world_size), open_source(str(data))
    wanted = source.labels()
    assert wanted is not None

    for rank in range(world_size):
        for batch in make_loader(source, plan, inputs_of(plan.recipe), rank=rank):
            assert batch.inputs["labels"] is not None
            assert batch.inputs["labels"].dtype == torch.int64
            np.testing.assert_array_equal(batch.inputs["labels"], wanted[batch.indices])


def test_loader__a_stand_in_brings_its_own_label(data: Path, tmp_path: Path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
    (tmp_path / "ant/0.png").write_bytes(b"broken")
    shutil.copy(data / "bee/0.png", tmp_path / "bee/0.png")
    views = Samples(
        open_source(str(tmp_path)), plan_of(data).recipe, inputs_of(plan_of(data).recipe)
    )

    sample = views[Place(0, 0)]

    assert sample.inputs["labels"] == 1
    assert "the next picture stands in" in sample.problems[0]


def test_open_training__a_limit_is_evenly_spread_and_another_dataset(data: Path):
    plan = plan_of(data, limit=9)
    source = open_training(str(data), plan.recipe)
    whole = open_source(str(data))

    assert (len(source), plan.data.num_samples, int(source.group_rows.sum())) == (9, 9, 9)
    others = {whole.facts.fingerprint, plan_of(data, limit=10).data.fingerprint}
    assert plan.data.fingerprint not in others
    np.testing.assert_array_equal(np.bincount(source.labels()), [3, 3, 3])
    indices = np.arange(9) * 21 // 9
    assert [source.name(i) for i in range(9)] == [whole.name(int(i)) for i in indices]
    assert source[4].image == whole[int(indices[4])].image


def test_selection__row_groups_shrink_with_what_is_left(data: Path):
    whole = open_source(str(data))
    whole.group_rows = np.array([7, 7, 7])

    part = Selection(whole, np.array([1, 2, 6, 14, 20]))

    assert part.group_rows.tolist() == [3, 2]


def test_with_classes__number_and_names_come_from_the_data(data: Path):
    method = plan_of(data).recipe.method

    assert (method.num_classes, method.class_names) == (3, CLASSES)


def test_open_training__refuses_what_has_no_class(data: Path, tmp_path: Path):
    recipe = plan_of(data).recipe
    few = recipe.model_copy(update={"method": recipe.method.model_copy(update={"num_classes": 2})})

    with pytest.raises(DataError, match=r"cat/0\.png has label 2, .* so it is with 6 more"):
        open_training(str(data), few)
    skipping = few.model_copy(update={"data": few.data.model_copy(update={"bad_labels": "skip"})})
    assert len(open_training(str(data), skipping)) == 14
    picture().save(tmp_path / "flat.png")
    with pytest.raises(DataError, match="has no labels"):
        open_training(str(tmp_path), recipe)
