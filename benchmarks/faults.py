"""Recovery from faults: `python benchmarks/faults.py OUT [--only WORD,…] [--json FILE]`.

A short MAE on drawn pictures is trained once undisturbed, and once for each fault, which is done to
it for real. Each row: updates made twice because of it, seconds until it made a new one, whether
the losses are those of the undisturbed run to the bit, and processes that were left. It takes about
a minute a fault on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


class Training:
    """A run of the short training, as a person starts it, again and again.

    Args:
        out: the directory of runs, with the pictures.
        name: the run's name.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.run = out / name
        self._command = [
            sys.executable, "-m", "service", "pretrain", "mae-tiny", "--name", name,
            "--data", str(out / "pictures"), "--storage", str(out), "--steps", str(STEPS),
            *(word for item in SETS for word in ("--set", item)),
        ]  # fmt: skip
        self.log = out / f"{name}.log"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command, or start it again."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=HERE.parent, stdout=log, stderr=log)
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

    def end(self, status: int = 0) -> None:
        """Wait for the command to end as it should."""
        self.process.wait(600)
        assert self.process.returncode == status, self.log.read_text()

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


FAULTS: dict[str, Callable[[Training], None]] = {
    "a worker is killed": worker_killed,
    "a worker is frozen": worker_frozen,
    "the driver is killed": driver_killed,
    "the driver gets SIGTERM": driver_told,
    "a bit of the newest checkpoint is flipped": checkpoint_flipped,
    "a line of metrics is damaged": metrics_damaged,
    "the run is launched a second time": launched_twice,
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
    FAULTS[name](training)
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
    if not chosen:
        parser.error(f"--only {arguments.only}: none of {', '.join(FAULTS)}")
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    draw(out / "pictures")
    undisturbed = Training(out, "undisturbed")
    undisturbed.end()
    calm = undisturbed.losses
    rows: list[Row] = []
    for number, name in enumerate(chosen, start=1):
        rows.append(suffer(name, Training(out, f"fault-{number}"), calm))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    if arguments.json:
        kept: list[dict[str, Any]] = [row._asdict() for row in rows]
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    if not all(row.equal and not row.orphans for row in rows):
        raise SystemExit("a fault changed the run, or left processes")


if __name__ == "__main__":
    main()
