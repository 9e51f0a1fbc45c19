"""`mimray ui`: MLflow and optuna-dashboard for this project's runs and sweeps."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

from mimray.service.terminal.console import say
from mimray.trainers.errors import ConfigError, ResourceError
from mimray.trainers.redaction import masked
from mimray.trainers.storage import RunDir

HOST = "127.0.0.1"
START_TIMEOUT_S = 90.0


def run_ui(storage: str, sweep: str | None, port: int) -> None:
    """Serve MLflow and perhaps a sweep's study until Ctrl-C or SIGTERM.

    Args:
        storage: the directory or URI where runs are tracked.
        sweep: a sweep's name or directory.
        port: the TCP port of MLflow; the study gets the next one.

    Raises:
        ResourceError: a port is taken, or a page does not start.
        ConfigError: nothing is tracked there.
        StorageError: there is no such sweep.
    """
    from mimray.trainers.tracking import tracking_uri

    uri = tracking_uri(None, storage)
    pages: dict[str, tuple[int, list[str]]] = {}
    if uri.startswith(("http://", "https://")):
        say(f"MLflow  {masked(uri)}")
    else:
        file = uri.removeprefix("sqlite:///")
        if RunDir(storage).local is None or not Path(file).is_file():
            _collect(storage, uri)
        if file != uri and not Path(file).is_file():
            raise ConfigError(f"nothing is tracked in {file} yet", hint="another --storage?")
        command = [_program("mlflow"), "server", "--backend-store-uri", uri, "--host", HOST]
        command += ["--workers", "1"]  # one person looks
        pages["MLflow"] = port, [*command, "--port", str(port)]
    if sweep is not None:
        from mimray.tuning.record import find_sweep
        from mimray.tuning.trackers import event_folder

        record = find_sweep(sweep, storage)
        folder = event_folder(record.uri, record.name)
        command = [_program("optuna-dashboard"), record.study[1], "--host", HOST]
        pages["study"] = port + 1, [*command, "--port", str(port + 1)]
        say(f"report  {record.uri}/report.html")
        say(f"TensorBoard: tensorboard --logdir {folder}   (pip install tensorboard)")
    _serve(pages)


def _collect(storage: str, uri: str) -> None:
    """Bring a database of this machine up to runs that may have been launched on others."""
    from mimray.service.commands.collect import collect

    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    count = collect(storage, uri, lambda name: say(f"reading {name}"))
    if count:
        say(f"{count} run{'s' if count > 1 else ''} of {masked(storage)} in {uri}")


def _serve(pages: dict[str, tuple[int, list[str]]]) -> None:
    for name, (port, _) in pages.items():
        _check_free(name, port)
    processes = {
        name: subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        for name, (_, command) in pages.items()
    }

    def end(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        for name, process in processes.items():
            url = f"http://{HOST}:{pages[name][0]}"
            _wait_for(name, url, process)
            say(f"{name:7} {url}")
        say("Ctrl-C ends it")
        while all(process.poll() is None for process in processes.values()):
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in processes.values():
            _end(process)


def _program(name: str) -> str:
    """The path of a program that is installed beside this one, or on PATH."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise ResourceError(f"{name} is not installed", hint=f"pip install {name}")
    return found


def _check_free(name: str, port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ResourceError(
                f"port {port} for {name} is taken: {error.strerror}", hint="another --port"
            ) from None


def _wait_for(name: str, url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            assert process.stderr is not None
            said = process.stderr.read().decode(errors="replace").strip().splitlines()
            raise ResourceError(f"{name} did not start: {said[-1] if said else 'no word why'}")
        try:
            urlopen(url, timeout=2).close()
            return
        except (URLError, OSError):
            time.sleep(0.2)
    raise ResourceError(f"{name} does not answer at {url}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its workers, which are a session of their own."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
