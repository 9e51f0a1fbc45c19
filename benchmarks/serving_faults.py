"""Answers to clients during faults of an endpoint, over minutes.

    python benchmarks/serving_faults.py [--seconds 30] [--json FILE]

Two replicas of an untrained ViT-Ti/16, a photograph as JPEG in, pooled vectors out, 8 connections
in a closed loop. Each part lasts `--seconds`: no fault, a replica killed every few seconds, HAProxy
killed once, ten times as many connections as are admitted, versions rolled in one after the other.
Printed of each: answers by status, connections lost, wrong answers, the median and the 99th
percentile of the latency of a 200, and the memory of all replicas.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

CONNECTIONS = 8
PATH = "/v1/features?model=m"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--port", type=int, default=8600)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    from mimray.serving.config import check_config
    from mimray.serving.deploy.endpoint import start
    from mimray.serving.deploy.haproxy import HAProxyState
    from mimray.serving.deploy.serve_schema import Version

    with tempfile.TemporaryDirectory() as scratch:
        bundles = [_bundle(Path(scratch) / str(seed), seed) for seed in (0, 1)]
        current = [0]

        def resolve(reference: str) -> Version:
            number = current[0]
            return Version(reference, bundles[number % 2], str(number))

        model = {"bundle": "m@champion", "replicas": 2, "device": "cpu", "cache_mib": 0,
                 "max_queue_size": 16}  # fmt: skip
        config = check_config({"port": arguments.port, "models": {"m": model}}, "benchmark")
        results = []
        with start(config, resolve) as endpoint:
            picture = _photograph()
            truths = [_pooled(bundle, picture) for bundle in bundles]

            def kill_replicas() -> None:
                replicas = _replicas()
                if replicas:
                    replicas[0].kill()
                time.sleep(min(8.0, arguments.seconds / 3))

            killed = []

            def kill_proxy() -> None:
                if not killed:
                    killed.extend(HAProxyState(arguments.port).processes())
                    for process in killed:
                        process.kill()
                time.sleep(0.5)

            def roll() -> None:
                current[0] += 1
                for line in endpoint.follow():
                    print(f"  {line}", file=sys.stderr)

            parts: list[tuple[str, int, Callable[[], None]]] = [
                ("nothing", CONNECTIONS, lambda: time.sleep(0.5)),
                ("replicas killed", CONNECTIONS, kill_replicas),
                ("HAProxy killed", CONNECTIONS, kill_proxy),
                ("overload", 10 * 2 * 16, lambda: time.sleep(0.5)),
                ("versions rolled in", CONNECTIONS, roll),
            ]
            for name, connections, disturb in parts:
                print(name, file=sys.stderr)
                result = _part(
                    endpoint.url, picture, truths, connections, arguments.seconds, disturb
                )
                results.append({"part": name, **result})
        print(_table(results))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1))


def _part(
    url: str,
    picture: bytes,
    truths: list[Any],
    connections: int,
    seconds: float,
    disturb: Callable[[], None],
) -> dict[str, Any]:
    statuses: Counter[str] = Counter()
    times: list[float] = []
    wrong = lost = 0
    numbers = count()
    stop = time.monotonic() + seconds

    def ask() -> None:
        nonlocal wrong, lost
        with httpx2.Client(base_url=url, timeout=60) as client:
            while time.monotonic() < stop:
                started = time.perf_counter()
                # No two requests are equal, since equal ones would be computed once.
                body = picture + str(next(numbers)).encode()
                try:
                    answer = client.post(PATH, content=body)
                except httpx2.TransportError:
                    lost += 1
                    time.sleep(0.1)
                    continue
                statuses[str(answer.status_code)] += 1
                if answer.status_code != 200:
                    time.sleep(0.1)
                    continue
                times.append(time.perf_counter() - started)
                found = answer.json()
                truth = truths[int(found["version"]) % 2]
                off = np.abs(np.array(found["data"][0]["pooled"]) - truth).max()
                wrong += bool(off > 1e-5)

    threads = [threading.Thread(target=ask) for _ in range(connections)]
    for thread in threads:
        thread.start()
    while time.monotonic() < stop:
        disturb()
    for thread in threads:
        thread.join()
    return {
        "statuses": dict(statuses),
        "lost": lost,
        "wrong": wrong,
        "median_ms": round(1000 * float(np.median(times)), 1) if times else None,
        "p99_ms": round(1000 * float(np.percentile(times, 99)), 1) if times else None,
        "memory_mib": round(sum(p.memory_info().rss for p in _replicas()) / 2**20),
    }


def _table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| part | answers | lost | wrong | median ms | p99 ms | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        answers = ", ".join(
            f"{count} x {status}" for status, count in sorted(row["statuses"].items())
        )
        lines.append(
            f"| {row['part']} | {answers} | {row['lost']} | {row['wrong']} | {row['median_ms']} | "
            f"{row['p99_ms']} | {row['memory_mib']} |"
        )
    return "\n".join(lines)


def _pooled(bundle: Path, picture: bytes) -> Any:
    """The model's pooled vector, computed without a server."""
    from mimray.serving.config import Limits, ReplicaConfig
    from mimray.serving.inference.options import Options
    from mimray.serving.inference.predictor import Predictor

    async def main() -> Any:
        predictor = Predictor(bundle, ReplicaConfig(device="cpu"), Limits())
        (found,) = await predictor.predict([picture], Options())
        await predictor.close()
        return found.outputs["pooled"]

    return asyncio.run(main())


def _replicas() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("ServeReplica:m:" in word for word in process.info["cmdline"] or [])
    ]


def _photograph() -> bytes:
    from PIL import Image
    from skimage import data

    file = io.BytesIO()
    Image.fromarray(data.astronaut()).save(file, "JPEG", quality=90)
    return file.getvalue()


def _bundle(folder: Path, seed: int) -> Path:
    import torch

    from mimray.trainers.bundles import BundleCard, save_bundle
    from mimray.trainers.config.model import ViTConfig
    from mimray.trainers.models import build_encoder

    torch.manual_seed(seed)
    config = ViTConfig(name="vit", width=192, depth=12, num_heads=3, patch_size=16)
    card = BundleCard(
        name="ti", encoder=config, image_size=(224, 224), channels=3,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), layers=(2, 5, 8, 11),
    )  # fmt: skip
    save_bundle(folder, card, build_encoder(config, (224, 224), 3).state_dict())
    return folder


if __name__ == "__main__":
    main()
