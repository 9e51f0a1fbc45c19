"""A closed loop of HTTP requests, on plain sockets and threads, which take little CPU.

    python load.py PORT PATH BODIES CONNECTIONS SECONDS WARM_UP_S

BODIES is a folder with `bodies.json`: a list of [file, headers]. Prints JSON: pictures a second,
median and 95th percentile of latency, and the seconds of CPU this process took.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from itertools import count
from pathlib import Path


class Connection:
    """A persistent HTTP connection."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 16)

    def ask(self, request: bytes) -> memoryview:
        """Send a whole request; returns the answer's body, valid until the next request."""
        self._socket.sendall(request)
        head_end, filled = -1, 0
        while head_end < 0:
            filled += self._receive(filled)
            head_end = self._buffer.find(b"\r\n\r\n", 0, filled)
        status, *lines = self._buffer[:head_end].decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        end = head_end + 4 + int(headers["content-length"])
        while filled < end:
            filled += self._receive(filled, end)
        body = memoryview(self._buffer)[head_end + 4 : end]
        if " 200 " not in status + " ":
            raise RuntimeError(f"{status}: {bytes(body[:500])!r}")
        return body

    def _receive(self, filled: int, wanted: int = 0) -> int:
        if len(self._buffer) < max(wanted, filled + 1):  # no growth once there are views of it
            grown = bytearray(2 * max(wanted, filled + 1))
            grown[:filled] = self._buffer[:filled]
            self._buffer = grown
        received = self._socket.recv_into(memoryview(self._buffer)[filled:])
        if not received:
            raise RuntimeError("the connection was closed")
        return received


def requests_of(port: int, path: str, bodies: Path) -> list[bytes]:
    """Whole HTTP requests with the bodies of a folder."""
    requests = []
    for file, headers in json.loads((bodies / "bodies.json").read_text()):
        body = (bodies / file).read_bytes()
        lines = {"Host": f"127.0.0.1:{port}", "Content-Length": len(body), **headers}
        head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        requests.append(head.encode() + b"\r\n" + body)
    return requests


def measure(
    port: int, requests: list[bytes], connections: int, seconds: float, warm_up_s: float
) -> dict[str, float]:
    """Keep `connections` requests in flight for `warm_up_s + seconds`, and time the answers."""
    began = time.perf_counter()
    stop = began + warm_up_s + seconds
    number = count()
    finished: list[tuple[float, float]] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            connection = Connection(port)
            while time.perf_counter() < stop:
                started = time.perf_counter()
                connection.ask(requests[next(number) % len(requests)])
                ended = time.perf_counter()
                finished.append((ended, ended - started))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    # Count from an answer to an answer, since batches answer in bursts: from a moment between two
    # bursts, most of one would be added or lost. The first answers to all connections end a burst,
    # too.
    times = sorted(end for end, _ in finished)
    first = max(connections - 1, sum(end <= began + warm_up_s for end in times) - 1)
    last = sum(end <= stop for end in times) - 1
    if last <= first:
        raise RuntimeError("too slow to be measured in this time")
    latencies = [spent for end, spent in finished if end > times[first]]
    return {
        "pictures_per_s": (last - first) / (times[last] - times[first]),
        "median_ms": 1000 * statistics.median(latencies),
        "p95_ms": 1000 * sorted(latencies)[int(0.95 * len(latencies))],
        "answers": len(finished),
        "client_cpu_s": time.process_time(),
    }


def main() -> None:
    port, path, bodies, connections, seconds, warm_up_s = sys.argv[1:]
    requests = requests_of(int(port), path, Path(bodies))
    answer = measure(int(port), requests, int(connections), float(seconds), float(warm_up_s))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
