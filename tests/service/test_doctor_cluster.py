"""The findings of `mimray doctor --cluster`, and what a node finds out."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.service.commands import doctor_node
from mimray.service.commands.doctor_cluster import (
    HERE,
    Skew,
    bandwidth_finding,
    check_findings,
    clock_finding,
    gpu_finding,
    grouped,
    network_finding,
    node_names,
    nodes_finding,
    storage_finding,
    version_findings,
)
from mimray.service.commands.doctor_node import MISSING, NodeProbe, versions


def test_node_names__tell_nodes_of_one_host_apart():
    hosts = {"ffff11": "b", "aaaa22": "a", "cccc33": "b"}
    assert node_names(hosts) == {"aaaa22": "a", "cccc33": "b/cccc33", "ffff11": "b/ffff11"}


def test_grouped__each_text_once_with_the_nodes_it_is_of():
    assert grouped({"a": "2.1", "b": "2.0", HERE: "2.1"}) == "2.1 on a and this machine; 2.0 on b"
    many = grouped({f"n{number}": "2.1" for number in range(11)})
    assert many == "2.1 on n0, n1, n2, n3, n4, n5, n6, n7 and 3 more"


def test_nodes__a_silent_one_is_named_with_its_reason():
    assert nodes_finding(["a"], {}).status == "ok"
    found = nodes_finding(["a"], {"b": "no answer in 60 s"})
    assert (found.status, found.detail) == (
        "fail",
        "b: no answer in 60 s; those that answer: 1 node: a",
    )
    assert found.cure


def seen(**others: str) -> dict[str, dict[str, str]]:
    usual = {
        "python": "3.11.7", "mimray": "0.1.0+code.1", "torch": "2.9.0+cu130", "timm": "1.0.0",
    }  # fmt: skip
    return {HERE: usual, "a": usual, "b": usual | others}


def test_versions__alike_are_one_finding():
    [found] = version_findings(seen())
    assert found.status == "ok"
    assert found.detail == (
        "python 3.11.7, mimray 0.1.0+code.1, torch 2.9.0+cu130, timm 1.0.0 everywhere"
    )


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [
        ("python", "3.12.1", "fail"),
        ("torch", "2.8.0+cu130", "fail"),
        ("torch", "2.9.0+cpu", "warn"),  # a head without a GPU may have another build
        ("mimray", "0.1.0+code.2", "warn"),
        ("mimray", MISSING, "fail"),
        ("timm", "1.0.1", "warn"),
        ("timm", MISSING, "fail"),
    ],
)
def test_versions__others_are_named_with_their_nodes(package: str, version: str, status: str):
    first, found = version_findings(seen(**{package: version}))
    assert (found.name, found.status) == (package, status)
    assert f"; {version} on b" in found.detail
    assert found.detail.endswith("on b")
    assert package not in first.detail.replace("mimray", "") or package == "mimray"
    assert found.cure


def test_gpus__those_that_ray_was_told_of_against_those_seen():
    assert gpu_finding({"a": (0, 0), "b": (4, 4)}).detail == "no GPU on a; 4 GPUs on b"
    fewer = gpu_finding({"a": (0, 0), "b": (4, 3)})
    assert (fewer.status, fewer.detail) == ("fail", "Ray was told of 4, torch sees 3 on b")
    assert gpu_finding({"a": (0, 2)}).status == "warn"
    assert gpu_finding({"a": (4, None)}).status == "ok"  # without torch, which is told elsewhere


def test_checks__one_finding_for_all_that_pass():
    good, other = ("ok", "at most 65536", ""), ("ok", "unlimited", "")
    bad = ("warn", "at most 1024", "ulimit")
    findings = check_findings("open files", {"a": good, "b": bad, "c": other, "d": bad})
    assert [(f.status, f.detail, f.cure) for f in findings] == [
        ("ok", "at most 65536 on a, and enough on 1 more", ""),
        ("warn", "at most 1024 on b, d", "ulimit"),
    ]


@pytest.mark.parametrize(
    ("offset_s", "status"),
    [(0.4, "ok"), (-1.2, "ok"), (1.6, "warn"), (-300.0, "warn"), (1200.0, "fail")],
)
def test_clocks__what_the_round_trip_may_explain_is_no_skew(offset_s: float, status: str):
    found = clock_finding({"a": Skew(0.0, 0.001), "b": Skew(offset_s, 0.5)})
    assert found.status == status
    assert f"{1000 * offset_s:+.0f} ms ± 500 ms" in found.detail
    assert "on b" in found.detail


def test_clocks__a_node_that_falls_silent():
    assert clock_finding({"a": Skew(0.0, 0.1), "b": None}).detail == "no answer on b"


def test_storage__problems_by_node():
    assert storage_finding("/runs", {}, 2).status == "ok"
    found = storage_finding("/runs", {"b": "does not see what is written on a and this machine"}, 2)
    assert found.status == "fail"
    assert found.detail == "/runs: b does not see what is written on a and this machine"
    assert "s3://" in found.cure


def test_network__names_the_pair():
    assert network_finding([], 1).detail == "one node, nothing to connect"
    found = network_finding(["a does not reach b at 10.0.0.2: Connection refused"], 2)
    assert (found.status, "a does not reach b" in found.detail) == ("fail", True)


def test_bandwidth__in_bytes_that_pass_each_node():
    assert bandwidth_finding("gloo", 0.0, {}, 1).status == "ok"
    # Of a sum over 4 nodes 1.5 times the tensor passes each: 16 MiB x 1.5 / 24 ms.
    fast = bandwidth_finding("gloo", 0.024, {}, 4)
    assert (fast.status, "0.98 GiB/s" in fast.detail) == ("ok", True)
    slow = bandwidth_finding("gloo", 1.0, {}, 2)
    assert slow.status == "warn"
    assert "gradients of a ViT-B take 21 s a step" in slow.detail


def test_bandwidth__names_the_silent_node_and_not_those_that_waited_for_it():
    failed = {"a": "timed out", "b": "no answer in 120 s", "c": "timed out"}
    found = bandwidth_finding("nccl", 0.0, failed, 3)
    assert (found.status, found.detail) == ("fail", "nccl: no answer in 120 s on b")
    assert "NCCL_SOCKET_IFNAME" in found.cure
    assert bandwidth_finding("gloo", 0.0, {"a": "refused"}, 2).detail == "gloo: refused on a"


def test_probe__versions_are_those_of_this_process():
    found = NodeProbe().facts()
    assert found["versions"] == versions()
    assert found["versions"]["torch"].startswith(sys.modules["torch"].__version__.split("+")[0])
    assert MISSING not in found["versions"].values()
    assert set(found["checks"]) == {"shared memory", "open files"}


def test_code__is_another_where_a_file_is(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package/room").symlink_to(tmp_path / "real")
    (tmp_path / "real/a.py").write_text("1")
    digest = doctor_node._digest
    before = digest(tmp_path / "package")
    (tmp_path / "real/a.pyc").write_text("1")
    assert digest(tmp_path / "package") == before
    (tmp_path / "real/a.py").write_text("2")
    assert digest(tmp_path / "package") != before


def test_probe__reads_what_another_wrote_and_leaves_nothing(tmp_path: Path):
    storage = str(tmp_path / "made/runs")
    one, other = NodeProbe(), NodeProbe()
    one.write(storage, ".probe", "a")
    other.write(storage, ".probe", "b")
    assert one.unseen(storage, ".probe", ["a", "b", "c"]) == ["c"]
    for probe in (other, one):
        probe.remove(storage, ".probe")
    assert list(tmp_path.iterdir()) == []


def test_probe__folders_that_others_use_are_left(tmp_path: Path):
    probe = NodeProbe()
    probe.write(str(tmp_path / "runs"), ".probe", "a")
    (tmp_path / "runs/mine").mkdir()
    probe.remove(str(tmp_path / "runs"), ".probe")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def test_probe__nodes_not_reached_are_named():
    probe = NodeProbe()
    place = probe.listen()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = closed.getsockname()
        found = probe.unreached({"there": place, "refused": refused})
    assert found == {"refused": "Connection refused"}


def test_sum__two_processes(tmp_path: Path, run_ranks: Callable[..., None]):
    run_ranks(__file__, tmp_path, "2")
    assert float((tmp_path / "seconds").read_text()) > 0


def test_sum__a_node_that_does_not_come_is_an_error_in_time():
    probe = NodeProbe()
    place = probe.host_meeting(2, 2.0)
    with pytest.raises(Exception, match=r"(?i)time"):
        probe.sum_up(place, 0, 2, "gloo", 1, 2.0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "--run", "x"], "two different things"),
        (["--address", "auto"], "goes with --cluster or --run"),
    ],
)
def test_options__that_do_not_go_together(arguments: Sequence[str], said: str):
    done = CliRunner().invoke(cli, ["doctor", *arguments])
    assert done.exit_code == 2
    assert said in done.output


def test_cluster__none_at_the_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = CliRunner().invoke(cli, ["doctor", "--cluster", "--address", address])
    assert done.exit_code == 2
    assert f"no Ray cluster answers at {address}" in done.output
    assert "ray start --head" in done.output


def _take_part(place: Path, rank: int) -> None:
    """Be one of two nodes that sum a tensor."""
    probe, meeting = NodeProbe(), place / "meeting"
    if rank == 0:
        host, port = probe.host_meeting(2, 120.0)
        (place / "aside").write_text(f"{host} {port}")
        (place / "aside").rename(meeting)
    while not meeting.is_file():
        time.sleep(0.05)
    host, port = meeting.read_text().split()
    seconds: Any = probe.sum_up((host, int(port)), rank, 2, "gloo", 1, 120.0)
    if rank == 0:
        (place / "seconds").write_text(str(seconds))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


if __name__ == "__main__":
    _take_part(Path(sys.argv[1]), int(sys.argv[2]))
