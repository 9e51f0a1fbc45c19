"""Recovery from faults: `python benchmarks/faults.py OUT [--only WORD,…] [--json FILE]`.

A short MAE on drawn pictures is trained once undisturbed, and once for each fault, which is done to
it for real. Each row: updates made twice because of it, seconds until it made a new one, whether
the losses are those of the undisturbed run to the bit, and processes that were left. It takes about
a minute a fault on two CPU cores. A full disk is left out where mounting one is not permitted.
"""

from __future__ import annotations

import argparse
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
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).resolve().parent
STEPS, EVERY, FAULT_AT, PICTURES = 300, 25, 60, 96
SETS = (
    "encoder.depth=1", "method.decoder_depth=1", "data.image_size=32", "data.num_workers=0",
    "optim.batch_size=16", f"checkpoint.every_steps={EVERY}", "logging.every_steps=1",
    "logging.pictures_every_steps=0", "resources.hang_timeout_s=5",
)  # fmt: skip
AGAIN = 75


class Server:
    """A server beside the training, which can be killed with all below it and started again.

    Args:
        command: its command.
        ready: words that it prints once it can be used.
        log: the file of its output.
    """

    def __init__(self, command: list[str], ready: str, log: Path) -> None:
        self._command, self._ready, self._log = command, ready, log
        self.start()

    def start(self) -> None:
        """Start it, and wait until it can be used."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while self._ready not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as when its machine goes down."""
        top = psutil.Process(self._process.pid)
        family = [*top.children(recursive=True), top]
        for member in family:
            if member.is_running():
                member.kill()
        self._process.wait()
        psutil.wait_procs(family, timeout=60)


class Place(NamedTuple):
    """Surroundings of a training.

    Attributes:
        storage: the directory of runs.
        data: the pictures.
        environment: environment variables beside those of this process.
        server: the server that it uses, if any.
    """

    storage: Path
    data: Path
    environment: dict[str, str] = {}
    server: Server | None = None


class Training:
    """A run of the short training, as a person starts it, again and again.

    Args:
        place: its surroundings.
        name: the run's name.
        log: the file of its output.
    """

    def __init__(self, place: Place, name: str, log: Path) -> None:
        self.place, self.log = place, log
        self.run = place.storage / name
        self._command = [
            sys.executable, "-m", "service", "pretrain", "mae-tiny", "--name", name,
            "--data", str(place.data), "--storage", str(place.storage), "--steps", str(STEPS),
            *(word for item in SETS for word in ("--set", item)),
        ]  # fmt: skip
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, or start it again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=HERE.parent, stdout=log, stderr=log,
                env=os.environ | self.place.environment,
            )  # fmt: skip
        return self.process

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step, as far as the run has come."""
        file = self.run / "metrics.jsonl"
        lines = file.read_bytes().splitlines() if file.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith(b"}")]
        return {row["step"]: row["loss"] for row in rows}

    @property
    def owner(self) -> str:
        """The launch that the run belongs to."""
        return (self.run / ".owner").read_text()

    @property
    def step(self) -> int:
        """The newest step."""
        return max(self.losses, default=0)

    def reach(self, step: int) -> None:
        """Wait until the run has come to a step."""
        while self.step < step:
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def end(self, status: int = 0, words: str = "") -> None:
        """Wait for the command to end as it should, and to have said why."""
        self.process.wait(600)
        assert self.process.returncode == status, self.log.read_text()
        assert words in self.log.read_text(), self.log.read_text()

    def signal_workers(self, number: signal.Signals) -> None:
        """Send a signal to the workers."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        workers = [p for p in family if any("RayTrainWorker" in word for word in p.cmdline())]
        assert workers
        for worker in workers:
            worker.send_signal(number)

    def newest_checkpoint(self) -> Path:
        """The directory of the newest whole checkpoint."""
        return max((self.run / "checkpoints").glob("step-*/manifest.json")).parent


def worker_killed(training: Training) -> None:
    training.signal_workers(signal.SIGKILL)


def worker_frozen(training: Training) -> None:
    training.signal_workers(signal.SIGSTOP)


