"""A model that nobody asks for goes, and comes back for whoever asks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from mimray.serving.config import check_config
from mimray.serving.deploy.endpoint import Endpoint, start
from mimray.serving.deploy.haproxy import haproxy_available
from mimray.serving.deploy.serve_schema import Version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not haproxy_available(), reason="no HAProxy on this platform"),
]


@pytest.fixture
def endpoint(
    bundles: dict[str, Path], ray_session: str, free_port: Callable[[], int]
) -> Iterator[Endpoint]:
    scaling = {"min_replicas": 0, "max_replicas": 1, "idle_s": 1, "downscale_delay_s": 1}
    model = {"bundle": "alpha", "device": "cpu", "num_cpus": 0.3, "autoscaling": scaling}
    config = check_config({"port": free_port(), "models": {"m": model}}, "test")
    with start(config, lambda name: Version(name, bundles[name], "1")) as endpoint:
        yield endpoint


def _replicas() -> int:
    from ray import serve

    return sum(serve.status().applications["m"].deployments["model"].replica_states.values())


def _wait_for_none() -> None:
    deadline = time.monotonic() + 240
    while _replicas():
        assert time.monotonic() < deadline, "the last replica never went"
        time.sleep(0.2)


@pytest.mark.parametrize("path", ["/v1/features?model=m", "/v2/models/m/infer"])
def test_scaled_to_zero__comes_back_when_asked(
    endpoint: Endpoint, picture: Callable[..., bytes], path: str
) -> None:
    with httpx2.Client(base_url=endpoint.url, timeout=240) as client:
        listed = client.get("/v1/models").json()["data"]
        _wait_for_none()

        # Looking does not wake it.
        assert client.get("/v1/models").json()["data"] == listed
        assert client.post("/v2/repository/index").json()[0]["state"] == "READY"
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/v1/models/m").json()["id"] == "m"
        time.sleep(2)
        assert _replicas() == 0

        if path.startswith("/v1"):
            answer = client.post(path, content=picture(1))
        else:
            tensor = {
                "name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": [9] * 12
            }  # fmt: skip
            answer = client.post(path, json={"inputs": [tensor]})
        assert answer.status_code == 200, answer.text
        assert _replicas() == 1
