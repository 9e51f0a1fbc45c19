from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mimray.trainers.config.run import Plan, Recipe, parse_recipe, resolve
from mimray.trainers.data import loader
from mimray.trainers.data.loader import MAX_SUBSTITUTES, MicroBatches, Place, Samples, make_loader
from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.data.views import make_inputs
from mimray.trainers.errors import DataError
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.types import Batch

NUM_PICTURES = 45  # no multiple of the batch, so that batches cross the end of an epoch


def encoded(number: int, kind: str = "PNG") -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (20 + number % 7, 24 + number % 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write(folder: Path, broken: tuple[int, ...] = ()) -> Source:
    images = [encoded(i)[: 200 if i in broken else None] for i in range(NUM_PICTURES)]
    table = pa.table({"image": [{"bytes": b, "path": f"{i}.png"} for i, b in enumerate(images)]})
    folder.mkdir()
    pq.write_table(table, folder / "part-0.parquet", row_group_size=7)
    return open_source(str(folder))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write(tmp_path_factory.mktemp("loader") / "data")


def recipe_of(batch_size: int = 8, micro: int = 4, **data: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": {"name": "vit_tiny", "depth": 1, "patch_size": 4},
            "method": {"name": "mae"},
            "data": {"image_size": 16, "num_workers": 0, "shuffle_window": 14, **data},
            "optim": {"batch_size": batch_size, "steps": 12},
            "engine": {"micro_batch_size": micro},
            "seed": 11,
        }
    )


def plan_of(source: Source, world_size: int = 1, micro: int = 4, **data: Any) -> Plan:
    return resolve(recipe_of(micro=micro, **data), source.facts, world_size)


def batches(source: Source, plan: Plan, **where: int) -> list[Batch]:
    found = list(make_loader(source, plan, inputs_of(plan.recipe), **where))
    steps = plan.steps - where.get("first_step", 0)
    assert len(found) == steps * plan.accumulation
    return found


def whole(parts: list[Batch]) -> Batch:
    return Batch(
        inputs={name: torch.cat([part.inputs[name] for part in parts]) for name in parts[0].inputs},
        indices=np.concatenate([part.indices for part in parts]),
        epoch=np.concatenate([part.epoch for part in parts]),
        problems=tuple(problem for part in parts for problem in part.problems),
    )


def assert_same(a: Batch, b: Batch) -> None:
    np.testing.assert_array_equal(a.indices, b.indices)
    np.testing.assert_array_equal(a.epoch, b.epoch)
    assert a.inputs["mask"] is not None
    assert b.inputs["mask"] is not None
    assert torch.equal(a.inputs["mask"], b.inputs["mask"])
    assert torch.equal(a.inputs["images"], b.inputs["images"])
    assert a.problems == b.problems


@pytest.mark.parametrize(("world_size", "micro"), [(2, 4), (2, 2), (4, 1), (1, 8)])
def test_loader__global_batches_are_those_of_one_worker(
    source: Source, world_size: int, micro: int
):
    alone = whole(batches(source, plan_of(source)))
    plan = plan_of(source, world_size, micro)
    ranks = [batches(source, plan, rank=rank) for rank in range(world_size)]

    n = plan.accumulation
    together = [
        part for s in range(plan.steps) for rank in ranks for part in rank[s * n : s * n + n]
    ]

    assert_same(whole(together), alone)


def test_loader__epochs_follow_without_a_seam(source: Source):
    seen = whole(batches(source, plan_of(source)))

    assert (seen.inputs["images"].dtype, tuple(seen.inputs["images"].shape)) == (
        torch.uint8,
        (96, 3, 16, 16),
    )
    assert seen.epoch.tolist() == [0] * 45 + [1] * 45 + [2] * 6
    assert sorted(seen.indices[:45]) == sorted(seen.indices[45:90]) == list(range(45))
    assert not np.array_equal(seen.indices[:45], seen.indices[45:90])
    # Another epoch is another view and another mask of the same picture.
    first, second = 0, 45 + int(np.flatnonzero(seen.indices[45:90] == seen.indices[0])[0])
    assert not torch.equal(seen.inputs["images"][first], seen.inputs["images"][second])
    assert not torch.equal(seen.inputs["mask"][first], seen.inputs["mask"][second])


@pytest.mark.parametrize("first_step", [1, 5, 11, 12])
def test_loader__a_later_first_step_gives_the_same_later_batches(source: Source, first_step: int):
    plan = plan_of(source, 2, 2)

    run = batches(source, plan, rank=1)
    resumed = batches(source, plan, rank=1, first_step=first_step)

    for before, after in zip(run[first_step * plan.accumulation :], resumed, strict=True):
        assert_same(before, after)


def test_loader__decode_processes_change_nothing(source: Source):
    here = batches(source, plan_of(source), first_step=6)
    elsewhere = batches(source, plan_of(source, num_workers=1), first_step=6)

    for a, b in zip(here, elsewhere, strict=True):
        assert_same(a, b)


