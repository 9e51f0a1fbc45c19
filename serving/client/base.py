"""The base of the two clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from mimray.serving.client.core import Core, request_headers
from mimray.serving.client.retries import Sender
from mimray.serving.client.steps import Send
from mimray.trainers.environment.network import is_loopback
from mimray.trainers.errors import ServingError

Headers = Mapping[str, str] | Callable[[], Mapping[str, str]]

LIVE, READY = "/v2/health/live", "/v2/health/ready"
# Less than servers keep connections, so that a used one is seldom sent to its end.
_KEEPALIVE_S = 30.0


class Client:
    """The base of both clients: all but sending and waiting."""

    _http_class: type[Any]

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        max_retries: int = 3,
        batch_size: int = 16,
        *,
        deadline_s: float = 120.0,
        headers: Headers | None = None,
        transport: Any = None,
    ) -> None:
        _check_url(base_url)
        self._core = Core(Sender(base_url, timeout_s, deadline_s, max_retries), batch_size)
        self._headers = headers or {}
        self._http = self._http_class(
            base_url=base_url,
            headers=request_headers(api_key),
            # Connections are as many as the callers' `concurrency` says; unused ones are kept.
            limits=httpx2.Limits(max_keepalive_connections=64, keepalive_expiry=_KEEPALIVE_S),
            transport=transport,
            # A proxy cannot reach this machine's own address.
            trust_env=not is_loopback(httpx2.URL(base_url).host),
        )

    def _arguments(self, send: Send) -> dict[str, Any]:
        own = self._headers() if callable(self._headers) else self._headers
        return {
            "method": send.method,
            "url": send.path,
            "content": send.content,
            "headers": {**own, **send.headers},
            "timeout": send.timeout_s,
        }


def _check_url(base_url: str) -> None:
    try:
        url = httpx2.URL(base_url)
        fits = url.scheme in ("http", "https") and bool(url.host)
    except httpx2.InvalidURL:
        fits = False
    if not fits:
        raise ServingError(
            f"{base_url[:60]!r} is no address of an endpoint", hint="give it as http://HOST:PORT"
        )
