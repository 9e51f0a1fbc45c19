"""Prometheus metrics, counted in each replica and exposed by Ray's agent of each node.

Ray puts `ray_` before every name and `_total` after counters. The endpoint's `/metrics` asks the
agents and gives these beside Ray Serve's own.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

FAMILIES = ("ray_mimray_", "ray_serve_")
"""Prefixes of the metrics that `/metrics` gives."""

_SECONDS = (
    0.001, 0.002, 0.004, 0.007, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.4, 0.6,
    1.0, 1.5, 2.5, 4.0, 6.0, 10.0, 15.0, 25.0, 40.0, 60.0,
)  # fmt: skip
_PICTURES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_BYTES = tuple(float(4**power) for power in range(5, 15))
_TIMEOUT_S = 5.0
_NAME = re.compile(r"# (?:HELP|TYPE) (\S+)")


class Kind(NamedTuple):
    """One metric.

    Attributes:
        type: `counter`, `gauge` or `histogram`.
        text: the description.
        labels: names of the labels beside `model` and `version`.
        buckets: upper bounds of a histogram's buckets.
    """

    type: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


KINDS = {
    "mimray_requests": Kind("counter", "Requests answered", ("operation", "status")),
    "mimray_request_seconds": Kind(
        "histogram", "From a request read to its answer made", ("operation",), _SECONDS
    ),
    "mimray_phase_seconds": Kind(
        "histogram",
        "Parts of a request: queue, decode, batch_wait, model, encode",
        ("phase",),
        _SECONDS,
    ),
    # Ray computes a histogram's sum from the middles of its buckets; these are exact.
    "mimray_phase_spent_seconds": Kind("counter", "Time that requests spent", ("phase",)),
    "mimray_pictures": Kind("counter", "Pictures answered", ("operation",)),
    "mimray_batch_pictures": Kind("histogram", "Pictures in a pass", (), _PICTURES),
    "mimray_batched_pictures": Kind("counter", "Pictures in all passes"),
    "mimray_pixels": Kind("counter", "Pixels of the model's input"),
    "mimray_waiting_pictures": Kind("gauge", "Pictures admitted and not yet answered"),
    "mimray_rejections": Kind("counter", "Requests refused", ("reason",)),
    "mimray_cache_requests": Kind("counter", "Requests by whether they were kept", ("result",)),
    "mimray_answer_bytes": Kind("histogram", "Bytes of an answer", (), _BYTES),
}


class Metrics:
    """The metrics of one version of one model; outside Ray nothing is counted.

    Args:
        model: the model's name.
        version: the model's version.
    """

    def __init__(self, model: str, version: str) -> None:
        self._tags = {"model": model, "version": version}
        self._kinds: dict[str, Any] = {}
        if _in_ray():
            self._kinds = {name: _made(name, kind) for name, kind in KINDS.items()}

    def request(self, operation: str, status: int, seconds: float, pictures: int) -> None:
        """Count a request that was answered."""
        self._add("mimray_requests", 1, operation=operation, status=str(status))
        self._add("mimray_request_seconds", seconds, operation=operation)
        if pictures and status < 400:
            self._add("mimray_pictures", pictures, operation=operation)

    def phase(self, name: str, seconds: float) -> None:
        """Count the seconds of a request's phase."""
        self._add("mimray_phase_seconds", seconds, phase=name)
        if seconds > 0:  # Ray refuses to count nothing
            self._add("mimray_phase_spent_seconds", seconds, phase=name)

    def batch(self, size: int, pixels: int) -> None:
        """Count a pass of the model."""
        self._add("mimray_batch_pictures", size)
        self._add("mimray_batched_pictures", size)
        self._add("mimray_pixels", pixels)

    def waiting(self, pictures: int) -> None:
        """Set the number of pictures that wait."""
        self._add("mimray_waiting_pictures", pictures)

    def rejected(self, reason: str) -> None:
        """Count a request that was refused."""
        self._add("mimray_rejections", 1, reason=reason)

    def cache(self, hit: bool) -> None:
        """Count a look into the cache of answers."""
        self._add("mimray_cache_requests", 1, result="hit" if hit else "miss")

    def answer_bytes(self, size: int) -> None:
        """Count the bytes of an answer."""
        self._add("mimray_answer_bytes", size)

    def _add(self, name: str, value: float, **labels: str) -> None:
        kind = self._kinds.get(name)
        if kind is None:
            return
        tags = {**self._tags, **labels}
        if KINDS[name].type == "counter":
            kind.inc(value, tags)
        elif KINDS[name].type == "gauge":
            kind.set(value, tags)
        else:
            kind.observe(value, tags)


def _made(name: str, kind: Kind) -> Any:
    from ray.util.metrics import Counter, Gauge, Histogram

    keys = ("model", "version", *kind.labels)
    if kind.type == "histogram":
        return Histogram(name, kind.text, boundaries=list(kind.buckets), tag_keys=keys)
    made = {"counter": Counter, "gauge": Gauge}[kind.type]
    return made(name, kind.text, tag_keys=keys)


async def exposition() -> str:
    """The metrics of every node, Ray Serve's included, in Prometheus' text format.

    Empty outside Ray. A node that does not answer is named in a comment. Values are up to ten
    seconds old, unless Ray was told to collect them more often (`metrics_report_interval_ms`).
    """
    if not _in_ray():
        return ""
    import httpx2
    import ray

    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]

    async def ask(client: httpx2.AsyncClient, node: dict[str, Any]) -> str:
        address, port = node["NodeManagerAddress"], node["MetricsExportPort"]
        shown = f"[{address}]" if ":" in address else address
        try:
            response = await client.get(f"http://{shown}:{port}/metrics")
            response.raise_for_status()
        except httpx2.HTTPError:
            return f"# {address} did not answer\n"
        return str(response.text)

    async with httpx2.AsyncClient(timeout=_TIMEOUT_S, trust_env=False) as client:
        return merged(await asyncio.gather(*(ask(client, node) for node in nodes)))


def merged(texts: Sequence[str]) -> str:
    """Merge expositions: each family once, with the samples of all."""
    comments: list[str] = []
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        fresh: set[str] = set()
        for line in text.splitlines():
            if found := _NAME.match(line):
                family = found[1]
                if family.startswith(FAMILIES) and family not in heads:
                    heads[family], samples[family] = [], []
                    fresh.add(family)
                if family in fresh:
                    heads[family].append(line)
            elif line.startswith("#"):
                comments.append(line)
            elif family in samples and line:
                samples[family].append(line)
    lines = comments + [line for family in heads for line in (*heads[family], *samples[family])]
    return "".join(f"{line}\n" for line in lines)


def _in_ray() -> bool:
    """True if this process belongs to a cluster; Ray is not imported for it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())