def test_loader__without_room_in_shared_memory_batches_go_through_a_pipe(
    source: Source, monkeypatch: pytest.MonkeyPatch
):
    here = batches(source, plan_of(source), first_step=6)
    samples = [
        Samples(source, plan_of(source).recipe, inputs_of(plan_of(source).recipe))[Place(0, i)]
        for i in range(4)
    ]
    monkeypatch.setattr(loader, "get_worker_info", lambda: "a decode process")
    monkeypatch.setattr(loader, "free_shared_memory", lambda: 2**40)
    shared = loader.collate(samples)
    monkeypatch.setattr(loader, "free_shared_memory", lambda: 1 << 10)
    piped = loader.collate(samples)
    assert all(isinstance(value, torch.Tensor) for value in shared.inputs.values())
    assert all(isinstance(value, np.ndarray) for value in piped.inputs.values())
    for a, b in zip(here, batches(source, plan_of(source), first_step=6), strict=True):
        assert_same(a, b)


def test_loader__seed_decides(source: Source):
    plan = plan_of(source)
    other = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"seed": 12})})

    ours, theirs = whole(batches(source, plan)), whole(batches(source, other))

    assert not np.array_equal(ours.indices, theirs.indices)


def test_loader__grayscale_and_no_mask(source: Source):
    plan = plan_of(source, channels=1)

    batch = next(make_loader(source, plan, inputs_of(plan.recipe)))

    assert tuple(batch.inputs["images"].shape) == (4, 1, 16, 16)
    assert "mask" in batch.inputs


def test_loader__the_next_picture_stands_in_for_a_broken_one(tmp_path: Path, source: Source):
    damaged = write(tmp_path / "data", broken=(3, 4))
    plan = plan_of(damaged)
    kept = whole(batches(source, plan_of(source)))

    found = whole(batches(damaged, plan))

    np.testing.assert_array_equal(found.indices, kept.indices)
    assert torch.equal(found.inputs["mask"], kept.inputs["mask"])
    sound = ~np.isin(kept.indices, (3, 4))
    assert torch.equal(found.inputs["images"][sound], kept.inputs["images"][sound])
    times = {i: int((kept.indices == i).sum()) for i in (3, 4)}
    # Number 3 meets number 4 on its way to number 5.
    named = [[row in p for p in found.problems].count(True) for row in ("row 3:", "row 4:")]
    assert named == [times[3], times[3] + times[4]]
    assert all("the next picture stands in" in p and "truncated" in p for p in found.problems)


def test_loader__a_broken_picture_ends_the_run_where_asked(tmp_path: Path):
    damaged = write(tmp_path / "data", broken=(3,))

    with pytest.raises(DataError, match=r"part-0\.parquet row group 0 row 3.*substitute"):
        batches(damaged, plan_of(damaged, on_bad="fail"))


def test_loader__too_many_broken_in_a_row_is_an_error(tmp_path: Path):
    damaged = write(tmp_path / "data", broken=tuple(range(20)))

    with pytest.raises(DataError, match=f"{MAX_SUBSTITUTES + 1} pictures in a row"):
        batches(damaged, plan_of(damaged))


def test_loader__a_seek_reads_nothing_of_what_is_skipped(source: Source, taped: Any):
    batch = next(
        make_loader(taped, plan_of(source), inputs_of(plan_of(source).recipe), first_step=9)
    )

    assert taped.read == batch.indices.tolist()


def test_micro_batches__can_be_gone_through_again(source: Source):
    plan = plan_of(source)
    order = SampleOrder(source.group_rows, 11, 14)
    sampler = pickle.loads(pickle.dumps(MicroBatches(plan, order, rank=0, first_step=10)))

    def places() -> Iterator[tuple[int, int]]:
        return ((p.epoch, p.index) for batch in sampler for p in batch.places)

    assert list(places()) == list(places())
    assert len(sampler) == 4


def test_loader__draft_decoding_of_large_jpegs_is_close_to_full(tmp_path: Path):
    ramp = np.linspace(0, 255, 512)
    pixels = np.stack([np.add.outer(ramp, ramp) / 2] * 3, axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "ramp.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "ramp.png")
    source = open_source(str(tmp_path))
    views = Samples(source, recipe_of(batch_size=1), inputs_of(recipe_of(batch_size=1)))

    # The crop is drawn by place: both are cut alike.
    jpeg, png = (
        make_inputs(
            views.inputs, views.pictures[i], seed=views.recipe.seed, epoch=0, index=0, channels=3
        )["images"]
        for i in (0, 1)
    )

    assert jpeg.shape == png.shape == (3, 16, 16)
    assert np.abs(jpeg.astype(int) - png.astype(int)).max() <= 4
