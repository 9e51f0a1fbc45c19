from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mimray.serving.telemetry.metrics import KINDS, exposition, merged

SERVE = "ray_serve_deployment_replica_healthy"
DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "mimray.json"


def test_merged__each_family_once_and_ours_alone() -> None:
    node = (
        "# HELP ray_mimray_requests_total d\n# TYPE ray_mimray_requests_total counter\n"
        'ray_mimray_requests_total{node="%s"} 1.0\n'
        "# HELP ray_tasks t\n# TYPE ray_tasks gauge\nray_tasks 3\n"
    )
    silent = "# 10.0.0.3 did not answer\n"
    assert merged([node % "a", silent, node % "b"]) == (
        "# 10.0.0.3 did not answer\n"
        "# HELP ray_mimray_requests_total d\n# TYPE ray_mimray_requests_total counter\n"
        'ray_mimray_requests_total{node="a"} 1.0\nray_mimray_requests_total{node="b"} 1.0\n'
    )


def test_metrics__nothing_outside_ray() -> None:
    """In a process of its own: this one may be in a cluster by now."""
    code = (
        "import asyncio, sys; from mimray.serving.telemetry.metrics import Metrics, exposition\n"
        "metrics = Metrics('m', '3'); metrics.request('infer', 200, 0.1, 1); metrics.batch(1, 9)\n"
        "assert asyncio.run(exposition()) == '' and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)


def test_exposition__what_a_replica_counted(ray_session: str) -> None:
    import ray
    from prometheus_client.parser import text_string_to_metric_families

    @ray.remote
    class Replica:
        def count(self) -> None:
            from mimray.serving.telemetry.metrics import Metrics

            metrics = Metrics("counted", "3")
            metrics.request("features", 200, 0.02, 4)
            metrics.phase("model", 0.012)
            metrics.phase("queue", 0.0)
            metrics.batch(3, 3 * 48 * 64)
            metrics.waiting(2)
            metrics.rejected("overloaded")
            metrics.cache(hit=True)
            metrics.answer_bytes(5000)

    replica = Replica.options(num_cpus=0).remote()  # type: ignore[attr-defined]
    ray.get(replica.count.remote())

    async def counted() -> dict[str, Any]:
        """Every family, once Ray's agent has this replica's samples of all: it gets them apart."""
        absent: set[str] = set()
        for _ in range(150):
            text = await exposition()
            families = {f.name: f for f in text_string_to_metric_families(text)}
            of_model = {
                name
                for name, family in families.items()
                if any(s.labels.get("model") == "counted" for s in family.samples)
            }
            absent = {f"ray_{name}" for name in KINDS} - of_model
            if not absent:
                return families
            await asyncio.sleep(0.2)
        raise AssertionError(f"Ray's agent never had {sorted(absent)}")

    families = asyncio.run(counted())
    for name, kind in KINDS.items():
        family = families[f"ray_{name}"]
        assert family.type == kind.type, name
        ours = [s for s in family.samples if s.labels.get("model") == "counted"]
        assert {"model", "version", *kind.labels} <= ours[0].labels.keys()

    def only(name: str) -> Any:
        (sample,) = [s for s in families[name].samples if s.labels.get("model") == "counted"]
        return sample

    requests = only("ray_mimray_requests")
    assert (requests.value, requests.labels["status"]) == (1.0, "200")
    # Exactly, where the sums of Ray's histograms are not.
    assert only("ray_mimray_phase_spent_seconds").value == 0.012
    assert only("ray_mimray_batched_pictures").value == 3
    assert all(name.startswith(("ray_mimray_", "ray_serve_")) for name in families)
    ray.kill(replica)


def test_dashboard__asks_for_what_there_is() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    assert len(expressions) >= 10
    assert set(re.findall(r"ray_serve_\w+", " ".join(expressions))) == {SERVE}
    used: set[str] = set()
    for expression in expressions:
        for name, labels in re.findall(r"ray_(mimray_\w+)\{([^}]*)\}", expression):
            base = re.sub(r"_(total|bucket|sum|count)$", "", name)
            kind = KINDS[base]
            used.add(base)
            suffix = name.removeprefix(base)
            assert suffix in {
                "counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}
            }[kind.type], name  # fmt: skip
            asked = set(re.findall(r"(\w+)=", labels))
            assert asked <= {"model", "version", *kind.labels}
        for by in re.findall(r"by \(([^)]*)\)", expression):
            known = {"le", "model", "version"} | {x for k in KINDS.values() for x in k.labels}
            if expression.endswith(f"({SERVE})"):
                known = {"application"}
            assert {word.strip() for word in by.split(",")} <= known
    assert used == KINDS.keys()  # nothing is counted that nobody looks at
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
