"""A node that is about to be taken away, with notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

LIST_NODES = """
import json, os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
nodes = {n["NodeID"]: n["Resources"].get("CPU", 0) for n in ray.nodes() if n["Alive"]}
print(json.dumps(nodes))
"""


def test_drained_node__a_checkpoint_is_written_at_once(bench: Any, photos: Path) -> None:
    cluster = bench
    cluster.start_head(num_cpus=0)
    cluster.add_node(num_cpus=1)
    run = cluster.folder / "runs/drained"
    never = ("--set", "checkpoint.every_steps=100000", "--set", "optim.warmup_steps=1")
    driver = cluster.pretrain(photos, cluster.folder / "runs", "drained", 20_000, *never)

    def began() -> bool:
        assert driver.poll() is None, cluster.output(driver)
        return (run / "metrics.jsonl").is_file()

    cluster.wait_until(began)
    listed = cluster.start("python", "-c", LIST_NODES)
    nodes = json.loads(cluster.finish(listed).splitlines()[-1])
    assert not (run / "checkpoints").exists()
    [worker] = [node for node, cpus in nodes.items() if cpus]
    drain = cluster.start(
        "ray", "drain-node", "--address", cluster.address, "--node-id", worker,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a spot machine",
        "--deadline-remaining-seconds", "600",
    )  # fmt: skip
    cluster.finish(drain)
    cluster.wait_until(lambda: len(list(run.glob("checkpoints/*/manifest.json"))) == 1)
    assert driver.poll() is None  # it goes on until the node is gone
    driver.terminate()
    assert driver.wait(120) == 75, cluster.output(driver)