def driver_killed(training: Training) -> None:
    training.process.kill()
    training.process.wait()
    training.start()


def driver_told(training: Training) -> None:
    training.process.terminate()
    training.end(AGAIN)
    training.start()


def checkpoint_flipped(training: Training) -> None:
    training.process.kill()
    training.process.wait()
    file = max(training.newest_checkpoint().rglob("*.pt"), key=lambda one: one.stat().st_size)
    with file.open("r+b") as damaged:
        damaged.seek(file.stat().st_size // 2)
        byte = damaged.read(1)
        damaged.seek(-1, os.SEEK_CUR)
        damaged.write(bytes([byte[0] ^ 1]))
    training.start()


def metrics_damaged(training: Training) -> None:
    training.process.kill()
    training.process.wait()
    file = training.run / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:9], b"\xff\n", *lines[10:]]))
    training.start()


def launched_twice(training: Training) -> None:
    training.start()


def disk_filled(training: Training) -> None:
    filler = training.place.storage / "filler"
    with filler.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    training.end(2, "no space left")
    filler.unlink()
    training.start()


def picture_lost(training: Training) -> None:
    picture = min(training.place.data.iterdir())
    kept = picture.read_bytes()
    picture.unlink()
    training.end(2, f"{picture} cannot be read")
    picture.write_bytes(kept)
    training.start()


def picture_changed(training: Training) -> None:
    picture = min(training.place.data.iterdir())
    kept = picture.read_bytes()
    picture.write_bytes(kept[:-20])
    training.end(2, f"{picture} has changed since the data was opened")
    picture.write_bytes(kept)
    training.start()


def head_killed(training: Training) -> None:
    assert training.place.server is not None
    training.place.server.kill()
    training.end(AGAIN, "error: the Ray cluster is gone")
    training.place.server.start()
    training.start()


def tracking_restarted(training: Training) -> None:
    assert training.place.server is not None
    training.place.server.kill()
    training.reach(training.step + 2 * EVERY)
    training.place.server.start()


@contextmanager
def own_pictures(out: Path) -> Iterator[Place]:
    """Pictures of its own, which may be damaged."""
    draw(out / "own")
    yield Place(out, out / "own")


@contextmanager
def own_disk(out: Path) -> Iterator[Place]:
    """A disk of its own for the runs."""
    disk = out / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)], check=True)
    try:
        yield Place(disk, out / "pictures")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def cluster(out: Path) -> Iterator[Place]:
    """A head node that somebody else has started, with a token."""
    with tempfile.TemporaryDirectory(prefix="mr-") as folder:  # sockets have short paths
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        port = free_port()
        command = [
            "env", *(f"{key}={value}" for key, value in access.items()),
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
            "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2",
            "--include-dashboard=false", "--dashboard-agent-listen-port=0",
            f"--temp-dir={folder}", "--object-store-memory=200000000", "--disable-usage-stats",
        ]  # fmt: skip
        head = Server(command, "Ray runtime started", out / "head.log")
        try:
            address = {"RAY_ADDRESS": f"127.0.0.1:{port}"}
            yield Place(out, out / "pictures", access | address, head)
        finally:
            head.kill()


@contextmanager
def tracking_server(out: Path) -> Iterator[Place]:
    """An MLflow server."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--backend-store-uri", f"sqlite:///{out}/server.db", "--workers", "1",
        "--artifacts-destination", str(out / "artifacts"),
    ]  # fmt: skip
    server = Server(command, "Application startup complete", out / "server.log")
    try:
        place = Place(
            out, out / "pictures", {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}, server
        )
        yield place
        points = subprocess.run(
            [sys.executable, "-c", POINTS, place.environment["MLFLOW_TRACKING_URI"]],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert json.loads(points) == ["FINISHED", STEPS], points
    finally:
        server.kill()


# The run's status and the number of its losses, by MLflow's own client.
POINTS = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
(run,) = client.search_runs([client.get_experiment_by_name("mimray").experiment_id])
losses = {point.step for point in client.get_metric_history(run.info.run_id, "loss")}
print(json.dumps([run.info.status, len(losses)]))
"""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def ordinary(out: Path) -> Iterator[Place]:
    """The directory of runs, with the pictures of all."""
    yield Place(out, out / "pictures")


