from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.data import parquet
from mimray.trainers.errors import ConfigError, ResourceError, RunConflictError
from mimray.trainers.launch import Job, _gave_up, prepare
from mimray.trainers.preflight import WorkerResources, _fair_cpus, preflight


@pytest.fixture
def job(tmp_path: Path) -> Job:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(8):
        pixels = np.full((16, 16, 3), number * 30, np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    recipe = load_recipe("mae-tiny", ["optim.batch_size=4"], steps=2)
    return Job(recipe, str(pictures), "run", str(tmp_path / "runs"))


def test_prepare__a_continued_run_keeps_its_digest(job: Job) -> None:
    # As when a later version knows more keys, which all runs then have at their defaults.
    plan = prepare(job)
    earlier = plan.model_copy(update={"hash": "of an earlier version"})
    job.run.create()
    job.run.write("plan.json", earlier.model_dump_json().encode())

    assert prepare(job).hash == "of an earlier version"
    other = Job(
        load_recipe("mae-tiny", ["optim.batch_size=8"], steps=2), job.data, "run", job.storage
    )
    with pytest.raises(RunConflictError, match=r"optim\.batch_size: 4 -> 8"):
        prepare(other)


def test_prepare__a_cache_too_small_for_what_is_in_use_is_told_with_the_cure(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [np.random.default_rng(i).bytes(60_000) for i in range(40)]
    folder = Path(job.data).parent / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"image": images}), folder / "train.parquet", row_group_size=10)
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 100_000)
    said = {}
    for cache_mib in (1, 3):
        caplog.clear()
        recipe = load_recipe(
            "mae-tiny", ["optim.batch_size=4", f"data.cache_mib={cache_mib}"], steps=2
        )
        prepare(replace(job, recipe=recipe, data=str(folder)))
        said[cache_mib] = caplog.text
    assert "data.cache_mib is 1" in said[1]
    assert "--set data.cache_mib=3 is enough" in said[1]
    assert "cache_mib" not in said[3]


def test_prepare__a_run_of_another_order_is_not_continued(job: Job) -> None:
    earlier = prepare(job).model_copy(update={"format": 1})
    job.run.create()
    job.run.write("plan.json", earlier.model_dump_json().encode())
    with pytest.raises(RunConflictError, match="as of an earlier version of mimray"):
        prepare(job)


@pytest.mark.parametrize(
    ("nodes", "limits", "num_workers", "on_gpu", "cpus"),
    [
        ([{"CPU": 8}, {"CPU": 4}], {}, 3, False, 4),
        ([{"CPU": 16, "GPU": 2}], {}, 2, True, 8),
        # A head without GPUs, and a pool of them that is still empty.
        ([{"CPU": 4}], {"CPU": 96, "GPU": 8}, 4, True, 12),
        ([{"CPU": 2}], {"CPU": 34}, 4, False, 8),
        ([{"CPU": 2}], {}, 4, False, 1),
    ],
)
def test_cpus__of_each_worker(nodes, limits, num_workers, on_gpu, cpus) -> None:
    assert _fair_cpus(nodes, limits, num_workers, on_gpu) == cpus


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
            "micro_batch_size=2",
        ),
        ("DefaultCPUAllocator: can't allocate memory: you tried 80 bytes", "micro_batch_size=2"),
        ("Task was killed due to the node running low on memory.", "micro_batch_size=2"),
        ("The actor died unexpectedly before finishing this task.", "the same command continues"),
    ],
)
def test_gave_up__out_of_memory_is_told_with_the_cure(job: Job, words: str, cure: str) -> None:
    error = _gave_up(RuntimeError(f"Traceback\n{words}"), prepare(job), job.run)

    assert cure in str(error)
    assert isinstance(error, ResourceError) == ("micro_batch" in cure)


@pytest.mark.parametrize(
    ("micro", "there", "workers", "accumulation"),
    [("null", 4, 4, 1), ("null", 3, 2, 2), ("null", 1, 1, 4), ("1", 4, 4, 2), ("1", 3, 2, 4)],
)
def test_elastic__the_global_batch_stays_and_the_micro_batch_too(
    job: Job, micro: str, there: int, workers: int, accumulation: int
) -> None:
    sets = [
        "optim.batch_size=8", "resources.num_workers={min: 1, max: 4}",
        f"engine.micro_batch_size={micro}",
    ]  # fmt: skip
    planned = prepare(replace(job, recipe=load_recipe("mae-tiny", sets, steps=2)))

    plan = planned.for_workers(there)

    assert (planned.world_size, planned.global_batch) == (4, 8)
    assert (plan.world_size, plan.accumulation) == (workers, accumulation)
    assert plan.micro_batch_size == planned.micro_batch_size
    assert plan.hash == planned.hash


