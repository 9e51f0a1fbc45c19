"""Ray nodes as an administrator starts them, commands that run against them, and what they read."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mimray.service.cli.main import cli

BIN = Path(sys.executable).parent
TINY = [
    "encoder.depth=1", "method.decoder_depth=1", "optim.batch_size=16", "data.num_workers=1",
    "data.image_size=32", "checkpoint.every_steps=2", "logging.every_steps=1",
    "logging.num_pictures=2",
]  # fmt: skip


class Workbench:
    """A cluster of `ray start` nodes with a token of its own, and processes beside it.

    Whatever is started here is ended with all that descends from it, and nothing else:
    `ray stop` would end every Ray on the machine.

    Attributes:
        folder: holds everything; its name leaves room for the paths of sockets, which are short.
        environment: what a process needs in order to be let into the cluster.
        ip: address of the head node, and of others unless they have one of their own.
        dashboard: URL that takes jobs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        foreign = ("RAY_", "MLFLOW_", "AWS_")
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(foreign)},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        }
        port, dashboard = self.free_ports(2)
        self._port = port
        self.ip = "127.0.0.1"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Address of the cluster, for `RAY_ADDRESS`."""
        return f"{self.ip}:{self._port}"

    def start_head(self, num_cpus: int) -> None:
        """Start the head node."""
        dashboard = self.dashboard.rpartition(":")[2]
        self._start_node(
            "--head", f"--port={self._port}", f"--dashboard-port={dashboard}",
            f"--temp-dir={self.folder}", f"--num-cpus={num_cpus}", f"--node-ip-address={self.ip}",
        )  # fmt: skip

    def add_node(
        self, num_cpus: int, *wrapper: str, ip: str | None = None
    ) -> subprocess.Popen[bytes]:
        """Start another node, perhaps by a command around it; `kill` takes it down."""
        return self._start_node(
            f"--address={self.address}", f"--num-cpus={num_cpus}",
            f"--node-ip-address={ip or self.ip}", wrapper=wrapper,
        )  # fmt: skip

    def _start_node(self, *options: str, wrapper: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        node = self.start(
            *wrapper, "ray", "start", "--block",
            # The usual port of what starts jobs is that of the session's own Ray.
            "--dashboard-agent-listen-port=0", "--object-store-memory=100000000", *options,
        )  # fmt: skip

        def ready() -> bool:
            assert node.poll() is None, self.output(node)
            return "Ray runtime started" in self.output(node)

        self.wait_until(ready)
        return node

    def start(self, *command: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        """Start a command of this environment."""
        number = len(self._started)
        with (self.folder / f"{number}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=self.environment, cwd=cwd or self.folder, stdout=log, stderr=log,
            )  # fmt: skip
        self._started.append(process)
        return process

    def output(self, process: subprocess.Popen[bytes]) -> str:
        """What a process has printed."""
        return (self.folder / f"{self._started.index(process)}.log").read_text()

    def finish(self, process: subprocess.Popen[bytes], timeout_s: float = 800) -> str:
        """Wait for a process to end well; gives what it printed."""
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill(process)
        assert process.returncode == 0, self.output(process)
        return self.output(process)

    def mimray(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `mimray …` on the cluster."""
        self.environment["RAY_ADDRESS"] = self.address
        return self.start("mimray", *arguments)

    def pretrain(
        self, data: object, storage: object, name: str, steps: int, *extra: str
    ) -> subprocess.Popen[bytes]:
        """Start a short `mimray pretrain` on the cluster."""
        return self.mimray(*self.pretraining(data, storage, name, steps, *extra))

    @staticmethod
    def pretraining(data: object, storage: object, name: str, steps: int, *extra: str) -> list[str]:
        """Arguments of a short `pretrain`, with a checkpoint every second step."""
        sets = [argument for item in TINY for argument in ("--set", item)]
        return [
            "pretrain", "mae-tiny", "--data", str(data), "--storage", str(storage),
            "--name", name, "--steps", str(steps), *sets, *extra,
        ]  # fmt: skip

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL to a process and all below it, as when a machine goes down."""
        if process.poll() is not None:
            return
        top = psutil.Process(process.pid)
        family = [*top.children(recursive=True), top]
        for member in family:
            if member.is_running():
                member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=120)

    def close(self) -> None:
        """End everything that was started."""
        for process in reversed(self._started):
            self.kill(process)

    @staticmethod
    def wait_until(ready: Callable[[], bool], timeout_s: float = 600) -> None:
        """Wait until something is so."""
        wait_until(ready, timeout_s)

    @staticmethod
    def free_ports(count: int) -> list[int]:
        """Ports of the loopback interface that nobody listens on."""
        with ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
            for one in sockets:
                one.bind(("127.0.0.1", 0))
            return [one.getsockname()[1] for one in sockets]

    @staticmethod
    def losses(metrics: bytes) -> dict[int, float]:
        """Loss by step; a step that was logged twice fails."""
        rows = [json.loads(line) for line in metrics.splitlines()]
        found = {row["step"]: row["loss"] for row in rows}
        assert len(found) == len(rows)
        return found


@pytest.fixture(scope="module")
def bench() -> Iterator[Workbench]:
    """A workbench without a node yet."""
    folder = Path(tempfile.mkdtemp(prefix="mr-"))
    workbench = Workbench(folder)
    yield workbench
    workbench.close()
    shutil.rmtree(folder, ignore_errors=True)


class Commands:
    """`mimray …` on the session's cluster, called here or as a process of its own.

    A process costs the seconds of its imports: it is for what is killed, and for what a whole
    process prints.

    Args:
        address: of the cluster.
        storage: of the runs; MLflow's database is there, too.
    """

    def __init__(self, address: str, storage: Path) -> None:
        tracking = {"MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db"}
        self._environment = {**os.environ, "RAY_ADDRESS": address, **tracking}
        self._tracking = tracking
        self._started: list[subprocess.Popen[str]] = []

    def call(self, *arguments: str) -> Result:
        """What a command does and prints, in this process."""
        return CliRunner().invoke(cli, list(arguments), env=self._tracking)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command as a process."""
        process = subprocess.Popen(
            [sys.executable, "-m", "service", *arguments],
            env=self._environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._started.append(process)
        return process

    @staticmethod
    def finish(done: subprocess.Popen[str] | Result, timeout_s: float = 800) -> str:
        """Ask for a good end; gives what was printed for machines."""
        if isinstance(done, Result):
            assert done.exit_code == 0, (done.stderr, done.exception)
            return done.stdout
        out, err = done.communicate(timeout=timeout_s)
        assert done.returncode == 0, err
        return out

    @staticmethod
    def refused(done: Result, code: int = 2) -> str:
        """Ask for an end with a message, not a traceback; gives the message."""
        assert done.exit_code == code, (done.stderr, done.exception)
        assert "Traceback" not in done.stderr
        return done.stderr

    @staticmethod
    def wait_until(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
        """Wait until something is so while a process runs."""

        def still_runs() -> bool:
            assert process.poll() is None, process.communicate()
            return ready()

        wait_until(still_runs, timeout_s=600)

    @staticmethod
    def kill_ray(name: str, most: int | None = None, by: signal.Signals = signal.SIGKILL) -> None:
        """A signal to processes of the session's Ray, by a part of the name that Ray gives them."""
        victims = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if any(name in part for part in process.cmdline()):
                    victims.append(process)
        assert victims
        for victim in victims[:most]:
            victim.send_signal(by)

    def close(self) -> None:
        """End every process that was started."""
        for process in self._started:
            process.kill()
            process.wait()


def wait_until(ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty directory of runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def commands(ray_session: str, storage: Path) -> Iterator[Commands]:
    """Commands whose runs lie in `storage`."""
    found = Commands(ray_session, storage)
    yield found
    found.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 smooth pictures in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(48):
        smooth = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
        place = folder / "ab"[i % 2]
        place.mkdir(exist_ok=True)
        Image.fromarray(smooth).resize((50, 60)).save(place / f"{i:02d}.png")
    return folder
