"""Claim: a command begins its work soon, and spends little CPU on the way.

    python benchmarks/start.py [--only pretrain,evaluate,serve] [--rounds 3] [--json FILE]

Each command as a person types it, on small pictures that are made first, with caches empty:
`mimray pretrain mae-tiny` up to its first update, `mimray evaluate` (kNN of 2 x 200 pictures) to
its end, and `mimray serve` until it is ready. Prints the median of the seconds by the clock, which
other work on the machine adds to, with the least and the most; and of the CPU seconds of each
process of the first round that took more than half a second, which it adds to less.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from PIL import Image

HERE = Path(__file__).resolve().parent
CLASSES, PICTURES = 4, 100
POLL_S = 0.1
LEAST_S = 0.5
SETS = ("--set", "data.image_size=32", "--set", "encoder.patch_size=4", "--set",
        "optim.batch_size=32", "--set", "logging.every_steps=1")  # fmt: skip


class Start(NamedTuple):
    """A start of a command.

    Attributes:
        seconds: by the clock, until it has begun.
        cpu_s: seconds of CPU until then, by process.
    """

    seconds: float
    cpu_s: dict[str, float]


class Watch:
    """Watches the processes that a command starts, in a thread.

    Args:
        pid: the command's process.
    """

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._found: dict[int, tuple[str, float]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()

    def _poll(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    times, line = process.cpu_times(), " ".join(process.cmdline())
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
                self._found[process.pid] = line, times.user + times.system

    def close(self) -> dict[str, float]:
        """Stop; seconds of CPU by the name of the process."""
        self._over.set()
        self._thread.join()
        found: dict[str, float] = {}
        for line, seconds in self._found.values():
            found[name_of(line)] = found.get(name_of(line), 0.0) + seconds
        return found


def name_of(line: str) -> str:
    """A short name of a process from its command line."""
    words = line.split()
    if line.startswith("ray::"):
        return words[0]
    if "forkserver" in line:
        return "decode processes"
    if "service" in words:
        return "the command"
    return next((Path(word).name for word in words if "/ray/" in word), "others")


def draw(folder: Path) -> Path:
    """Write small pictures of noise around a colour of their class's own."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(PICTURES // 2):
                noise = rng.normal(60 * label, 40, (32, 32, 3)).clip(0, 255)
                Image.fromarray(noise.astype(np.uint8)).save(place / f"{number}.png")
    return folder


def started(command: list[str], place: Path, begun: Callable[[str], bool]) -> Start:
    """Run a command until a line of it says that it has begun, and end it."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "service", *command], cwd=HERE.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "XDG_CACHE_HOME": str(place / "cache"), "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    watch = Watch(process.pid)
    assert process.stdout is not None
    said: list[str] = []
    for line in process.stdout:
        said.append(line)
        if begun(line):
            break
    else:
        watch.close()
        raise SystemExit(f"mimray {' '.join(command)} did not begin:\n{''.join(said)}")
    seconds = time.perf_counter() - began
    cpu_s = watch.close()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    return Start(seconds, cpu_s)


def commands(place: Path, number: int) -> dict[str, tuple[list[str], Callable[[str], bool]]]:
    """The commands of a round, and what tells that each has begun."""
    pictures, storage = str(place / "pictures"), str(place / "runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "pretrain": (
            ["pretrain", "mae-tiny", "--data", f"{pictures}/train", "--storage", storage,
             "--name", f"run{number}", "--steps", "20", *SETS],
            lambda line: line.lstrip().startswith("step "),
        ),
        "evaluate": (
            ["evaluate", "untrained:vit_tiny", "--image-size", "32", "--data", pictures,
             "--out", str(place / f"scores{number}")],
            lambda line: "accuracy" in line,
        ),
        "serve": (
            ["serve", str(place / "bundle"), "--port", str(port)],
            lambda line: line.startswith("serving "),
        ),
    }  # fmt: skip


def prepare(place: Path) -> None:
    """Make the pictures, and a bundle to serve."""
    draw(place / "pictures")
    subprocess.run(
        [sys.executable, "-m", "service", "pretrain", "mae-tiny", "--data",
         str(place / "pictures/train"), "--storage", str(place), "--name", "first", "--steps", "2",
         *SETS],
        cwd=HERE.parent, check=True, capture_output=True,
    )  # fmt: skip
    (place / "first/bundle").rename(place / "bundle")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="pretrain,evaluate,serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    found: dict[str, list[Start]] = {name: [] for name in chosen}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepare(place)
        for number in range(arguments.rounds):
            for name in chosen:
                command, begun = commands(place, number)[name]
                found[name].append(started(command, place, begun))
    for name, starts in found.items():
        seconds = [start.seconds for start in starts]
        print(
            f"{name}: {statistics.median(seconds):.1f} s ({min(seconds):.1f} to "
            f"{max(seconds):.1f}), of CPU {sum(starts[0].cpu_s.values()):.1f} s"
        )
        for process, cpu_s in sorted(starts[0].cpu_s.items(), key=lambda item: -item[1]):
            if cpu_s > LEAST_S:
                print(f"  {cpu_s:5.1f} s  {process}")
    if arguments.json:
        figures: Any = {name: [one._asdict() for one in starts] for name, starts in found.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
