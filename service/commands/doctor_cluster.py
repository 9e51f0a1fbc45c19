"""`mimray doctor --cluster`: checks of the nodes of a Ray cluster and of what lies between."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mimray.service.commands import doctor_node
from mimray.service.commands.doctor import Finding
from mimray.service.commands.doctor_checks import GIB, Status
from mimray.service.commands.doctor_node import MISSING, NodeProbe
from mimray.service.terminal.console import say
from mimray.trainers.cluster import connected
from mimray.trainers.errors import MimrayError, ResourceError

HERE = "this machine"
NO_ANSWER = "no answer"
NAMES_SHOWN = 8
# A process starts and imports Ray; torch and DeepSpeed come with the first question.
START_TIMEOUT_S, ANSWER_TIMEOUT_S, MEETING_TIMEOUT_S = 60.0, 120.0, 60.0
NUM_PINGS = 5
WARN_SKEW_S, REFUSED_SKEW_S = 1.0, 900.0
SUM_MIB = {"gloo": 16, "nccl": 256}
WANTED_GIB_PER_S = 0.1
VIT_B_GIB = 86e6 * 4 / GIB
# Processes that differ in these do not understand each other, or compute something else.
_MUST_BE_ALIKE = ("python", "mimray", "ray", "torch", "deepspeed")
_JOIN = (
    "`ray start --head` starts one, `ray start --address=HEAD:6379` on every other machine joins "
    "it, and --address or RAY_ADDRESS names one that runs elsewhere"
)


@dataclass(frozen=True)
class Skew:
    """The clock of a node against this machine's.

    Attributes:
        offset_s: seconds by which it is ahead, if the answer took as long as the question.
        bound_s: half of the round-trip time, by which that may be wrong.
    """

    offset_s: float
    bound_s: float

    def __str__(self) -> str:
        return f"{1000 * self.offset_s:+.0f} ms ± {1000 * self.bound_s:.0f} ms"


def diagnose_cluster(*, storage: str = "runs", address: str | None = None) -> list[Finding]:
    """Check every node of a Ray cluster that runs, and what lies between them.

    A node that does not answer in time is a finding, and is left out of what follows.

    Args:
        storage: the directory or `pyarrow.fs` URI of runs.
        address: the cluster's address; None takes RAY_ADDRESS, or the cluster of this machine.

    Returns:
        The findings, in the order in which to mend them.

    Raises:
        ResourceError: there is no such cluster.
    """
    from mimray.trainers.storage import RunDir

    place = address or os.environ.get("RAY_ADDRESS") or "auto"
    with _joined(place), _probes() as (probes, told):
        say(f"asking {count(len(probes), 'node')} of the Ray cluster at {place}")
        awake, failed = _answers(
            {name: probe.clock.remote() for name, probe in probes.items()}, START_TIMEOUT_S
        )
        facts, failed_later = _ask(
            {name: probes[name] for name in awake}, lambda name, probe: probe.facts.remote()
        )
        probes = {name: probes[name] for name in facts}
        findings = [nodes_finding(list(facts), failed | failed_later)]
        if not probes:
            return findings
        versions = {name: found["versions"] for name, found in facts.items()}
        findings += version_findings({HERE: doctor_node.versions(), **versions})
        findings.append(gpu_finding({n: (told[n], found["gpus"]) for n, found in facts.items()}))
        for check in ("shared memory", "open files"):
            checked = {n: found["checks"] for n, found in facts.items() if found["checks"]}
            findings += check_findings(check, {n: checks[check] for n, checks in checked.items()})
        findings.append(clock_finding({name: _skew(probe) for name, probe in probes.items()}))
        uri = RunDir(storage).uri
        findings.append(storage_finding(uri, _round_trip(probes, uri), len(probes)))
        findings.append(network_finding(_unreached(probes), len(probes)))
        backend = "nccl" if all(found["gpus"] for found in facts.values()) else "gloo"
        seconds, failed = _summed(probes, backend) if len(probes) > 1 else (0.0, {})
        findings.append(bandwidth_finding(backend, seconds, failed, len(probes)))
        return findings


@contextmanager
def _joined(address: str) -> Iterator[None]:
    try:
        with connected(address):
            yield
    except ResourceError as error:
        text = str(error.args[0]).replace("at auto", "on this machine")
        raise ResourceError(text, hint=_JOIN) from error


@contextmanager
def _probes() -> Iterator[tuple[dict[str, Any], dict[str, int]]]:
    """An actor on each living node by the node's name, and the GPUs that Ray was told of."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    names = node_names({node_id: node["NodeManagerHostname"] for node_id, node in nodes.items()})
    ray.cloudpickle.register_pickle_by_value(doctor_node)
    probes = {}
    try:
        for node_id, name in names.items():
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            probe = ray.remote(NodeProbe).options(
                num_cpus=0, max_concurrency=8, scheduling_strategy=here
            )
            probes[name] = probe.remote()
        gpus = {name: int(nodes[id_]["Resources"].get("GPU", 0)) for id_, name in names.items()}
        yield probes, gpus
    finally:
        ray.cloudpickle.unregister_pickle_by_value(doctor_node)
        for probe in probes.values():
            ray.kill(probe)


