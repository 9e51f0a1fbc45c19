"""Against a real TLS server with a certificate of our own making."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from mimray.serving.config import Urls
from mimray.serving.operations.fetching import fetch, is_public
from mimray.serving.wire.errors import EndpointError, InvalidRequestError, TooLargeError

NAME = "images.example.org"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},DNS:other.example.org",
         "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return key, cert


def _run(
    certificate: tuple[Path, Path],
    test: Callable[[Callable[..., Awaitable[bytes]], list[str]], Awaitable[None]],
) -> None:
    key, cert = certificate
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        seen.append(next(line for line in head.splitlines() if line.lower().startswith("host")))
        assert "cookie:" not in head.lower()
        if path == "/inside":
            path = "/to/https://169.254.169.254/"
        if path.startswith("/to/"):
            writer.write(
                f"HTTP/1.1 302 x\r\nSet-Cookie: a=b\r\nLocation: {path[4:]}\r\n"
                "Content-Length: 0\r\n\r\n".encode()
            )
        elif path == "/gzip":
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b"
            )
        elif path == "/drip":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while not writer.is_closing():
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.01)
        elif path == "/large":
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(2**20 + 1))
        elif path == "/stated":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n")
        elif path == "/gone":
            writer.write(b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\npicture")
        await writer.drain()
        writer.close()

    async def main() -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(cert, key)
        server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        trust = ssl.create_default_context(cafile=str(cert))

        async def get(path: str, host: str = NAME, answers: list[str] | None = None,
                      timeout_s: float = 5.0, all_answers: bool = False) -> bytes:  # fmt: skip
            addresses = ["127.0.0.1"] if answers is None else answers

            async def resolver(name: str, asked: int) -> list[str]:
                seen.append(name)
                one_by_one = len(addresses) > 1 and not all_answers
                return [addresses.pop(0)] if one_by_one else addresses

            urls = Urls(
                allowed_hosts=(f"{NAME}:{port}", f"*.example.net:{port}"),
                max_mib=1,
                timeout_s=timeout_s,
            )
            return await fetch(
                f"https://{host}:{port}{path}", urls, resolver=resolver,
                allowed=lambda address: address.startswith("127."), trust=trust,
            )  # fmt: skip

        async with server:
            await test(get, seen)

    asyncio.run(main())


def test_fetch__goes_to_the_address_and_asks_for_the_name(certificate: tuple[Path, Path]) -> None:
    async def test(get: Callable[..., Awaitable[bytes]], seen: list[str]) -> None:
        # A second answer of the name server would be another address: it is never asked for.
        assert await get("/a", answers=["127.0.0.1", "10.0.0.1"]) == b"picture"
        assert seen[0] == NAME
        assert seen[1].lower().startswith(f"host: {NAME}:")
        assert len(seen) == 2
        assert await get("/to//b") == b"picture"
        # Nothing listens at the first.
        answers = ["127.0.0.2", "127.0.0.1"]
        assert await get("/a", answers=answers, all_answers=True) == b"picture"

    _run(certificate, test)


def test_fetch__refuses(certificate: tuple[Path, Path]) -> None:
    async def test(get: Callable[..., Awaitable[bytes]], seen: list[str]) -> None:
        cases: list[tuple[dict[str, object], type[EndpointError], str]] = [
            ({"path": "/a", "host": "evil.org"}, InvalidRequestError, "not taken here"),
            ({"path": "/a", "host": f"x.{NAME}"}, InvalidRequestError, "not taken here"),
            ({"path": "/a", "answers": ["10.0.0.1"]}, InvalidRequestError, "public internet"),
            ({"path": "/a", "host": f"me:pw@{NAME}"}, InvalidRequestError, "credentials"),
            ({"path": "/to/http://images.example.org/"}, InvalidRequestError, "redirects"),
            ({"path": "/inside"}, InvalidRequestError, "redirects"),
            ({"path": "/to/https://[::1/"}, InvalidRequestError, "redirects"),
            # The name is another address by the time it is redirected to.
            ({"path": "/to//a", "answers": ["127.0.0.1", "10.0.0.1"]},
             InvalidRequestError, "public internet"),
            ({"path": "/a", "answers": ["127.0.0.1", "10.0.0.1"], "all_answers": True},
             InvalidRequestError, "public internet"),
            ({"path": "/gzip"}, InvalidRequestError, "Content-Encoding"),
            ({"path": "/to//to//to//to//a"}, InvalidRequestError, "3 redirects"),
            ({"path": "/large"}, TooLargeError, "1048576 bytes"),
            ({"path": "/stated"}, TooLargeError, "1048576 bytes"),
            ({"path": "/gone"}, InvalidRequestError, "answered 404"),
            ({"path": "/drip", "timeout_s": 0.3}, InvalidRequestError, "within 0.3 s"),
            # Named in the allow-list, but the certificate is for another.
            ({"path": "/a", "host": "a.example.net"}, InvalidRequestError, "cannot be fetched"),
        ]  # fmt: skip
        for arguments, kind, match in cases:
            with pytest.raises(kind, match=match) as refused:
                await get(**arguments)
            assert "127.0.0.1" not in str(refused.value)
            assert "10.0.0.1" not in str(refused.value)
            assert "169.254" not in str(refused.value)

    _run(certificate, test)


def test_fetch__off_unless_configured() -> None:
    with pytest.raises(InvalidRequestError, match="not taken here"):
        asyncio.run(fetch("https://example.org/a.jpg", Urls()))


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_is_public__the_internet(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "fe80::1%eth0", "fc00::1", "ff02::1",
        "::ffff:10.0.0.1", "2002:0a00:0001::", "64:ff9b::10.0.0.1", "64:ff9b::7f00:1",
        "::127.0.0.1", "::", "fec0::1", "64:ff9b:1::7f00:1", "::ffff:0:127.0.0.1", "192.0.0.192",
    ],
)  # fmt: skip
def test_is_public__everything_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "127.1", "localhost", "[::1]", "[::ffff:7f00:1]"]
)
def test_fetch__knows_loopback_however_it_is_written(host: str) -> None:
    with pytest.raises(InvalidRequestError, match="public internet|no host"):
        asyncio.run(fetch(f"https://{host}/", Urls(allowed_hosts=(host,))))


def test_fetch__looks_up_the_name_that_was_allowed() -> None:
    # By Python's older rules of IDNA this would be strasse.example.org, which is another's.
    asked: list[str] = []

    async def resolver(name: str, port: int) -> list[str]:
        asked.append(name)
        return []

    urls = Urls(allowed_hosts=("Straße.example.org",))
    for host in ("straße.example.org", "xn--strae-oqa.example.org"):
        with pytest.raises(InvalidRequestError, match="public internet"):
            asyncio.run(fetch(f"https://{host}/", urls, resolver=resolver))
    assert asked == ["xn--strae-oqa.example.org"] * 2


@pytest.mark.parametrize("entry", ["*", "", "https://a.org", "a.org/b", "a.org:https", "u@a.org"])
def test_urls__refuse_what_is_no_host(entry: str) -> None:
    with pytest.raises(ValidationError, match="allowed_hosts"):
        Urls(allowed_hosts=(entry,))
