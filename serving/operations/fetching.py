"""Pictures by URL: only from allowed hosts, and never from inside this network.

A name is resolved once, every address must be a public one, and the connection goes to those very
addresses, so that a second answer of the name server changes nothing. Redirects are followed by
hand, each checked like the first URL, each over a connection of its own: one that is kept open was
verified for the host before, and would carry its cookies.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import cache
from typing import TYPE_CHECKING

from mimray.serving.config import HTTPS_PORT, MIB, Urls
from mimray.serving.wire.errors import InvalidRequestError, TooLargeError

if TYPE_CHECKING:
    import httpx2

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_URL = 2048
_MAX_REDIRECTS = 3
# In which an IPv4 address hides (RFC 6052).
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All there is of public IPv6. Outside lie site-local, IPv4-compatible and translated addresses,
# which Python takes for global ones.
_PUBLIC_V6 = ipaddress.ip_network("2000::/3")
# Kept by the IETF for protocols; one cloud's metadata live there. Global to older Pythons.
_PROTOCOLS_V4 = ipaddress.ip_network("192.0.0.0/24")


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """True if an address, or the IPv4 address inside it, is a public one."""
    ip: Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is None:
            return ip in _PUBLIC_V6 and ip.is_global
        ip = inner
    return ip.is_global and not ip.is_multicast and ip not in _PROTOCOLS_V4


async def fetch(
    url: str,
    urls: Urls,
    *,
    resolver: Resolver = resolve,
    allowed: Callable[[str], bool] = is_public,
    trust: ssl.SSLContext | None = None,
) -> bytes:
    """Fetch a picture.

    Args:
        url: an https URL of an allowed host.
        urls: the rules for pictures by URL.
        resolver: gives the addresses of a name.
        allowed: gives True for an address that may be connected to.
        trust: the trusted certificates; the system's by default.

    Raises:
        InvalidRequestError: it may not be fetched, or could not be.
        TooLargeError: it is too large.
    """
    if not urls.allowed_hosts:
        raise InvalidRequestError(
            "pictures by URL are not taken here", hint="send the picture itself"
        )
    try:
        async with asyncio.timeout(urls.timeout_s):
            return await _follow(url, urls, resolver, allowed, trust or _usual_trust())
    except TimeoutError:
        raise InvalidRequestError(
            f"{_shown(url)} did not come within {urls.timeout_s:g} s"
        ) from None


async def _follow(
    url: str,
    urls: Urls,
    resolver: Resolver,
    allowed: Callable[[str], bool],
    trust: ssl.SSLContext,
) -> bytes:
    import httpx2

    target = _checked(url, urls)
    for _ in range(_MAX_REDIRECTS + 1):
        found = await _get(target, urls, resolver, allowed, trust)
        if isinstance(found, bytes):
            return found
        try:
            target = _checked(str(target.join(found)), urls)
        except (httpx2.InvalidURL, ValueError, InvalidRequestError) as error:
            # What it names may be a secret of the network it stands in.
            raise InvalidRequestError(
                f"{_shown(str(target))} redirects to where pictures are not taken from"
            ) from error
    raise InvalidRequestError(f"{_shown(str(target))} comes after {_MAX_REDIRECTS} redirects")


def _checked(url: str, urls: Urls) -> httpx2.URL:
    """The URL, if the urls lets it be fetched."""
    import httpx2

    if len(url) > _MAX_URL:
        raise InvalidRequestError(f"a picture's URL has more than {_MAX_URL} characters")
    try:
        target = httpx2.URL(url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise InvalidRequestError("a picture's URL cannot be read") from error
    if target.userinfo:
        raise InvalidRequestError("a picture's URL carries credentials")
    if target.scheme != "https" or not target.raw_host:
        raise InvalidRequestError(f"{_shown(str(target))} is not https")
    host, port = target.raw_host.decode(), target.port or HTTPS_PORT
    if not urls.allow(host, port):
        place = host[:100] if port == HTTPS_PORT else f"{host[:100]}, port {port},"
        raise InvalidRequestError(
            f"pictures from {place} are not taken here", hint="`urls.allowed_hosts` names hosts"
        )
    return target


async def _get(
    target: httpx2.URL,
    urls: Urls,
    resolver: Resolver,
    allowed: Callable[[str], bool],
    trust: ssl.SSLContext,
) -> bytes | str:
    """The picture at a URL, or the URL it redirects to."""
    import httpx2

    # The name in ASCII: Python would look up another, by rules of IDNA that are older.
    host = target.raw_host.decode()
    addresses = await _addresses(host, target.port or HTTPS_PORT, resolver, allowed)
    headers = {
        "Host": target.netloc.decode(),
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": "mimray",
    }
    timeout = httpx2.Timeout(urls.timeout_s, connect=urls.timeout_s / 3)
    # No proxies and no credentials from this process's environment.
    async with httpx2.AsyncClient(verify=trust, trust_env=False, timeout=timeout) as client:
        for address in addresses:
            pinned = target.copy_with(host=address)
            try:
                async with client.stream(
                    "GET", pinned, headers=headers, extensions={"sni_hostname": host}
                ) as response:
                    if response.status_code in _REDIRECTS:
                        return str(response.headers.get("location", ""))
                    return await _read(response, _shown(str(target)), urls)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                continue
            except httpx2.HTTPError as error:
                raise InvalidRequestError(
                    f"{_shown(str(target))} broke off: {type(error).__name__}"
                ) from error
    raise InvalidRequestError(
        f"{_shown(str(target))} cannot be fetched",
        hint="does it answer, with a certificate that is valid?",
    )


async def _addresses(
    host: str, port: int, resolver: Resolver, allowed: Callable[[str], bool]
) -> list[str]:
    try:
        addresses = await resolver(host, port)
    except (OSError, UnicodeError) as error:
        raise InvalidRequestError(f"there is no host {host[:100]}") from error
    if not addresses or not all(map(allowed, addresses)):
        # The address itself would tell of this network.
        raise InvalidRequestError(f"{host[:100]} is not on the public internet")
    return addresses


async def _read(response: httpx2.Response, shown: str, urls: Urls) -> bytes:
    if response.status_code != 200:
        raise InvalidRequestError(f"{shown} answered {response.status_code}")
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise InvalidRequestError(f"{shown} comes with a Content-Encoding nobody asked for")
    most = urls.max_mib * MIB
    refusal = TooLargeError(f"{shown} has more than {most} bytes")
    # The parser has checked that it is a number.
    if int(response.headers.get("content-length", "0")) > most:
        raise refusal
    chunks, size = [], 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > most:
            raise refusal
        chunks.append(chunk)
    return b"".join(chunks)


@cache
def _usual_trust() -> ssl.SSLContext:
    # Reading all authorities takes 40 ms, too long to do for each picture.
    return ssl.create_default_context()


def _shown(url: str) -> str:
    """Enough of a URL to know it again; what follows `?` may be a secret."""
    return url.partition("?")[0][:200]
