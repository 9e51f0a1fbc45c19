"""HAProxy before the replicas: its settings for Ray Serve, its processes and its files.

Ray starts HAProxy as a child of one of its actors. When Ray is killed rather than shut down,
that child lives on and keeps the port, and the next server answers 500 to everything. So each
server keeps its HAProxy's files in a directory of its own, named after its port, with a note
of who owns it; the path stands in HAProxy's command line, by which leftovers are told safely.
"""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import shutil
import socket
import sys
import time
from pathlib import Path

import psutil

from mimray.serving.deploy.haproxy_launcher import REQUESTS_PER_SOURCE, haproxy_binary
from mimray.trainers.environment.limits import usable_cpus
from mimray.trainers.environment.places import private_folder, temporary_place

_OWNER = "owner.json"
# The longest path of a socket below the place for temporary files.
_SOCKET_BYTES = 99
_LAUNCHER = Path(__file__).with_name("haproxy.sh")
# A request that fits the buffer is sent again when its replica dies; most pictures do.
_BUFFER_BYTES = 2**20
# Connections that only wait cost next to nothing; what fills buffers are requests, of which each
# source has a number.
_MAX_CONNECTIONS = 4096
# Files that HAProxy needs beside two a connection.
_OTHER_FILES = 256
_RETRIES = 3
# Ray's 10 s is how long nothing answers after HAProxy has died.
_HEALTH_CHECK_S = 1
# A model that scaled to zero has to load first.
_ANSWER_S = 300
# A request on a connection that is kept alive may be on its way.
_QUIET_S = 0.5
_EXIT_WAIT_S = 5.0
_POLL_S = 0.1


def haproxy_available() -> bool:
    """True if this platform has an HAProxy that Ray can start."""
    return sys.platform.startswith("linux") and bool(haproxy_binary())


class HAProxyState:
    """The directory of one server's HAProxy files, with a note of its owner.

    Args:
        port: the server's port; each port has a directory of its own.
    """

    def __init__(self, port: int) -> None:
        # Ray appends a node's 56 characters and HAProxy a temporary suffix, and a socket's path
        # ends at 107: so neither a long TMPDIR nor a long name.
        base = Path(temporary_place(below="x" * _SOCKET_BYTES) or "/tmp")
        self.folder = base / f"mimray-{os.getuid()}" / str(port)

    def claim(self) -> None:
        """Make the directory, private to this user, and note this process as its owner.

        The admin socket in it lets anyone who reaches it command HAProxy.

        Raises:
            ResourceError: the directory belongs to someone else.
        """
        private_folder(str(self.folder.parent.parent))
        self.folder.mkdir(exist_ok=True)
        process = psutil.Process()
        note = {"pid": process.pid, "create_time": process.create_time()}
        (self.folder / _OWNER).write_text(json.dumps(note))

    def clean_leftovers(self) -> bool:
        """End the HAProxy of a server that died without shutting down.

        Returns:
            True if there was one.
        """
        if not self.folder.is_dir() or self._owner_is_alive():
            return False
        ended = self.end_processes()
        shutil.rmtree(self.folder, ignore_errors=True)
        return ended

    def drain(self, timeout_s: float) -> bool:
        """Take no more connections, and wait for the requests that were accepted.

        Returns:
            True if all of them were answered in time.
        """
        deadline = time.monotonic() + timeout_s
        sockets = self._admin_sockets()
        for path in sockets:
            # The first takes nothing more at once, the second gives the port back.
            _command(path, "disable frontend http_frontend")
            _command(path, "shutdown frontend http_frontend")
        quiet_since = time.monotonic()
        while sockets and time.monotonic() < quiet_since + _QUIET_S:
            # One that a newer one replaced ends what it has, and the socket does not tell of it.
            replaced = len(self.processes()) > len(sockets)
            if replaced or self.requests():
                quiet_since = time.monotonic()
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def complaint(self) -> str:
        """The error that HAProxy or its launcher wrote last to standard error; empty for none.

        Of a HAProxy that is its first alert, since the others follow from it. What it only notes is
        no error.
        """
        logs = sorted(self.folder.glob("*/*.stderr.log"), key=lambda log: log.stat().st_mtime)
        for log in reversed(logs):
            written = log.read_text(errors="replace").splitlines()
            lines = [line.strip() for line in written if line.strip()]
            lines = [line for line in lines if not line.startswith(("[NOTICE]", "[WARNING]"))]
            alerts = [line for line in lines if line.startswith("[ALERT]")]
            if lines:
                return alerts[0] if alerts else lines[-1]
        return ""

    def requests(self) -> int:
        """The number of requests that are being answered now."""
        return sum(map(_requests, self._admin_sockets()))

    def _admin_sockets(self) -> list[Path]:
        return [path for path in self.folder.glob("*/admin.sock") if path.is_socket()]

    def release(self) -> None:
        """End what still runs out of the directory and remove it."""
        self.end_processes()
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """HAProxy processes started with a configuration in this directory."""
        found = []
        prefix = f"{self.folder}/"
        for process in psutil.process_iter(["name", "cmdline"]):
            arguments = process.info["cmdline"] or []
            if process.info["name"] == "haproxy" and any(a.startswith(prefix) for a in arguments):
                found.append(process)
        return found

    def end_processes(self) -> bool:
        """Kill every HAProxy of this directory; True if there was one."""
        processes = self.processes()
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=_EXIT_WAIT_S)
        return bool(processes)

    def environment(self, *, silence_s: float, requests_per_source: int) -> dict[str, str]:
        """The environment by which Ray Serve's processes run HAProxy as this endpoint needs it.

        Args:
            silence_s: longest time a client may pause while it sends a request.
            requests_per_source: most POSTs of one address at once.
        """
        return {
            "MIMRAY_PYTHON": sys.executable,
            REQUESTS_PER_SOURCE: str(requests_per_source),
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": str(_HEALTH_CHECK_S),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_LAUNCHER),
            "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
            "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response junk-response",
            "RAY_SERVE_HAPROXY_RETRIES": str(_RETRIES),
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(_BUFFER_BYTES),
            "RAY_SERVE_HAPROXY_MAXCONN": str(_connections()),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, usable_cpus())),
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(math.ceil(silence_s)),
            "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(_ANSWER_S),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(self.folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(self.folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(self.folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(self.folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(self.folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port(9101)),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port(8404)),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port(8500)),
        }

    def _owner_is_alive(self) -> bool:
        try:
            note = json.loads((self.folder / _OWNER).read_text())
            process = psutil.Process(note["pid"])
            return bool(abs(process.create_time() - note["create_time"]) < 1)
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            return False


def _command(admin: Path, text: str) -> str:
    """HAProxy's answer to a command; empty if it is gone."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_EXIT_WAIT_S)
        try:
            connection.connect(str(admin))
            connection.sendall(f"{text}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()
        except OSError:
            return ""


def _requests(admin: Path) -> int:
    """Requests that are with some backend now."""
    rows = list(csv.DictReader(_command(admin, "show stat").removeprefix("# ").splitlines()))
    return sum(int(row["scur"] or 0) for row in rows if row["svname"] == "BACKEND")


def _connections() -> int:
    """Connections that HAProxy may hold: it does not start where files for them are denied."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return max(1, min(_MAX_CONNECTIONS, (hard - _OTHER_FILES) // 2))


def port_is_free(host: str, port: int) -> bool:
    """True if a server can listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(preferred: int) -> int:
    if port_is_free("", preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
