"""Notice to a training before its node is ended, so that it writes a checkpoint first.

    leave.py SECONDS

Kubernetes runs this before it ends a pod (`preStop`): `ray start` itself ends its workers at once.
A worker's node is drained. A head cannot be, and all nodes end with it, so it drains the others.
Returns once nothing works here any more, after SECONDS at the latest.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

_POLL_S = 1.0
_HEAD = "/gcs_server"
# The actor that a job lives in; others on a head outlive their work.
_JOB = "ray::JobSupervisor"
_WITHOUT_WORK = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def works(commands: Sequence[str]) -> bool:
    """True if a job runs on a head, or a task or an actor on another node.

    Args:
        commands: the command lines of the node's processes.
    """
    if any(_HEAD in command for command in commands):
        return any(command.startswith(_JOB) for command in commands)
    working = [command for command in commands if command.startswith("ray::")]
    return any(not command.startswith(_WITHOUT_WORK) for command in working)


def to_drain(nodes: Sequence[dict[str, Any]], here: str) -> list[str]:
    """The ids of the nodes to drain before one ends.

    Args:
        nodes: the cluster's nodes, as `ray.nodes` gives them.
        here: the id of the node that is about to end.
    """
    alive = {node["NodeID"]: node["Resources"] for node in nodes if node["Alive"]}
    if "node:__internal_head__" in alive[here]:
        return sorted(alive.keys() - {here})
    return [here]


def _commands() -> list[str]:
    import psutil

    processes = psutil.process_iter(["cmdline"])
    return [" ".join(process.info["cmdline"] or []) for process in processes]


def main() -> None:
    """Drain, and wait."""
    seconds = int(sys.argv[1])
    deadline = time.monotonic() + seconds
    if not works(_commands()):
        return
    import ray

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    nodes = to_drain(ray.nodes(), ray.get_runtime_context().get_node_id())
    ray.shutdown()
    for node in nodes:
        # One that is gone already is no reason to leave the others without notice.
        subprocess.run(
            [
                "ray", "drain-node", "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message", "its pod ends", "--deadline-remaining-seconds", str(seconds),
            ],
            check=False,
        )  # fmt: skip
    while works(_commands()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
