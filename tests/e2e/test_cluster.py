"""Several nodes: each is a `ray start` of its own, and goes down by SIGKILL."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

STEPS = 12
TINY = [
    "encoder.depth=1", "optim.batch_size=16", "data.image_size=32", "checkpoint.every_steps=2",
    "logging.every_steps=1", "logging.num_pictures=2",
]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(bench: Any) -> Any:
    """A head that computes nothing, and one node of one CPU; workers need a second."""
    bench.start_head(num_cpus=0)
    bench.add_node(num_cpus=1)
    return bench


def test_lost_node__another_takes_over_and_nothing_changes(cluster: Any, photos: Path) -> None:
    storage = cluster.folder / "runs"
    node = cluster.add_node(num_cpus=1)
    cluster.finish(cluster.pretrain(photos, storage, "calm", STEPS, "--workers", "2"))
    calm = cluster.losses((storage / "calm/metrics.jsonl").read_bytes())
    assert list(calm) == list(range(1, STEPS + 1))

    metrics = storage / "lost/metrics.jsonl"

    def has_step_5() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return metrics.is_file() and metrics.read_bytes().count(b"\n") >= 5

    driver = cluster.pretrain(photos, storage, "lost", STEPS, "--workers", "2")
    cluster.wait_until(has_step_5)
    cluster.kill(node)
    assert metrics.read_bytes().count(b"\n") < STEPS, "the run was over before the node was"
    replacement = cluster.add_node(num_cpus=1)
    cluster.finish(driver, timeout_s=800)
    cluster.kill(replacement)
    assert cluster.losses(metrics.read_bytes()) == calm


def test_decoders__on_a_node_that_is_lost_change_nothing(cluster: Any, photos: Path) -> None:
    storage = cluster.folder / "runs"
    decoding = cluster.add_node(num_cpus=2)
    alike = ("--set", "resources.cpus_per_worker=1")  # as many threads, as sums depend on them
    cluster.finish(cluster.pretrain(photos, storage, "beside", STEPS, *alike))
    streamed = ("--set", "data.stream=ray", "--set", "data.num_workers=2", *alike)
    metrics = storage / "streamed/metrics.jsonl"

    def has_step_5() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return num_rows(metrics.parent) >= 5

    driver = cluster.pretrain(photos, storage, "streamed", STEPS, *streamed)
    cluster.wait_until(has_step_5)
    cluster.kill(decoding)
    assert num_rows(metrics.parent) < STEPS, "the run was over before the node was"
    replacement = cluster.add_node(num_cpus=2)
    cluster.finish(driver, timeout_s=800)
    cluster.kill(replacement)
    beside = (storage / "beside/metrics.jsonl").read_bytes()
    assert cluster.losses(metrics.read_bytes()) == cluster.losses(beside)


def workers_of(run: Path) -> set[int]:
    """Numbers of workers that wrote the run's checkpoints."""
    manifests = (run / "checkpoints").glob("*/manifest.json")
    return {json.loads(manifest.read_text())["world_size"] for manifest in manifests}


def num_rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def test_elastic_run__goes_on_with_fewer_workers_and_grows_back(cluster: Any, photos: Path) -> None:
    storage, steps = cluster.folder / "runs", 20_000
    elastic, alone = storage / "elastic", storage / "alone"
    same = ("--set", "optim.warmup_steps=1")

    def reach(driver: subprocess.Popen[bytes], run: Path, step: int, workers: int) -> None:
        """Wait until a run has so many rows, and a checkpoint of so many workers."""

        def reached() -> bool:
            assert driver.poll() is None, cluster.output(driver)
            return num_rows(run) >= step and workers in workers_of(run)

        cluster.wait_until(reached)

    def end(driver: subprocess.Popen[bytes]) -> None:
        driver.terminate()
        assert driver.wait(120) == 75, cluster.output(driver)

    node = cluster.add_node(num_cpus=1)
    between = ("--set", "resources.num_workers={min: 1, max: 2}")
    driver = cluster.pretrain(photos, storage, "elastic", steps, *same, *between)
    reach(driver, elastic, 10, workers=2)
    cluster.kill(node)
    lost_at = num_rows(elastic)
    reach(driver, elastic, lost_at + 30, workers=1)
    node = cluster.add_node(num_cpus=1)
    reach(driver, elastic, num_rows(elastic), workers=2)
    reach(driver, elastic, num_rows(elastic) + 30, workers=2)
    end(driver)
    cluster.kill(node)
    starts = "start {}, after a loss or another number of nodes: {} from step"
    assert starts.format(2, "1 worker") in cluster.output(driver)
    assert starts.format(3, "2 workers") in cluster.output(driver)

    driver = cluster.pretrain(photos, storage, "alone", steps, *same)
    reach(driver, alone, lost_at + 30, workers=1)
    end(driver)
    found, expected = (
        cluster.losses((run / "metrics.jsonl").read_bytes()) for run in (elastic, alone)
    )
    assert list(found) == list(range(1, len(found) + 1))
    for step in range(1, lost_at + 20):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


