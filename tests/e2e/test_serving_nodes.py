"""An endpoint of two nodes with networks of their own, one of which goes away under load."""

from __future__ import annotations

import io
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil
import pytest
from PIL import Image

from mimray.serving.client import FeatureClient

pytestmark = pytest.mark.slow

KEY = "a-key-for-the-test"
NUM_CLIENTS = 4
HERE, THERE = "10.77.31.1", "10.77.31.2"
LINK = f"mr{os.getpid()}"


@pytest.fixture
def machine() -> Iterator[list[str]]:
    """A command that gives a process a network of its own, and a place for HAProxy's sockets."""
    name = f"mimray-{os.getpid()}"  # what an interrupted test left behind is in nobody's way
    commands = [
        f"ip netns add {name}",
        f"ip link add {LINK} type veth peer name there netns {name}",
        f"ip addr add {HERE}/24 dev {LINK}",
        f"ip link set {LINK} up",
        f"ip -n {name} addr add {THERE}/24 dev there",
        f"ip -n {name} link set there up",
        f"ip -n {name} link set lo up",
    ]
    try:
        for command in commands:
            if subprocess.run(command.split(), capture_output=True).returncode:
                pytest.skip(f"needs the right to {command}")
        own = 'mkdir -p /tmp/haproxy-serve && mount -t tmpfs none /tmp/haproxy-serve && exec "$@"'
        yield ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", own, "sh"]
    finally:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def picture() -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_lost_node__the_other_answers(bench: Any, photos: Path, machine: list[str]) -> None:
    storage = bench.folder / "runs"
    bench.environment["MIMRAY_API_KEY"] = KEY
    bench.ip = HERE
    bench.start_head(num_cpus=1)
    bench.finish(bench.pretrain(photos, storage, "served", 2))
    node = bench.add_node(1, *machine, ip=THERE)
    (port,) = bench.free_ports(1)
    endpoint = f"http://{HERE}:{port}"
    server = bench.mimray(
        "serve", f"photos={storage}/served/bundle", "--replicas", "2", "--host", "0.0.0.0",
        "--port", str(port),
    )  # fmt: skip

    def ready() -> bool:
        assert server.poll() is None, bench.output(server)
        try:
            return all(
                httpx2.get(f"http://{ip}:{port}/v2/health/ready").status_code == 200
                for ip in (HERE, THERE)
            )
        except httpx2.TransportError:
            return False

    bench.wait_until(ready)
    replica = next(
        child
        for child in psutil.Process(node.pid).children(recursive=True)
        if any("ServeReplica:photos" in part for part in child.cmdline())
    )
    worked_s = sum(replica.cpu_times()[:2])
    answers: list[tuple[float, float]] = []
    stop = threading.Event()

    def ask() -> None:
        """Ask without a pause; a request that is lost is sent again, as by any client of ours."""
        client = FeatureClient(endpoint, api_key=KEY, timeout_s=5)
        while not stop.is_set():
            began = time.monotonic()
            client.features(picture(), "photos")
            answers.append((began, time.monotonic()))

    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        clients = [pool.submit(ask) for _ in range(NUM_CLIENTS)]
        bench.wait_until(lambda: len(answers) > 200)
        assert sum(replica.cpu_times()[:2]) > worked_s, "the node answered nothing"
        cut = time.monotonic()
        # It says no word of its end, as a machine without power.
        subprocess.run(["ip", "link", "set", LINK, "down"], check=True)
        time.sleep(15)
        bench.kill(node)
        time.sleep(15)
        stop.set()
        for client in clients:
            client.result()  # no request failed

    lost = [began for began, ended in answers if ended - began > 5]
    assert len(lost) <= NUM_CLIENTS
    assert all(began <= cut + 1 for began in lost), "only those under way waited"
    assert sum(began > cut for began, _ in answers) > 200
    slowest_s = max(ended - began for began, ended in answers if ended - began <= 5)
    print(f"{len(answers)} requests, {len(lost)} sent again, the others in {slowest_s:.1f} s")
