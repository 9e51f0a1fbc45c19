"""Start and end of the measured systems: the bare model, the endpoint, LitServe and BentoML."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
MAX_BATCH = 16
WAIT_S = 0.005
START_S = 120
WAKE_S = 1


@dataclass
class System:
    """A running server.

    Attributes:
        path: the path of the URL.
        bodies: the folder of the requests' bodies, see `load.py`.
        process: the server's main process; the others are its descendants.
    """

    name: str
    port: int
    path: str
    bodies: Path
    process: psutil.Process

    def processes(self) -> list[psutil.Process]:
        """All living processes of the server."""
        return [self.process, *self.process.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """CPU time of the server's living processes so far, seconds."""
        total = 0.0
        for process in self.processes():
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Resume the server within the context, then stop its processes, since idling takes CPU."""
        self.tell(signal.SIGCONT)
        time.sleep(WAKE_S)
        try:
            yield
        finally:
            self.tell(signal.SIGSTOP)

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to every process of the server."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def ask(self) -> bytes:
        """The tensors of the answer to the first request; waits for a server that is starting."""
        file, headers = json.loads((self.bodies / "bodies.json").read_text())[0]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{self.path}",
            data=(self.bodies / file).read_bytes(),
            headers=headers,
        )
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=START_S) as answer:
                    body: bytes = answer.read()
                    return body[int(answer.headers.get("Inference-Header-Content-Length", 0)) :]
            except (ConnectionError, urllib.error.URLError):
                if time.monotonic() > deadline or not self.process.is_running():
                    raise SystemExit(f"{self.name} did not answer, see its log") from None
                time.sleep(0.5)

    def load(self, connections: int, seconds: float, warm_up_s: float) -> dict[str, float]:
        """Run one round of a closed loop: the figures of `load.py`, and the CPU it took."""
        command = [sys.executable, "-S", str(HERE / "load.py"), str(self.port), self.path]
        command += [str(self.bodies), str(connections), str(seconds), str(warm_up_s)]
        busy, own = busy_seconds(), self.cpu_seconds()
        began = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        answer: dict[str, float] = json.loads(done.stdout)
        cores_s = (time.perf_counter() - began) * (os.cpu_count() or 1)
        own = self.cpu_seconds() - own
        busy = busy_seconds() - busy
        return {
            **answer,
            "cpu_ms_per_picture": 1000 * own / answer["answers"],
            "client_cpu_share": answer["client_cpu_s"] / cores_s,
            "strangers_cpu_share": (busy - own - answer["client_cpu_s"]) / cores_s,
        }


def busy_seconds() -> float:
    """CPU time of all processes of this machine so far, seconds."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait)


class Bare:
    """The bare model, in its own process, which waits between measurements."""

    def __init__(self, bundle: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "bare.py"), str(bundle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._read()

    def rate(self, batch: int, passes: int, seconds: float) -> dict[str, float]:
        """Pictures per second of the forward pass, and the CPU share of other processes."""
        busy, began = busy_seconds(), time.perf_counter()
        answer: dict[str, float] = self._ask(batch=batch, passes=passes, seconds=seconds)
        cores_s = (time.perf_counter() - began) * (os.cpu_count() or 1)
        strangers = busy_seconds() - busy - answer["cpu_s"]
        return {
            "pictures_per_s": answer["pictures_per_s"],
            "cpu_ms_per_picture": 1000 * answer["cpu_s"] / answer["pictures"],
            "strangers_cpu_share": strangers / cores_s,
        }

    def once(self, file: Path, size: int, layers: tuple[int, ...]) -> dict[str, float]:
        """Seconds of decoding one picture, and of the model."""
        answer: dict[str, float] = self._ask(picture=str(file), size=size, layers=layers)
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def _ask(self, **message: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the process of the bare model ended")
        return json.loads(line)


def environment(**more: str) -> dict[str, str]:
    """Environment variables of every process: the repository, two threads, equal priority."""
    own = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "2"}
    own["RAY_worker_niceness"] = "0"  # Ray's default of 15 matters on a loaded machine
    return {**os.environ, **own, **more}


def peer_python(folder: Path, package: str) -> Path:
    """Python of a virtual environment, made if missing, with a package and this one's torch."""
    python = folder / package / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder / package)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", package], check=True)
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    (site,) = (folder / package / "lib").glob("python*/site-packages")
    (site / "mimray-benchmark.pth").write_text(ours + "\n")
    return python


@contextmanager
def started(
    name: str,
    bundle: Path,
    bodies: Path,
    scratch: Path,
    peers: Path | None = None,
    compile: str = "auto",
) -> Iterator[System]:
    """Start the endpoint (`mimray`) or a peer with the bare model; it ends with the context.

    Args:
        name: `mimray`, `litserve` or `bentoml`.
        bundle: the folder of the encoder's bundle.
        bodies: the folder of the requests' bodies.
        scratch: the folder of the log.
        peers: the folder of the peers' environments; None to run under this Python.
        compile: the endpoint's option `compile`, `auto` or `false`.
    """
    python = peer_python(peers, name) if peers else Path(sys.executable)
    port = free_port()
    if name == "bentoml":
        command = [str(python.with_name("bentoml")), "serve", "bentoml_server:Front"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
    else:
        command = [str(python), str(HERE / f"{name}_server.py"), str(bundle), str(port)]
    more = {
        "COMPILE": compile,
        "BUNDLE": str(bundle),
        "BENTOML_HOME": str(scratch),
        "BENTOML_DO_NOT_TRACK": "1",
    }
    with (scratch / f"{bundle.name}-{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=HERE, env=environment(**more), stdout=log, stderr=log
        )
    path = "/v2/models/model/infer" if name == "mimray" else "/tokens"
    system = System(name, port, path, bodies, psutil.Process(process.pid))
    try:
        yield system
    finally:
        family = system.processes()
        system.tell(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=40)
        for survivor in left:
            survivor.kill()


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
