"""A node without memory: Ray's own monitor kills the worker, as it does before a machine hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow

# 4,096 tokens of 16 pictures through twelve layers: some 40 GB of activations.
LARGE = [
    "encoder.depth=12", "encoder.width=384", "encoder.num_heads=6", "data.image_size=512",
    "encoder.patch_size=8", "engine.micro_batch_size=16", "resources.max_failures=0",
]  # fmt: skip
ROOM_BYTES = 3 << 30


def test_node_without_memory__is_told_with_a_smaller_micro_batch(bench: Any, photos: Path) -> None:
    memory = psutil.virtual_memory()
    share = (memory.total - memory.available + ROOM_BYTES) / memory.total
    assert share < 0.9, "this machine has no room for the test"
    bench.environment["RAY_memory_usage_threshold"] = f"{share:.3f}"
    bench.environment["RAY_memory_monitor_refresh_ms"] = "50"
    bench.start_head(num_cpus=2)
    storage = bench.folder / "runs"
    large = [argument for item in LARGE for argument in ("--set", item)]

    driver = bench.pretrain(photos, storage, "large", 4, *large)

    assert driver.wait(600) == 2, bench.output(driver)
    said = bench.output(driver)
    assert "a worker's node ran out of memory with micro batches of 16 pictures" in said
    assert "--set engine.micro_batch_size=8" in said
    assert "Traceback" not in said
