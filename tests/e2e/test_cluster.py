"""Several nodes: each is a `ray start` of its own, and goes down by SIGKILL."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

STEPS = 12

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
    cluster.finish(driver, timeout_s=280)
    cluster.kill(replacement)
    assert cluster.losses(metrics.read_bytes()) == calm


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
