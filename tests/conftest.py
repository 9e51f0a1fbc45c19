"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import settings
from PIL import Image

# A loaded machine is no reason to fail.
settings.register_profile("mimray", deadline=None)
settings.load_profile("mimray")
# Ray reads this when it is imported, which a test may do before any command has set it.
os.environ.setdefault("RAY_AUTH_MODE", "token")
# How often Ray Train looks whether its workers have ended; 2 s are long beside runs of tests.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")


class _Signals:
    """Ends the session on SIGINT or SIGTERM, after the test under way and every fixture's end.

    Whatever a test does with the exception that a signal raises (click turns it into a status,
    Ray's own handler into `SystemExit`, which fails a test and no more), the interpreter notes
    each signal in a pipe, which is looked into after every phase of a test.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._noted, self._note = os.pipe()
        for end in (self._noted, self._note):
            os.set_blocking(end, False)
        # A forked child's signals are its own.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        self.handle()

    def handle(self) -> None:
        """Note both signals and have them raise KeyboardInterrupt, whatever a test has set."""
        signal.set_wakeup_fd(self._note, warn_on_full_buffer=False)
        for number in self.NUMBERS:
            signal.signal(number, signal.default_int_handler)

    def received(self) -> bool:
        """True if one of the signals has come since the last call."""
        try:
            return bool(set(os.read(self._noted, 4096)) & set(self.NUMBERS))
        except BlockingIOError:
            return False


_SIGNALS = pytest.StashKey[_Signals]()
_PR_SET_CHILD_SUBREAPER = 36


def pytest_configure(config: pytest.Config) -> None:
    # Processes that lose their parent become children of this one, and can be found at the end.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    config.stash[_SIGNALS] = _Signals()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what outlives the tests: an interrupted start of Ray leaves its agents."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()  # no fixture does where its start was interrupted
    left = psutil.Process().children(recursive=True)
    for process in left:
        with contextlib.suppress(psutil.Error):
            # Python's own helpers end with this process, and tidy up then.
            if not any("multiprocessing." in word for word in process.cmdline()):
                process.kill()
                process.wait(timeout=20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, object, object]:
    signals = item.config.stash[_SIGNALS]
    signals.handle()
    if signals.received():
        item.session.shouldstop = "by a signal"
    return (yield)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """One local Ray of two CPUs for the whole session; gives its address."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    context = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Finds a port nobody listens on, and that the system gives nobody who asks for any."""

    def find() -> int:
        while True:
            port = random.SystemRandom().randrange(20_000, 30_000)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port

    return find


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures, told apart by colour, with a held-out split."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for label, tint in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(tint, 50, (6, 6, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((40, 40)).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process alone, to run DeepSpeed in; one for all, since it remembers it."""
    import torch
    import torch.distributed as dist

    from mimray.trainers.engine.deepspeed import prepare_process

    prepare_process(torch.device("cpu"))
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs a test's own file as two processes, `FILE PLACE RANK …`, and asks for a good end."""

    # They import the tests' shared modules, as pytest does.
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))

    def run(file: str, place: object, *arguments: str, timeout_s: float = 600) -> None:
        # Files: a pipe that nobody reads meanwhile stops the rank that writes, and so the others.
        logs = [Path(f"{place}.{rank}.log") for rank in range(2)]
        with contextlib.ExitStack() as files:
            processes = [
                subprocess.Popen(
                    [sys.executable, file, str(place), str(rank), *arguments],
                    stdout=files.enter_context(log.open("wb")),
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                )
                for rank, log in enumerate(logs)
            ]
            try:
                for process, log in zip(processes, logs, strict=True):
                    assert process.wait(timeout_s) == 0, log.read_text(errors="replace")[-4000:]
            finally:
                for process in processes:
                    process.kill()

    return run
