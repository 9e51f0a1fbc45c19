"""Health of a container: of its Ray node, and of the endpoint on it.

Docker runs this (HEALTHCHECK in the Dockerfile); Kubernetes has probes of its own. A container
without a Ray node runs one command, and ends when that does.
"""

from __future__ import annotations

import re
import sys
import urllib.request
from pathlib import Path

_TIMEOUT_S = 5.0
_AGENT = re.compile(r"--listen-port=(\d+)")
_ENDPOINT = re.compile(r"^frontend http_frontend\n\s*bind \S*:(\d+)", re.MULTILINE)


def urls(processes: Path = Path("/proc")) -> list[str]:
    """The URLs that answer with status 200 where all is well.

    Args:
        processes: the folder of processes, as Linux mounts it.
    """
    found = []
    for name, arguments in _running(processes):
        if name == "raylet":
            # The raylet starts the agent that answers, by this command.
            port = _AGENT.search(" ".join(arguments))
            found.append(f"http://127.0.0.1:{port[1] if port else 52365}/api/healthz")
        elif name == "haproxy" and "-f" in arguments:
            bound = _ENDPOINT.search(Path(arguments[arguments.index("-f") + 1]).read_text())
            if bound:
                found.append(f"http://127.0.0.1:{bound[1]}/-/healthz")
    return found


def _running(processes: Path) -> list[tuple[str, list[str]]]:
    """Name and arguments of every process."""
    found = []
    for folder in processes.glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text().strip()
            arguments = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has just ended
        found.append((name, arguments))
    return found


def main() -> None:
    """End with status 1, and the reason, if something does not answer as it should."""
    for url in urls():
        try:
            urllib.request.urlopen(url, timeout=_TIMEOUT_S).close()
        except OSError as error:
            sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main()
