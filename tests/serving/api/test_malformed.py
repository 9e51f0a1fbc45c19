"""Two thousand pictures and requests that were tampered with: refused or answered, never a 500."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
from PIL import Image
from starlette.testclient import TestClient

from mimray.serving.wire.oip_messages import HEADER_LENGTH, build_request

COUNT = 2000
SLOW_S = 5.0
KNOWN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# What the library would open if it were let, and what nobody opens here.
UNKNOWN = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
    b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + bytes(100),
    b"PK\x03\x04" + bytes(200),
    b"\x7fELF" + bytes(200),
    b"\xd7\xcd\xc6\x9a" + bytes(200),  # WMF
    b"BLP2" + bytes(200),
)
EXPECTED = {200, 400, 413, 415, 422}


def _seeds(picture: Callable[..., bytes]) -> list[bytes]:
    seeds = [picture(1, (40, 30), format) for format in KNOWN]
    for mode in ("P", "L", "1", "RGBA", "CMYK", "I;16"):
        file = io.BytesIO()
        kind = "TIFF" if mode in ("CMYK", "I;16") else "PNG"
        Image.new(mode, (30, 20)).save(file, kind)
        seeds.append(file.getvalue())
    frames = [Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(4)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        seeds.append(file.getvalue())
    return [*seeds, *UNKNOWN]


def _mutated(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    kind = rng.integers(7)
    if kind == 0:  # cut short
        return data[: rng.integers(len(data))]
    if kind == 1:  # spliced with another
        return data[: rng.integers(len(data))] + other[rng.integers(len(other)) :]
    changed = bytearray(data)
    at = int(rng.integers(len(changed)))
    if kind == 2:  # a piece repeated
        return bytes(changed[:at] + changed[at // 2 : at] * 3 + changed[at:])
    if kind == 3:  # a piece lost
        return bytes(changed[:at] + changed[at + int(rng.integers(1, 30)) :])
    if kind == 4:  # lengths and sizes of the header at their extremes
        at = int(rng.integers(min(64, len(changed))))
        extreme = [b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"][rng.integers(3)]
        changed[at : at + 4] = extreme
        return bytes(changed)
    for _ in range(int(rng.integers(1, 20))):  # bytes changed
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def _request(rng: np.random.Generator, data: bytes, whole: bytes) -> dict[str, Any]:
    """One of the ways a picture comes, sometimes tampered with around the picture, too."""
    kind = rng.integers(5)
    features = "/v1/features?model=alpha"
    if kind == 0:
        return {"url": features, "content": data, "headers": {"Content-Type": "image/jpeg"}}
    if kind == 1:
        return {"url": features, "files": [("a", ("a", data)), ("b", ("b", whole))]}
    body = build_request({"image": [data]}, ["pooled"])
    infer = "/v2/models/alpha/infer"
    if kind == 2:
        return {"url": infer, "content": body.content, "headers": body.headers}
    if kind == 3:
        tampered = _mutated(rng, body.content, whole)
        return {"url": infer, "content": tampered, "headers": body.headers}
    headers = {HEADER_LENGTH: "0", "Content-Encoding": ["gzip", "deflate"][rng.integers(2)]}
    return {"url": infer, "content": data, "headers": headers}


def test_endpoint__takes_what_is_sent(
    application: Callable[..., Any], picture: Callable[..., bytes]
) -> None:
    rng = np.random.default_rng(0)
    seeds = _seeds(picture)
    limits = {"picture_pixels": 200_000}
    process = psutil.Process()
    statuses: Counter[int] = Counter()
    with TestClient(
        application(("alpha",), gateway={"limits": limits}, cache_mib=0),
        raise_server_exceptions=True,
    ) as client:
        whole = picture(1)
        for index in range(COUNT):
            data = _mutated(rng, seeds[index % len(seeds)], seeds[int(rng.integers(len(seeds)))])
            started = time.perf_counter()
            answer = client.post(**_request(rng, data, whole))
            assert time.perf_counter() - started < SLOW_S, index
            statuses[answer.status_code] += 1
            assert answer.status_code in EXPECTED, (index, answer.text)
            if answer.status_code != 200:
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["error"]
            if index == COUNT // 4:
                memory, threads = process.memory_info().rss, process.num_threads()
        assert client.post("/v1/features?model=alpha", content=whole).status_code == 200
    assert process.memory_info().rss < memory + 150 * 2**20
    assert process.num_threads() <= threads
    # The corpus is worth something: much of it is refused, and some is not.
    assert statuses[422] > COUNT // 4
    assert statuses[200] > COUNT // 50
    assert statuses[400] > COUNT // 10
