"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Ray reads this when it is imported, which a test may do before any command has set it.
os.environ.setdefault("RAY_AUTH_MODE", "token")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """One local Ray of two CPUs for the whole session; gives its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone, to run DeepSpeed in; one for all, since it remembers it."""
    import torch
    import torch.distributed as dist

    from trainers.engine.deepspeed import prepare_process

    prepare_process(torch.device("cpu"))
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
