"""Several nodes: each is a `ray start` of its own, and goes down by SIGKILL."""

from __future__ import annotations

import json
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
