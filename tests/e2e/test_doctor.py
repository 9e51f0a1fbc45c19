"""`mimray doctor` of a cluster and of a run: real nodes, a real training, real damage."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from mimray.service.commands.doctor_node import PACKAGES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(bench: Any) -> Any:
    """A head, and a node that has another timm."""
    bench.start_head(num_cpus=1)
    other = bench.folder / "other/timm-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 9.9\n")
    path = f"{other.parent}:{bench.environment.get('PYTHONPATH', '')}"
    bench.node = bench.add_node(1, "env", f"PYTHONPATH={path}")
    return bench


def findings_of(cluster: Any, storage: Path, status: int) -> dict[str, Any]:
    """Findings by name."""
    asked = cluster.start(
        "mimray", "doctor", "--cluster", "--address", cluster.address, "--storage", str(storage),
        "--json",
    )  # fmt: skip
    assert asked.wait(600) == status, cluster.output(asked)
    printed = cluster.output(asked)
    return {found["name"]: found for found in json.loads(printed[printed.index("[\n") :])}


def test_cluster__what_differs_is_found_and_nothing_is_left(cluster: Any) -> None:
    found = findings_of(cluster, cluster.folder / "runs", status=0)
    bad = {name: finding for name, finding in found.items() if finding["status"] != "ok"}
    # The machine that tests run on may have little shared memory, or few open files.
    assert bad.keys() - {"shared memory", "open files", "bandwidth"} == {"timm"}
    assert "; 9.9 on " in bad["timm"]["detail"]
    assert found["nodes"]["detail"].startswith("2 nodes: ")
    for package in {"python", *PACKAGES} - {"timm"}:
        assert f"{package} " in found["versions"]["detail"]
    assert "this machine and 2 nodes read" in found["storage"]["detail"]
    assert "gloo sums 16 MiB over 2 nodes in" in found["bandwidth"]["detail"]
    assert not (cluster.folder / "runs").exists()


def test_cluster__a_frozen_node_is_a_finding(cluster: Any) -> None:
    [raylet] = [
        process
        for process in psutil.Process(cluster.node.pid).children(recursive=True)
        if process.name() == "raylet"
    ]
    raylet.send_signal(signal.SIGSTOP)
    found = findings_of(cluster, cluster.folder / "runs", status=2)
    raylet.send_signal(signal.SIGCONT)
    assert found["nodes"]["status"] == "fail"
    assert "those that answer: 1 node: " in found["nodes"]["detail"]
    assert found["versions"]["status"] == "ok"
    assert found["network"]["detail"] == "one node, nothing to connect"


def test_run__under_way_killed_damaged_and_finished(
    commands: Any, bench: Any, photos: Path, storage: Path
) -> None:
    arguments = bench.pretraining(photos, storage, "asked", 400)

    def stands(status: int = 0) -> Any:
        done = commands.call("doctor", "--run", "asked", "--storage", str(storage), "--json")
        assert done.exit_code == status, (done.output, done.exception)
        return json.loads(done.stdout)

    assert stands(status=2)["state"] == "never started"
    process = commands.start(*arguments)

    def trains() -> bool:
        if not (storage / "asked/launch.json").is_file():
            return False
        found = stands()
        # A process that looks while a start goes on finds it so.
        assert found["state"] in ("starting", "running"), found
        # A heartbeat is up to a second older than the newest row.
        updates = [worker["update"] or 0 for worker in found["workers"]]
        return found["state"] == "running" and found["step"] > 6 and max(updates, default=0) > 6

    commands.wait_until(trains, process)
    found = stands()
    [worker] = found["workers"]
    assert worker["rank"] == 0
    assert worker["update"] > 6
    assert psutil.pid_exists(worker["pid"])
    assert found["resumes_from"] >= 6

    process.send_signal(signal.SIGKILL)
    process.wait()
    bench.wait_until(lambda: stands()["state"] == "stopped")  # once Ray has missed the driver
    found = stands()
    newest = max((storage / "asked/checkpoints").iterdir())
    assert found["resumes_from"] == int(newest.name.removeprefix("step-"))
    assert found["workers"] == []
    assert "its driver was killed" in found["findings"][0]["detail"]

    written = {file: file.read_bytes() for file in newest.parent.glob("*/manifest.json")}
    for file in written:
        file.write_text("{")
    assert stands(status=2)["state"] == "damaged"
    for file, content in written.items():
        file.write_bytes(content)

    commands.finish(commands.call(*arguments))
    found = stands()
    assert (found["state"], found["step"], found["resumes_from"]) == ("finished", 400, None)
    assert {finding["status"] for finding in found["findings"]} == {"ok"}


def test_run__on_a_ray_of_its_own_is_found(bench: Any, photos: Path) -> None:
    """A training that started its own Ray is asked from another process, without an address."""
    local = bench.folder / "local"
    bench.environment.pop("RAY_ADDRESS", None)
    driver = bench.start("mimray", *bench.pretraining(photos, local, "own", 20_000))

    def stands() -> Any:
        asked = bench.start("mimray", "doctor", "--run", "own", "--storage", str(local), "--json")
        printed = bench.finish(asked)
        return json.loads(printed[printed.index("{\n") :])

    bench.wait_until((local / "own/metrics.jsonl").is_file)
    found = stands()
    assert (found["state"], len(found["workers"])) == ("running", 1), found

    driver.terminate()
    assert driver.wait(120) == 75, bench.output(driver)
    found = stands()
    assert found["state"] == "stopped"
    assert "stopped as asked after step" in found["findings"][0]["detail"]
    assert found["findings"][0]["cure"].endswith(f"goes on from step {found['resumes_from']}")