def node_names(hosts: Mapping[str, str]) -> dict[str, str]:
    """Names of nodes for people: the host's, with a part of Ray's id where several share it.

    Args:
        hosts: names of hosts by Ray's ids of the nodes.
    """
    shared = list(hosts.values())
    found = {
        node_id: host if shared.count(host) == 1 else f"{host}/{node_id[:6]}"
        for node_id, host in hosts.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _answers(asked: Mapping[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Wait for nodes; returns the answers, and the reasons of those that gave none."""
    import ray

    if asked:
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=timeout_s)
    answers, failed = dict[str, Any](), dict[str, str]()
    for name, question in asked.items():
        try:
            answers[name] = ray.get(question, timeout=0)
        except ray.exceptions.GetTimeoutError:
            failed[name] = f"{NO_ANSWER} in {timeout_s:.0f} s"
        except ray.exceptions.RayError as error:
            failed[name] = _reason(error)
    return answers, failed


def _reason(error: BaseException) -> str:
    cause = getattr(error, "cause", None)
    if isinstance(cause, MimrayError):
        return str(cause.args[-1])
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ask(
    probes: Mapping[str, Any], question: Callable[[str, Any], Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    return _answers({n: question(n, probe) for n, probe in probes.items()}, ANSWER_TIMEOUT_S)


def _skew(probe: Any) -> Skew | None:
    """The clock of a node; None if it does not answer."""
    import ray

    skews = []
    for _ in range(NUM_PINGS):
        began = time.time()
        try:
            there = ray.get(probe.clock.remote(), timeout=START_TIMEOUT_S)
        except ray.exceptions.RayError:
            return None
        ended = time.time()
        skews.append(Skew(there - (began + ended) / 2, (ended - began) / 2))
    return min(skews, key=lambda skew: skew.bound_s)


def _round_trip(probes: Mapping[str, Any], uri: str) -> dict[str, str]:
    """Have this machine and each node read what others wrote.

    Returns:
        Problems by the name of a node, or HERE; empty if storage is shared by all.
    """
    folder = f".mimray-doctor-{secrets.token_hex(4)}"
    mine, names = NodeProbe(), list(probes)
    written, problems = _ask(probes, lambda name, probe: probe.write.remote(uri, folder, name))
    try:
        mine.write(uri, folder, HERE)
        written[HERE] = None
    except MimrayError as error:
        problems[HERE] = str(error.args[-1])
    # Each reads its neighbour's and this machine's, which alone writes what a launch begins with.
    neighbours = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    unseen, silent = _ask(
        {name: probe for name, probe in probes.items() if name in written},
        lambda name, probe: probe.unseen.remote(
            uri, folder, [other for other in (neighbours[name], HERE) if other in written]
        ),
    )
    if HERE in written:
        try:
            unseen[HERE] = mine.unseen(uri, folder, [name for name in names if name in written])
            mine.remove(uri, folder)
        except MimrayError as error:
            problems[HERE] = str(error.args[-1])
    _ask(probes, lambda name, probe: probe.remove.remote(uri, folder))
    blind = {
        n: f"does not see what is written {on(others)}" for n, others in unseen.items() if others
    }
    return {**problems, **silent, **blind}


def _unreached(probes: Mapping[str, Any]) -> list[str]:
    """Have each node connect to all others; returns a sentence for each that was not reached."""
    places, deaf = _ask(probes, lambda name, probe: probe.listen.remote())
    found, silent = _ask(
        probes if len(places) > 1 else {},
        lambda name, probe: probe.unreached.remote(
            {other: place for other, place in places.items() if other != name}
        ),
    )
    return [
        *(f"{name}: {reason}" for name, reason in {**deaf, **silent}.items()),
        *(
            f"{name} does not reach {other} at {places[other][0]}: {reason}"
            for name, reasons in found.items()
            for other, reason in reasons.items()
        ),
    ]


def _summed(probes: Mapping[str, Any], backend: str) -> tuple[float, dict[str, str]]:
    """Sum a tensor over all nodes; returns the seconds that it takes, and failures by node."""
    names = list(probes)
    first = names[0]
    hosted, failed = _ask(
        {first: probes[first]},
        lambda name, probe: probe.host_meeting.remote(len(names), MEETING_TIMEOUT_S),
    )
    if failed:
        return 0.0, failed
    seconds, failed = _ask(
        probes,
        lambda name, probe: probe.sum_up.remote(
            hosted[first], names.index(name), len(names), backend, SUM_MIB[backend],
            MEETING_TIMEOUT_S,
        ),
    )  # fmt: skip
    return max(seconds.values(), default=0.0), failed


def nodes_finding(answering: Sequence[str], failed: Mapping[str, str]) -> Finding:
    """The finding on nodes that answer, and on those that do not, with the reason of each."""
    detail = f"{count(len(answering), 'node')}: {', '.join(answering)}" if answering else "none"
    if not failed:
        return Finding("nodes", "ok", detail)
    lost = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
    return Finding(
        "nodes",
        "fail",
        f"{lost}; those that answer: {detail}",
        "look there at /tmp/ray/session_latest/logs/raylet.err, free the machine or restart it: "
        "`ray stop --force`, then `ray start --address=HEAD:6379`",
    )


def version_findings(seen: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Findings on packages: one on those that are alike everywhere, one on each other one.

    Args:
        seen: version by package, by the name of a node or HERE.
    """
    alike, findings = [], []
    for package in next(iter(seen.values())):
        found = {name: versions[package] for name, versions in seen.items()}
        texts = set(found.values())
        if len(texts) == 1 and MISSING not in texts:
            alike.append(f"{package} {texts.pop()}")
            continue
        other_build = len({text.partition("+")[0] for text in texts}) == 1
        tolerable = other_build or package not in _MUST_BE_ALIKE
        status: Status = "warn" if tolerable and MISSING not in texts else "fail"
        cure = "install the same everywhere; constraints.txt has the versions"
        if package == "mimray":
            cure = "install the same everywhere, or have `mimray submit` ship this code"
        findings.append(Finding(package, status, grouped(found), cure))
    if alike:
        findings.insert(0, Finding("versions", "ok", f"{', '.join(alike)} everywhere"))
    return findings


def gpu_finding(counts: Mapping[str, tuple[int, int | None]]) -> Finding:
    """The finding on GPUs.

    Args:
        counts: GPUs that Ray was told of, and those that torch sees (None without torch), by node.
    """
    known = {name: (told, seen) for name, (told, seen) in counts.items() if seen is not None}
    other = {
        name: f"Ray was told of {told}, torch sees {seen}"
        for name, (told, seen) in known.items()
        if told != seen
    }
    if not other:
        agreed = {n: count(told, "GPU") if told else "no GPU" for n, (told, _) in known.items()}
        return Finding("gpus", "ok", grouped(agreed) or "no node has torch")
    if any(told > (seen or 0) for told, seen in known.values()):
        cure = "install a driver and a CUDA build of torch that fit, or start with fewer --num-gpus"
        return Finding("gpus", "fail", grouped(other), cure)
    cure = "`ray start --num-gpus=N` offers them; without it they lie idle"
    return Finding("gpus", "warn", grouped(other), cure)


def check_findings(check: str, verdicts: Mapping[str, Sequence[str]]) -> list[Finding]:
    """Findings on a check that each node made: one on those that pass, one on each other verdict.

    Args:
        check: the check's name.
        verdicts: status, detail and cure, by node.
    """
    by_verdict: dict[tuple[str, ...], list[str]] = {}
    for name, verdict in verdicts.items():
        by_verdict.setdefault(tuple(verdict), []).append(name)
    passed = {verdict: names for verdict, names in by_verdict.items() if verdict[0] == "ok"}
    findings = [
        Finding(check, verdict[0], f"{verdict[1]} {on(names)}", verdict[2])  # type: ignore[arg-type]
        for verdict, names in by_verdict.items()
        if verdict not in passed
    ]
    if passed:
        verdict, names = next(iter(passed.items()))
        more = sum(map(len, passed.values())) - len(names)
        and_more = f", and enough on {more} more" if more else ""
        findings.insert(0, Finding(check, "ok", f"{verdict[1]} {on(names)}{and_more}"))
    return findings


def clock_finding(skews: Mapping[str, Skew | None]) -> Finding:
    """The finding on clocks, None for those of nodes that did not answer."""
    known = {name: skew for name, skew in skews.items() if skew is not None}
    if len(known) < len(skews):
        lost = [name for name in skews if name not in known]
        return Finding("clocks", "fail", f"no answer {on(lost)}", "run it again")
    # What the round trip may explain is no skew.
    apart_s = {name: abs(skew.offset_s) - skew.bound_s for name, skew in known.items()}
    if max(apart_s.values()) <= WARN_SKEW_S:
        widest = max(known, key=lambda name: abs(known[name].offset_s) + known[name].bound_s)
        return Finding(
            "clocks", "ok", f"at most {known[widest]} from this machine's, {on([widest])}"
        )
    wrong = {
        name: f"{known[name]} from this machine's"
        for name, seconds in apart_s.items()
        if seconds > WARN_SKEW_S
    }
    return Finding(
        "clocks",
        "fail" if max(apart_s.values()) > REFUSED_SKEW_S else "warn",
        f"{grouped(wrong)}: times in logs and metrics are wrong, object stores refuse 15 minutes",
        "synchronise them: chrony, systemd-timesyncd or the host's clock",
    )


def storage_finding(uri: str, problems: Mapping[str, str], num_nodes: int) -> Finding:
    """The finding on storage, with what each node, or HERE, has met."""
    if not problems:
        them = f"this machine and {count(num_nodes, 'node')}"
        return Finding("storage", "ok", f"{uri}: {them} read what others wrote")
    return Finding(
        "storage",
        "fail",
        f"{uri}: " + "; ".join(f"{name} {problem}" for name, problem in problems.items()),
        "every node needs the same --storage and the right to write: a shared folder, s3://… or "
        "gs://…",
    )


def network_finding(problems: Sequence[str], num_nodes: int) -> Finding:
    """The finding on connections between nodes, with a sentence on each that cannot be made."""
    if num_nodes < 2:
        return Finding("network", "ok", "one node, nothing to connect")
    if not problems:
        return Finding("network", "ok", f"each of {num_nodes} nodes reaches all others")
    return Finding(
        "network",
        "fail",
        "; ".join(problems),
        "open all TCP ports between the nodes (firewall, security group, network policy); where a "
        "node has several addresses, `ray start --node-ip-address` names one that others reach",
    )


def bandwidth_finding(
    backend: str, seconds: float, failed: Mapping[str, str], num_nodes: int
) -> Finding:
    """The finding on the time that a sum over all nodes takes.

    Args:
        backend: `gloo` or `nccl`.
        seconds: seconds of one sum of `SUM_MIB`.
        failed: reasons by the names of nodes where it failed.
        num_nodes: number of nodes that took part.
    """
    if num_nodes < 2:
        return Finding("bandwidth", "ok", "one node, nothing to measure")
    interface = f"{backend.upper()}_SOCKET_IFNAME names the network interface to use"
    if failed:
        # The others only wait for one that is silent.
        silent = {name: reason for name, reason in failed.items() if reason.startswith(NO_ANSWER)}
        return Finding("bandwidth", "fail", f"{backend}: {grouped(silent or failed)}", interface)
    gib_per_s = 2 * (num_nodes - 1) / num_nodes * SUM_MIB[backend] / 1024 / seconds
    detail = (
        f"{backend} sums {SUM_MIB[backend]} MiB over {num_nodes} nodes in {1000 * seconds:.0f} ms: "
        f"{gib_per_s:.2g} GiB/s a node"
    )
    if gib_per_s >= WANTED_GIB_PER_S:
        return Finding("bandwidth", "ok", detail)
    return Finding(
        "bandwidth",
        "warn",
        f"{detail}, so that the gradients of a ViT-B take "
        f"{2 * (num_nodes - 1) / num_nodes * VIT_B_GIB / gib_per_s:.0f} s a step",
        f"{interface}; larger batches a worker sum less often",
    )


def grouped(texts: Mapping[str, str]) -> str:
    """Texts by node in one line, each once with the nodes that it is of."""
    by_text: dict[str, list[str]] = {}
    for name, text in texts.items():
        by_text.setdefault(text, []).append(name)
    return "; ".join(f"{text} {on(names)}" for text, names in by_text.items())


def on(names: Sequence[str]) -> str:
    """`on a, b and this machine`, the first of them where there are many."""
    nodes = [name for name in names if name != HERE]
    listed = ", ".join(nodes[:NAMES_SHOWN])
    more = f" and {len(nodes) - NAMES_SHOWN} more" if len(nodes) > NAMES_SHOWN else ""
    places = [f"on {listed}{more}"] if nodes else []
    return " and ".join([*places, *([HERE] if HERE in names else [])])


def count(number: int, noun: str) -> str:
    """`1 node`, `2 nodes`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