def test_elastic__groups_that_the_fewest_workers_cannot_hold_are_refused(job: Job) -> None:
    sets = [
        "optim.batch_size=8", "resources.num_workers={min: 1, max: 2}", "method.num_clusters=4",
        "method.assignment_group=8",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"8 pictures, .* 1 workers of 4 pictures do not hold"):
        prepare(replace(job, recipe=load_recipe("capi-tiny", sets, steps=2)))


def test_elastic__least_above_most_is_refused() -> None:
    with pytest.raises(ConfigError, match="min 3 is above max 2"):
        load_recipe("mae-tiny", ["resources.num_workers={min: 3, max: 2}"], steps=2)


@pytest.mark.parametrize(
    ("workers", "cpus"), [("{min: 1, max: 8}", 2), ("{min: 1, max: 2}", 4), ("2", 4)]
)
def test_preflight__workers_share_the_nodes_that_are_there(
    job: Job, monkeypatch: pytest.MonkeyPatch, workers: str, cpus: int
) -> None:
    # Of eight elastic workers four have a GPU now; the others would come with nodes of their own.
    node = {"Alive": True, "Resources": {"CPU": 8, "GPU": 4}}
    monkeypatch.setattr("mimray.trainers.preflight.ray.nodes", lambda: [node])
    monkeypatch.setattr("mimray.trainers.preflight.autoscaler_limits", dict)
    sets = ["optim.batch_size=8", f"resources.num_workers={workers}"]
    plan = prepare(replace(job, recipe=load_recipe("mae-tiny", sets, steps=2)))

    assert preflight(plan) == WorkerResources(gpus=1, cpus=cpus)


def test_preflight__fewer_than_the_least_are_refused(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mimray.trainers.preflight.ray.nodes",
        lambda: [{"Alive": True, "Resources": {"CPU": 1}}, {"Alive": False, "Resources": {}}],
    )
    monkeypatch.setattr("mimray.trainers.preflight.autoscaler_limits", dict)
    sets = ["optim.batch_size=8", "resources.num_workers={min: 2, max: 4}"]
    plan = prepare(replace(job, recipe=load_recipe("mae-tiny", sets, steps=2)))

    with pytest.raises(ResourceError, match=r"2 workers x 1 CPUs = 2 CPUs; the cluster has 1"):
        preflight(plan)


@pytest.mark.parametrize(
    ("cpus", "num_workers", "left"),
    [([16, 16], 2, 14), ([8, 2], 2, 3), ([3], 2, 1)],
)
def test_preflight__decoders_elsewhere_have_a_cpu_each(
    job: Job, monkeypatch: pytest.MonkeyPatch, cpus: list[int], num_workers: int, left: int
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": count}} for count in cpus]
    monkeypatch.setattr("mimray.trainers.preflight.ray.nodes", lambda: nodes)
    monkeypatch.setattr("mimray.trainers.preflight.autoscaler_limits", dict)
    sets = ["data.stream=ray", f"data.num_workers={num_workers}"]
    workers = len(cpus)
    recipe = load_recipe(
        "mae-tiny", ["optim.batch_size=8", f"resources.num_workers={workers}", *sets], steps=2
    )
    found = preflight(prepare(replace(job, recipe=recipe)))
    assert found == WorkerResources(gpus=0, cpus=left)


def test_preflight__decoders_that_find_no_cpu_are_refused(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2}}]
    monkeypatch.setattr("mimray.trainers.preflight.ray.nodes", lambda: nodes)
    monkeypatch.setattr("mimray.trainers.preflight.autoscaler_limits", dict)
    plan = prepare(
        replace(
            job,
            recipe=load_recipe(
                "mae-tiny", ["optim.batch_size=8", "data.stream=ray", "data.num_workers=2"], steps=2
            ),
        )
    )

    with pytest.raises(ResourceError, match=r"1 workers x \(1 CPUs \+ 2 to decode\) = 3 CPUs"):
        preflight(plan)


@pytest.mark.parametrize("value", ["0", "true", "2-8", "[1, 2]", "2.5"])
def test_workers__anything_but_a_number_or_a_range_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"resources\.num_workers: .* no range such as \{min: 2"):
        load_recipe("mae-tiny", [f"resources.num_workers={value}"], steps=2)


def test_workers__a_number_is_written_as_one() -> None:
    def written(value: str) -> object:
        recipe = load_recipe("mae-tiny", [f"resources.num_workers={value}"], steps=2)
        return recipe.model_dump(mode="json")["resources"]["num_workers"]

    assert written("2") == 2
    assert written("{min: 1, max: 4}") == {"min": 1, "max": 4}


@pytest.mark.parametrize(
    "override", ["resources.hang_timeout_s=.inf", "optim.base_lr=.nan", "optim.betas=[0.9, .inf]"]
)
def test_recipe__numbers_without_end_are_refused(override: str) -> None:
    key = override.split("=")[0].replace(".", r"\.")
    with pytest.raises(ConfigError, match=rf"'{key}' is .*: not a finite number"):
        load_recipe("mae-tiny", [override], steps=2)
