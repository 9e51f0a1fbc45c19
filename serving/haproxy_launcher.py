"""Starts HAProxy for Ray Serve, its configuration completed by what Ray leaves out.

Ray lets one name the binary it starts (`RAY_SERVE_HAPROXY_BINARY_PATH`) and writes the whole
configuration anew before each start, so this stands in between: every error HAProxy or Ray's own
layer makes becomes problem JSON, headers by which a client could command Ray are taken away, and
what is for operators listens on loopback alone.

Runs on nothing but the standard library, since HAProxy is started anew at every change.

    python haproxy_launcher.py BINARY -db -f haproxy.cfg …
"""

from __future__ import annotations

import json
import os
import re
import sys

MARK = "# completed by mimray"
STRIPPED = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve-multiplexed-model-id",
    "x-session-id",
)
"""Headers of requests that Ray Serve obeys, `-` and `_` alike."""

_ROUTER_PREFIX = "x-serve-router-"
_RETRY_AFTER_S = 1
_REQUEST_TIMEOUT_S = 30
# What a status means, as `serving.errors` has it.
_MEANINGS = {
    400: ("Invalid request", "invalid_request", "the request is not HTTP"),
    408: ("Timed out", "timeout", "the request came too slowly"),
    413: ("Too large", "too_large", "the request is too large"),
    500: ("Model failure", "model_failure", "the endpoint failed"),
    503: ("Overloaded", "overloaded", "nothing can answer this now"),
}
# Whoever lost a replica has to come again, whatever HAProxy calls it.
_SENT_AS = {502: 503, 504: 503}


def problem_body(status: int) -> str:
    """Problem JSON (RFC 9457) for a status, with the `error` member of the inference protocol."""
    title, code, detail = _MEANINGS[status]
    members = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "code": code,
        "detail": detail,
        "error": detail,
    }
    return json.dumps(members)


def error_file(status: int) -> str:
    """The whole response as HAProxy keeps it."""
    phrases = {400: "Bad Request", 408: "Request Timeout"}
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


def completed(config: str, folder: str) -> str:
    """Ray's configuration with ours in it.

    Args:
        config: what Ray wrote.
        folder: where error files lie.

    Raises:
        ValueError: a place that must be changed is not there.
    """
    if MARK in config:
        return config
    files = [
        f"    errorfile {status} {folder}/problem-{_SENT_AS.get(status, status)}.http"
        for status in (*_MEANINGS, *_SENT_AS)
    ]
    config = re.sub(r"^ *errorfile \d+ .*\n", "", config, flags=re.M)
    defaults = [
        f"    timeout http-request {_REQUEST_TIMEOUT_S}s",
        *files,
    ]
    config = _after(config, r"^defaults\n(?: +.*\n)*? *mode http\n", defaults)
    own = '{ res.hdr(content-type) -m beg "text/plain" }'
    overloaded = _quoted(problem_body(503))
    frontend = [
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
    config = _changed(config, r"^(frontend prometheus\n *bind ):", r"\g<1>127.0.0.1:")
    config = _changed(config, r"^(listen stats\n *bind )\*:", r"\g<1>127.0.0.1:")
    config = _changed(config, r"^( *stats socket .* mode )666", r"\g<1>600")
    return f"{MARK}\n{config}"


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
    binary, *arguments = sys.argv[1:]
    if "-f" in arguments:
        path = arguments[arguments.index("-f") + 1]
        folder = os.path.dirname(path)
        try:
            with open(path, encoding="utf-8") as file:
                config = completed(file.read(), folder)
            for status in _MEANINGS:
                with open(f"{folder}/problem-{status}.http", "w", newline="") as file:
                    file.write(error_file(status))
            aside = f"{path}.{os.getpid()}"
            with open(aside, "w", encoding="utf-8") as file:
                file.write(config)
            os.replace(aside, path)
        except (OSError, ValueError) as error:
            # Better an endpoint with plain errors than none.
            print(f"mimray: HAProxy runs as Ray has it: {error}", file=sys.stderr)
    os.execv(binary, [binary, *arguments])


if __name__ == "__main__":
    main()
