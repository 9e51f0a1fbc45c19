"""The arithmetic of what fits, on clusters of every shape."""

from __future__ import annotations

from typing import Any

import pytest

from mimray.trainers.errors import ResourceError
from mimray.tuning import capacity
from mimray.tuning.config import TrialResources

LAPTOP = [{"CPU": 2.0}]
CPUS = [{"CPU": 8.0}, {"CPU": 8.0}]
GPUS = [{"CPU": 8.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    def be(nodes: list[dict[str, float]], limits: dict[str, float] | None = None) -> None:
        found = [{"Alive": True, "Resources": node} for node in nodes]
        monkeypatch.setattr(capacity.ray, "nodes", lambda: found)
        monkeypatch.setattr(capacity, "autoscaler_limits", lambda: limits or {})

    return be


@pytest.mark.parametrize(
    ("nodes", "wanted", "trials", "concurrent", "cpus", "gpus", "at_once"),
    [
        (LAPTOP, {}, 24, None, 1, 0, 2),
        (LAPTOP, {}, 24, 1, 2, 0, 1),
        (LAPTOP, {"num_workers": 2}, 24, None, 1, 0, 1),
        (CPUS, {}, 24, None, 1, 0, 16),
        (CPUS, {}, 4, None, 4, 0, 4),
        (CPUS, {"cpus_per_worker": 3}, 24, None, 3, 0, 4),
        (CPUS, {"num_workers": 4}, 24, None, 1, 0, 4),
        (CPUS, {"num_workers": 3, "cpus_per_worker": 4}, 24, None, 4, 0, 1),
        (GPUS, {}, 24, None, 8, 1, 4),
        (GPUS, {"num_workers": 2}, 24, None, 8, 1, 2),
        (GPUS, {"gpus_per_worker": 0.25}, 24, None, 2, 0.25, 16),
        (GPUS, {"gpus_per_worker": 0.3, "cpus_per_worker": 1}, 24, None, 1, 0.3, 12),
        (GPUS, {"gpus_per_worker": 2}, 24, 1, 16, 2, 1),
    ],
)
def test_count__what_fits(
    cluster: Any, nodes: Any, wanted: Any, trials: int, concurrent: int | None,
    cpus: int, gpus: float, at_once: int,
) -> None:  # fmt: skip
    cluster(nodes)
    found = capacity.count(TrialResources(**wanted), trials, concurrent)
    assert (found.cpus, found.gpus, found.concurrent) == (cpus, gpus, at_once)


@pytest.mark.parametrize(
    ("nodes", "wanted", "concurrent", "said"),
    [
        (LAPTOP, {"num_workers": 4}, None, "4 workers x 1 CPU; the cluster has 2 CPUs"),
        (LAPTOP, {"cpus_per_worker": 4}, None, "not one trial can run"),
        (LAPTOP, {"gpus_per_worker": 1}, None, "fits 0"),
        (CPUS, {"cpus_per_worker": 9}, None, r"8 CPUs \+ 8 CPUs, which fits 0"),  # none spans two
        (CPUS, {}, 17, "--concurrent 17 cannot be"),
        (GPUS, {"gpus_per_worker": 3}, None, "not one trial"),
        (GPUS, {"gpus_per_worker": 1.5}, None, "shared by trials of one worker"),
        (GPUS, {"gpus_per_worker": 0.5, "num_workers": 2}, None, "shared by trials of one worker"),
    ],
)
def test_count__what_can_never_be_is_refused_with_the_arithmetic(
    cluster: Any, nodes: Any, wanted: Any, concurrent: int | None, said: str
) -> None:
    cluster(nodes)
    with pytest.raises(ResourceError, match=said):
        capacity.count(TrialResources(**wanted), 24, concurrent)


def test_count__a_cluster_that_grows_may_have_more_later(cluster: Any) -> None:
    cluster(LAPTOP, {"CPU": 64.0})
    assert capacity.count(TrialResources(num_workers=4), 24, None).concurrent == 16


def test_tune__a_trial_of_several_workers_holds_no_cpu_itself(cluster: Any) -> None:
    cluster(CPUS)
    assert "CPU" not in capacity.count(TrialResources(num_workers=2), 24, None).tune
    assert capacity.count(TrialResources(), 24, None).tune == {"CPU": 1}
