"""A training that a program starts as a library: its Ray, its ports, and what it writes down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from mimray.trainers.environment.network import is_loopback

pytestmark = pytest.mark.slow

# Ray is imported before mimray, and nothing has connected to it.
PROGRAM = """
import json, sys
import ray
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.launch import Job, prepare, pretrain

data, storage, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
job = Job(load_recipe("mae-tiny", overrides, 4), data, "a", storage, command="a program")
told = []

def show(state):
    if state.row and not told:
        told.append(ray.get_runtime_context().gcs_address)
        print(told[0], file=sys.__stdout__, flush=True)  # Ray's prints go to stderr meanwhile
        sys.stdin.readline()

pretrain(job, prepare(job), show)
print("connected" if ray.is_initialized() else "left", flush=True)
"""
OVERRIDES = [
    "encoder.depth=1", "method.decoder_depth=1", "optim.batch_size=16", "data.num_workers=1",
    "data.image_size=32", "logging.every_steps=1",
]  # fmt: skip
JOIN = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False); print('in')"
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-s3",
    "MLFLOW_TRACKING_TOKEN": "planted-token-of-mlflow",
    "HF_TOKEN": "planted-token-of-hf",
    "MIMRAY_API_KEY": "planted-key-of-serving",
    "PGPASSWORD": "planted-password-of-postgresql",
}


@dataclass
class Seen:
    """Observations of a training.

    Attributes:
        folder: holds all that it wrote: `home`, `runs`, and Ray's session in `ray`.
        joined: the end of a process that tried to join, with the token and without.
        open_to_others: names of processes that listened on more than loopback.
        num_listeners: sockets that listened, of all processes.
        printed: all that it printed.
    """

    folder: Path
    joined: dict[str, subprocess.CompletedProcess[str]]
    open_to_others: set[str]
    num_listeners: int
    printed: str


@pytest.fixture(scope="module")
def seen(photos: Path) -> Iterator[Seen]:
    folder = Path(tempfile.mkdtemp(prefix="mr-"))  # short, for the paths of Ray's sockets
    (folder / "home").mkdir()
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))},
        **SECRETS, "HOME": str(folder / "home"), "RAY_TMPDIR": str(folder),
    }  # fmt: skip
    log = folder / "printed.log"
    with log.open("w") as file:
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(photos), str(folder / "runs"),
             json.dumps(OVERRIDES)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
        )  # fmt: skip
    try:
        assert program.stdin is not None
        assert program.stdout is not None
        address = program.stdout.readline().strip()
        assert address, log.read_text()
        here = {**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        joined = {
            mode: subprocess.run(
                [sys.executable, "-c", JOIN, address], env={**here, "RAY_AUTH_MODE": mode},
                capture_output=True, text=True, timeout=300,
            )
            for mode in ("token", "disabled")
        }  # fmt: skip
        family = {p.pid: p for p in _family(program.pid)}
        listeners = [
            c
            for c in psutil.net_connections("inet")
            if c.pid in family and (c.status == psutil.CONN_LISTEN or not c.raddr)
        ]
        open_to_others = {
            " ".join(family[c.pid].cmdline()).strip()
            for c in listeners
            if not is_loopback(c.laddr.ip.removeprefix("::ffff:"))
        }
        program.stdin.close()
        printed = program.stdout.read()
        assert program.wait(600) == 0, log.read_text()
        yield Seen(folder, joined, open_to_others, len(listeners), printed + log.read_text())
    finally:
        for process in _family(program.pid) if program.poll() is None else []:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _family(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def test_pretrain__connects_by_itself_and_leaves(seen: Seen) -> None:
    assert (seen.folder / "runs/a/bundle/bundle.json").is_file()
    assert "left" in seen.printed.splitlines()


def test_ray__has_a_token_that_its_owner_alone_can_read(seen: Seen) -> None:
    assert (seen.folder / "home/.ray/auth_token").stat().st_mode & 0o777 == 0o600
    assert seen.joined["token"].stdout == "in\n", seen.joined["token"].stderr
    refused = seen.joined["disabled"]
    assert refused.returncode
    assert "Authentication token is missing or incorrect" in refused.stderr


def test_ports__are_on_loopback_but_for_the_store_of_torch(seen: Seen) -> None:
    assert seen.num_listeners > 10
    # torch.distributed's store, which has no option for the interface it listens on.
    assert all(name.startswith("ray::RayTrainWorker") for name in seen.open_to_others)


def test_files__hold_no_secret(seen: Seen) -> None:
    token = (seen.folder / "home/.ray/auth_token").read_text()
    written = [p for p in seen.folder.rglob("*") if p.is_file() and p.name != "auth_token"]
    names = {p.name for p in written}
    assert {"mlflow.db", "plan.json", "raylet.out", "bundle.json", "metrics.jsonl"} <= names
    for secret in (token, *SECRETS.values()):
        assert [str(p) for p in written if secret.encode() in p.read_bytes()] == []