def test_elastic_run__saves_before_it_grows(cluster: Any, photos: Path) -> None:
    storage = cluster.folder / "runs"
    run = storage / "growing"
    never = ("--set", "checkpoint.every_steps=100000", "--set", "optim.warmup_steps=1")
    between = ("--set", "resources.num_workers={min: 1, max: 2}")
    driver = cluster.pretrain(photos, storage, "growing", 20_000, *never, *between)

    def has_rows() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return num_rows(run) >= 5

    cluster.wait_until(has_rows)
    assert workers_of(run) == set()
    node = cluster.add_node(num_cpus=1)

    def grew() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return "2 workers from step" in cluster.output(driver)

    cluster.wait_until(grew)
    said = re.search(r"2 workers from step (\d+)", cluster.output(driver))
    assert said is not None
    (manifest,) = (run / "checkpoints").glob("*/manifest.json")
    saved = json.loads(manifest.read_text())
    assert (saved["step"], saved["world_size"]) == (int(said[1]), 1)
    assert saved["step"] >= 5
    driver.terminate()
    assert driver.wait(120) == 75, cluster.output(driver)
    cluster.kill(node)


def test_sweep__a_lost_node_costs_no_trial(cluster: Any, photos: Path) -> None:
    storage = cluster.folder / "runs"
    node = cluster.add_node(num_cpus=1)
    sets = [
        *(f"base.set.{item}" for item in TINY), f"budget.steps={STEPS}",
        "space.method.mask_ratio={grid: [0.5, 0.75]}", "space.method.decoder_depth={grid: [1]}",
        "scheduler={name: none, num_rungs: 2}", f"score.val={photos}",
    ]  # fmt: skip
    given = [argument for item in sets for argument in ("--set", item)]
    asked = ["mae-mask-depth", "--data", str(photos), "--storage", str(storage), *given]

    def of_the_sweep(name: str) -> list[Any]:
        places = sorted((storage / name / "trials").iterdir())
        return [json.loads((place / "trial.json").read_text()) for place in places]

    cluster.finish(cluster.mimray("tune", *asked, "--name", "calm-sweep"), timeout_s=800)
    metrics = [storage / f"lost-sweep/trials/000{n}/metrics.jsonl" for n in range(2)]

    def both_are_on_their_way() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return all(m.is_file() and m.read_bytes().count(b"\n") >= 3 for m in metrics)

    driver = cluster.mimray("tune", *asked, "--name", "lost-sweep")
    cluster.wait_until(both_are_on_their_way)
    cluster.kill(node)
    cluster.finish(driver, timeout_s=800)
    calm, lost = of_the_sweep("calm-sweep"), of_the_sweep("lost-sweep")
    assert [trial["state"] for trial in lost] == ["finished"] * 2
    assert sum(trial["failures"] for trial in lost) == 1
    scores = [
        [[rung["score"] for rung in trial["rungs"]] for trial in all_] for all_ in (calm, lost)
    ]
    assert scores[0] == scores[1]
    for n, file in enumerate(metrics):
        wanted = (storage / f"calm-sweep/trials/000{n}/metrics.jsonl").read_bytes()
        assert cluster.losses(file.read_bytes()) == cluster.losses(wanted)


def test_node_with_another_disk__run_is_refused(cluster: Any, photos: Path) -> None:
    storage = cluster.folder / "local"
    storage.mkdir()
    hidden = ["unshare", "--mount", "sh", "-c"]
    if subprocess.run([*hidden, f"mount -t tmpfs none {storage}"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    mounted = f'mount -t tmpfs none {storage} && exec "$@"'
    cluster.add_node(1, *hidden, mounted, "sh")
    driver = cluster.pretrain(photos, storage, "refused", STEPS, "--workers", "2")
    driver.wait(200)
    assert driver.returncode == 2, cluster.output(driver)
    assert f"{storage}/refused is not seen from" in cluster.output(driver)
