"""The notice before a pod ends, as the image gives it: deploy/image/leave.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

LEAVE = Path(__file__).parents[2] / "deploy/image/leave.py"

pytestmark = pytest.mark.slow


def test_notice__has_a_checkpoint_written_and_waits_for_the_job(bench: Any, photos: Path) -> None:
    cluster = bench
    cluster.start_head(num_cpus=0)
    cluster.add_node(num_cpus=1)
    run = cluster.folder / "runs/left"
    never = ("--set", "checkpoint.every_steps=100000", "--set", "optim.warmup_steps=1")
    arguments = cluster.pretraining(photos, cluster.folder / "runs", "left", 20_000, *never)
    cluster.environment["RAY_ADDRESS"] = cluster.address
    submit = (
        "ray", "job", "submit", "--no-wait", "--submission-id", "left",
        "--address", cluster.dashboard, "--", "mimray",
    )  # fmt: skip
    cluster.finish(cluster.start(*submit, *arguments))
    cluster.wait_until((run / "metrics.jsonl").is_file)
    assert not (run / "checkpoints").exists()

    notice = cluster.start(sys.executable, str(LEAVE), "300")

    cluster.wait_until(lambda: len(list(run.glob("checkpoints/*/manifest.json"))) == 1)
    assert notice.poll() is None  # the training goes on until the node is gone
    cluster.finish(cluster.start("ray", "job", "stop", "--address", cluster.dashboard, "left"))
    cluster.finish(notice, timeout_s=400)