class Fault(NamedTuple):
    """A fault, and where it can be done."""

    act: Callable[[Training], None]
    place: Callable[[Path], AbstractContextManager[Place]] = ordinary


FAULTS = {
    "a worker is killed": Fault(worker_killed),
    "a worker is frozen": Fault(worker_frozen),
    "the driver is killed": Fault(driver_killed),
    "the driver gets SIGTERM": Fault(driver_told),
    "the head of the cluster is killed": Fault(head_killed, cluster),
    "a bit of the newest checkpoint is flipped": Fault(checkpoint_flipped),
    "a line of metrics is damaged": Fault(metrics_damaged),
    "the disk of the runs fills up": Fault(disk_filled, own_disk),
    "a picture is deleted": Fault(picture_lost, own_pictures),
    "a picture is cut short": Fault(picture_changed, own_pictures),
    "the MLflow server is killed for a while": Fault(tracking_restarted, tracking_server),
    "the run is launched a second time": Fault(launched_twice),
}


class Row(NamedTuple):
    """Recovery of a training from a fault.

    Attributes:
        fault: what was done.
        again: updates made twice.
        recovered_s: seconds from the fault to the next new update.
        equal: the losses are those of the undisturbed run; of what is there, if a line is lost.
        missing: rows that are lost.
        orphans: processes that were left.
    """

    fault: str
    again: int
    recovered_s: float
    equal: bool
    missing: int
    orphans: int


def suffer(name: str, training: Training, calm: dict[int, float]) -> Row:
    """Do a fault to a training, and see it through."""
    training.reach(FAULT_AT)
    driver = psutil.Process(training.process.pid)
    family = [driver, *driver.children(recursive=True)]
    process, owner, began = training.process, training.owner, time.monotonic()
    FAULTS[name].act(training)
    while training.process is not process and training.owner == owner:
        # Workers outlive their driver by some seconds, and may go on until it is started again.
        assert training.process.poll() is None, training.log.read_text()
        time.sleep(0.02)
    lowest = before = training.step
    while training.step <= before:
        assert training.process.poll() is None, training.log.read_text()
        lowest = min(lowest, training.step or before)
        time.sleep(0.02)
    recovered_s = time.monotonic() - began
    training.end()
    if process is not training.process:
        assert process.wait(60) != 0, "two launches wrote into one run"
    found = training.losses
    _, left = psutil.wait_procs(family, timeout=30)
    return Row(
        name, before - lowest, recovered_s, all(calm[step] == found[step] for step in found),
        len(calm) - len(found), len(left),
    )  # fmt: skip


def draw(folder: Path) -> None:
    """Draw smooth pictures, the same each time."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        small.resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ("fault", "updates made twice", "seconds to the next new one", "losses equal to the bit",
            "rows lost", "processes left")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        equal = "yes" if row.equal else "no"
        cells = (row.fault, row.again, f"{row.recovered_s:.0f}", equal, row.missing, row.orphans)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="words of the faults, with commas between them")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    words = [word for word in arguments.only.split(",") if word]
    chosen = [name for name in FAULTS if not words or any(word in name for word in words)]
    if os.getuid() != 0:  # mounting needs the right to
        chosen = [name for name in chosen if FAULTS[name].place is not own_disk]
    if not chosen:
        parser.error(f"--only {arguments.only}: none of {', '.join(FAULTS)}")
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    draw(out / "pictures")
    undisturbed = Training(Place(out, out / "pictures"), "undisturbed", out / "undisturbed.log")
    undisturbed.end()
    calm = undisturbed.losses
    rows: list[Row] = []
    for number, name in enumerate(chosen, start=1):
        with FAULTS[name].place(out) as place:
            training = Training(place, f"fault-{number}", out / f"fault-{number}.log")
            rows.append(suffer(name, training, calm))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        kept: list[dict[str, Any]] = [row._asdict() for row in rows]
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    if not all(row.equal and not row.orphans for row in rows):
        raise SystemExit("a fault changed the run, or left processes")


if __name__ == "__main__":
    main()
