"""Plain JPEGs, held against `decode`: the same pixels to the bit, the same refusals."""

from __future__ import annotations

import functools
import importlib.util
import io
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from mimray.trainers.data.decode import decode, draft_scale, read_size
from mimray.trainers.data.decoded import Pictures
from mimray.trainers.data.jpeg import Frame, _decode_rows, decode_plain, read_frame
from mimray.trainers.data.sample_photos import PHOTOGRAPHS
from mimray.trainers.errors import ImageError
from mimray.trainers.types import Record
from tests.trainers.data.encoding import encoded, turned

# Pillow says so of damaged EXIF and MPO, whose pixels it gives all the same.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "Truncated File Read",
        "Corrupt EXIF data",
        "Tag data larger than file",
        "Metadata Warning",
        "Image appears to be a malformed MPO",
    )
]
ENOUGH = (10_000, 10_000)  # for the whole size
SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
    'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{}"/></rdf:RDF></x:xmpmeta>'
)


def textured(seed: int, size: tuple[int, int], noise: float = 12) -> Image.Image:
    """Colours that change slowly, under noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 6, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), dtype=np.float64)
    pixels = pixels + noise * rng.normal(size=pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def colours(mode: str, subsampling: str | None) -> dict[str, Any]:
    """Pillow's options for colours of a subsampling, or stored as RGB where it is None."""
    if mode == "L":
        return {}
    return {"keep_rgb": True} if subsampling is None else {"subsampling": subsampling}


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(body)) + body


def exif_segment(orientation: int) -> bytes:
    return segment(0xE1, turned(orientation).tobytes())


def xmp_segment(orientation: int) -> bytes:
    return segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP.format(orientation).encode())


def parts(data: bytes) -> tuple[list[bytes], int, bytes]:
    """The segments of a header, the index of the frame's among them, and the scans."""
    found, place = [], 2
    while data[place + 1] != 0xDA:
        length = int.from_bytes(data[place + 2 : place + 4])
        found.append(data[place : place + 2 + length])
        place += 2 + length
    frame = next(i for i, each in enumerate(found) if each[1] in (0xC0, 0xC1, 0xC2, 0xC3, 0xC9))
    return found, frame, data[place:]


def with_inserted(data: bytes, inserted: bytes, *, behind_frame: bool) -> bytes:
    """A JPEG with bytes put behind its first segment, or behind its frame."""
    segments, frame, scans = parts(data)
    segments.insert(frame + 1 if behind_frame else 1, inserted)
    return b"\xff\xd8" + b"".join(segments) + scans


def with_frame(data: bytes, **changes: int) -> bytes:
    """A JPEG whose frame says something else, of the same data."""
    segments, frame, scans = parts(data)
    fields = dict(
        zip(
            ("marker", "length", "precision", "height", "width", "colours"),
            struct.unpack(">xBHBHHB", segments[frame][:10]),
            strict=True,
        )
    )
    fields |= changes
    segments[frame] = struct.pack(">BBHBHHB", 0xFF, *fields.values()) + segments[frame][10:]
    return b"\xff\xd8" + b"".join(segments) + scans


def by_decode(data: bytes, enough: tuple[int, int]) -> np.ndarray | tuple[str, str]:
    """The pixels, or the reason and message of the refusal."""
    try:
        return np.asarray(decode(data, draft_size=enough).image)
    except ImageError as error:
        return error.reason, str(error)


def by_pictures(data: bytes, enough: tuple[int, int]) -> np.ndarray | tuple[str, str]:
    """As `by_decode`, of the way that training takes."""
    try:
        return Pictures([Record(data, None)])[0].decoded(enough)  # type: ignore[arg-type]
    except ImageError as error:
        return error.reason, str(error)


def check(data: bytes, enough: tuple[int, int] = ENOUGH) -> np.ndarray | tuple[str, str]:
    """Hold training's way against `decode`; returns what both give."""
    want, found = by_decode(data, enough), by_pictures(data, enough)
    if isinstance(want, tuple):
        assert isinstance(found, tuple), f"a picture, which decode refuses: {want}"
        assert found == want
    else:
        assert isinstance(found, np.ndarray), f"a picture for decode: {found}"
        assert (found.dtype, found.shape) == (np.uint8, want.shape)
        np.testing.assert_array_equal(found, want)
    return found


def pixels_of(data: bytes, enough: tuple[int, int] = ENOUGH) -> np.ndarray:
    found = check(data, enough)
    assert isinstance(found, np.ndarray), found
    return found


def reason_of(data: bytes) -> str:
    found = check(data)
    assert isinstance(found, tuple)
    return found[0]


@functools.cache
def jpegs() -> dict[str, bytes]:
    """Small JPEGs of many kinds; the last few are not plain."""
    image = textured(1, (45, 34))
    made = {
        "4:4:4": encoded(image, subsampling="4:4:4", quality=75),
        "4:2:2": encoded(image, subsampling="4:2:2", quality=60),
        "4:2:0": encoded(image, subsampling="4:2:0", quality=90),
        "gray": encoded(image.convert("L")),
        "optimised": encoded(image, optimize=True, quality=30),
        "progressive": encoded(image, progressive=True),
        "restarts": encoded(image, restart_marker_rows=1),
        "progressive restarts": encoded(image, progressive=True, restart_marker_blocks=2),
        "rgb": encoded(image, keep_rgb=True),
        "comment": encoded(image, comment=b"a comment \xff\xd9\xff\xda"),
        "profile": encoded(image, icc_profile=bytes(range(100))),
        "upright": encoded(image, exif=turned(1)),
        "turned": encoded(image, exif=turned(6)),
        "xmp": encoded(image, xmp=XMP.format(8).encode()),
        "two": encoded(image, "MPO", save_all=True, append_images=[image, image]),
        "cmyk": encoded(image.convert("CMYK")),
    }
    return made


NAMES = tuple(jpegs())
PLAIN_NAMES = tuple(name for name in NAMES if name not in ("turned", "xmp", "cmyk"))


@pytest.fixture(scope="module", autouse=True)
def room_to_encode() -> Iterator[None]:
    """Pillow's buffer is too small for noise that is encoded in one go."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ImageFile, "MAXBLOCK", 1 << 20)
        yield


# Whole pictures


@given(
    size=st.tuples(st.integers(2, 200), st.integers(2, 200)),
    times=st.sampled_from([0.5, 1, 2, 4, 6, 8, 16, 40]),
    mode=st.sampled_from(["RGB", "RGB", "L"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([*SUBSAMPLINGS, None]),
    progressive=st.booleans(),
    optimise=st.booleans(),
    restart_rows=st.integers(0, 3),
    comment=st.binary(max_size=20),
    noise=st.sampled_from([0, 12, 200]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400)
def test_decode_plain__gives_the_pixels_of_decode(
    size: tuple[int, int],
    times: float,
    mode: str,
    quality: int,
    subsampling: str | None,
    progressive: bool,
    optimise: bool,
    restart_rows: int,
    comment: bytes,
    noise: float,
    seed: int,
):
    data = encoded(
        textured(seed, size, noise).convert(mode),
        quality=quality,
        progressive=progressive,
        optimize=optimise,
        restart_marker_rows=restart_rows,
        comment=comment,
        **colours(mode, subsampling),
    )
    enough = (max(1, int(size[0] / times)), max(1, int(size[1] / times)))

    frame = read_frame(data)
    assert frame is not None
    assert (frame.size, frame.tagged) == (size, False)
    found = decode_plain(data, frame, draft_scale(size, enough))

    want = decode(data, draft_size=enough).image
    assert found is not None
    assert (found.dtype, found.shape) == (np.uint8, (want.height, want.width, 3))
    np.testing.assert_array_equal(found, np.asarray(want))
    pixels_of(data, enough)


@given(
    size=st.tuples(st.integers(2, 200), st.integers(2, 200)),
    needed=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    mode=st.sampled_from(["RGB", "RGB", "L"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from([*SUBSAMPLINGS, None]),
    noise=st.sampled_from([0, 12, 200]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=400)
def test_decode_plain__needed_rows_are_decoded_alone_to_the_same_pixels(
    size: tuple[int, int],
    needed: tuple[float, float],
    mode: str,
    quality: int,
    subsampling: str | None,
    noise: float,
    seed: int,
):
    image = textured(seed, size, noise).convert(mode)
    options = {"quality": quality, **colours(mode, subsampling)}
    data = encoded(image, restart_marker_rows=1, **options)
    top = int(min(needed) * (size[1] - 1))
    bottom = max(top + 1, int(max(needed) * size[1]))
    frame = read_frame(data)
    assert frame is not None
    # Not by falling back on the whole picture.
    assert frame.rows is not None
    found = _decode_rows(data, size, frame.rows, (top, bottom))

    want = decode(data).image
    assert found is not None
    assert (found.dtype, found.shape) == (np.uint8, (want.height, want.width, 3))
    np.testing.assert_array_equal(found[top:bottom], np.asarray(want)[top:bottom])


def test_decode_plain__rows_that_are_not_needed_are_not_decoded():
    data = encoded(textured(1, (64, 64)), restart_marker_rows=1, subsampling="4:4:4")
    sixth, end = (data.index(bytes((0xFF, 0xD0 + number))) for number in (4, 5))
    broken = data[: sixth + 2] + bytes(end - sixth - 2) + data[end:]
    frame = read_frame(data)
    assert frame is not None
    sound = np.asarray(decode(data).image)

    def rows(top: int, bottom: int) -> np.ndarray | None:
        found = decode_plain(broken, frame, 1, (top, bottom))
        return None if found is None else found[top:bottom]

    np.testing.assert_array_equal(rows(0, 40), sound[:40])
    np.testing.assert_array_equal(rows(48, 64), sound[48:])
    damaged = rows(40, 41)
    assert damaged is None or (damaged != sound[40:41]).any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"restart_marker_rows": 2},
        {"restart_marker_blocks": 3},
        {"restart_marker_blocks": 1},
        {"restart_marker_rows": 1, "progressive": True},
    ],
)
def test_read_frame__rows_without_a_marker_each_are_not_apart(options: dict[str, Any]):
    frame = read_frame(encoded(textured(1, (64, 64)), subsampling="4:4:4", **options))

    assert frame is not None
    assert frame.rows is None


def test_decode_plain__where_markers_are_not_those_of_rows_it_decodes_the_whole():
    data = encoded(textured(1, (64, 64)), restart_marker_rows=1, subsampling="4:4:4")
    frame = read_frame(data)
    assert frame is not None
    assert frame.rows is not None
    second = data.index(b"\xff\xd1")
    want = np.asarray(decode(data).image)

    for changed in (data + b"more", data[:second] + b"\xff" + data[second:]):
        assert _decode_rows(changed, frame.size, frame.rows, (8, 40)) is None
        found = Pictures([Record(changed, None)])[0].decoded(ENOUGH, (8, 40))  # type: ignore
        np.testing.assert_array_equal(found, want)
    without = data[:second] + data[second + 2 :]
    assert _decode_rows(without, frame.size, frame.rows, (8, 40)) is None


@pytest.mark.parametrize("name", PLAIN_NAMES)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_decode_plain__every_scale_is_that_of_pillows_draft(name: str, scale: int):
    data = jpegs()[name]
    frame = read_frame(data)
    assert frame is not None
    drafted = Image.open(io.BytesIO(data))
    drafted.draft(None, (45 // scale, 34 // scale))

    found = decode_plain(data, frame, scale)

    assert found is not None
    assert found.shape == (-(-34 // scale), -(-45 // scale), 3)
    np.testing.assert_array_equal(found, np.asarray(drafted.convert("RGB")))


@pytest.mark.parametrize("side", range(2, 34))
def test_decode_plain__every_small_side_at_every_scale(side: int):
    for other in (2, 7, 8, 16, 17, 33):
        for size in ((side, other), (other, side)):
            data = encoded(textured(side, size, 60))
            for enough in {(max(1, size[0] // n), max(1, size[1] // n)) for n in (1, 2, 4, 8, 16)}:
                pixels_of(data, enough)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_pictures__plain_jpegs_are_not_left_to_pillow(name: str, monkeypatch: pytest.MonkeyPatch):
    data = jpegs()[name]
    want = by_decode(data, ENOUGH)
    monkeypatch.setattr("mimray.trainers.data.decoded.decode", None)

    found = by_pictures(data, ENOUGH)

    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("name", ["china", "flower", "hubble", "retina", "rocket"])
def test_pictures__photographs_at_every_scale(name: str):
    package, path = PHOTOGRAPHS[name]
    (folder,) = importlib.util.find_spec(package).submodule_search_locations  # type: ignore
    data = (Path(folder) / path).read_bytes()
    width, height = read_size(data)

    for times in (1, 4, 8, 16):
        found = pixels_of(data, (width // times, height // times))
        assert found.shape[1] == -(-width // max(1, times // 2))


@pytest.mark.parametrize("horizontal", [1, 2, 3, 4])
@pytest.mark.parametrize("vertical", [1, 2, 3, 4])
def test_pictures__any_sampling_factors(horizontal: int, vertical: int):
    image = textured(2, (64, 64))
    for component in range(3):
        segments, frame, scans = parts(encoded(image, subsampling="4:4:4"))
        changed = bytearray(segments[frame])
        changed[11 + 3 * component] = 16 * horizontal + vertical
        segments[frame] = bytes(changed)

        for enough in (ENOUGH, (16, 16), (4, 4)):
            check(b"\xff\xd8" + b"".join(segments) + scans, enough)


@pytest.mark.parametrize("num_scans", range(1, 10))
def test_pictures__a_progressive_one_that_ends_after_some_scans(num_scans: int):
    # Complete as a file: libjpeg then smooths the blocks of what is coarse.
    data = encoded(textured(3, (80, 64)), progressive=True)
    starts = [i for i in range(len(data) - 1) if data[i : i + 2] == b"\xff\xda"]
    assert len(starts) == 10
    table = data.rfind(b"\xff\xc4", starts[num_scans - 1], starts[num_scans])
    cut = data[: table if table > 0 else starts[num_scans]] + b"\xff\xd9"

    for enough in (ENOUGH, (20, 16), (5, 4)):
        pixels_of(cut, enough)
    assert not np.array_equal(pixels_of(cut), pixels_of(data))


@pytest.mark.parametrize("with_jfif", [True, False])
@pytest.mark.parametrize("transform", [None, 0, 1, 2, 255])
def test_pictures__colours_as_adobes_segment_says(transform: int | None, with_jfif: bool):
    segments, _, scans = parts(jpegs()["4:4:4"])
    adobe = b"" if transform is None else segment(0xEE, b"Adobe\0\x64\0\0\0\0" + bytes([transform]))
    segments = [*segments[:1], adobe, *segments[1:]] if with_jfif else [adobe, *segments[1:]]

    found = pixels_of(b"\xff\xd8" + b"".join(segments) + scans)

    # Without either segment, and where Adobe's says RGB, the colours are others or the same.
    same = np.array_equal(found, pixels_of(jpegs()["4:4:4"]))
    assert same == (with_jfif or transform != 0)


# Headers


@pytest.mark.parametrize(
    ("inserted", "tagged"),
    [
        (b"", False),
        (segment(0xFE, b"a comment, \xff\xc0\xff\xda\xff\xe1"), False),
        (segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(20)), False),
        (segment(0xE5, b"a maker's own"), False),
        (b"\xff\xff\xff" + segment(0xFE, b"filled up")[1:], False),
        (exif_segment(1), True),
        (exif_segment(6), True),
        (xmp_segment(1), True),
        (segment(0xE1, b""), True),
    ],
)
@pytest.mark.parametrize("name", ["4:2:0", "gray", "progressive"])
def test_read_frame__size_and_tags(name: str, inserted: bytes, tagged: bool):
    data = with_inserted(jpegs()[name], inserted, behind_frame=False)

    assert read_frame(data) == Frame((45, 34), tagged)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff" * 100,
        b"\xff\xd8\xff\xd9",
        encoded(textured(0, (9, 9)), "PNG"),
        jpegs()["cmyk"],
        jpegs()["4:4:4"][2:],
        b"\0" + jpegs()["4:4:4"],
        with_frame(jpegs()["4:4:4"], precision=12),
        with_frame(jpegs()["4:4:4"], precision=16),
        with_frame(jpegs()["4:4:4"], colours=0),
        with_frame(jpegs()["4:4:4"], colours=2),
        with_frame(jpegs()["4:4:4"], colours=4),
        with_frame(jpegs()["4:4:4"], width=0),
        with_frame(jpegs()["4:4:4"], height=0),
        *[
            with_frame(jpegs()["4:4:4"], marker=marker)
            for marker in (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
        ],
        with_inserted(jpegs()["4:4:4"], b"\0junk", behind_frame=False),
        with_inserted(jpegs()["4:4:4"], b"\xff\xd0", behind_frame=False),
        with_inserted(jpegs()["4:4:4"], b"\xff\xd8", behind_frame=False),
        with_inserted(jpegs()["4:4:4"], b"\xff\xd9", behind_frame=False),
        with_inserted(jpegs()["4:4:4"], b"\xff\x01", behind_frame=False),
        b"\xff\xd8" + parts(jpegs()["4:4:4"])[2],
    ],
)
def test_read_frame__none_of_what_is_not_plain(data: bytes):
    assert read_frame(data) is None
    check(data)


def test_read_frame__none_wherever_a_header_is_cut():
    for name in NAMES:
        segments, frame, _ = parts(jpegs()[name])
        start = 2 + sum(map(len, segments[:frame]))

        for length in range(start + 10):
            assert read_frame(jpegs()[name][:length]) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": 12}, "unsupported_mode"),
        ({"precision": 12, "marker": 0xC1}, "unsupported_mode"),
        ({"marker": 0xC3}, "broken"),
        ({"marker": 0xC3, "precision": 16}, "unsupported_mode"),
        ({"colours": 2}, "broken"),
        ({"width": 0}, "broken"),
        ({"height": 0}, "broken"),
    ],
)
def test_pictures__frames_that_pillow_does_not_read_have_its_reason(
    changes: dict[str, int], reason: str
):
    assert reason_of(with_frame(jpegs()["4:4:4"], **changes)) == reason


def test_pictures__cmyk_at_every_scale():
    data = encoded(textured(4, (120, 90)).convert("CMYK"))

    shapes = [pixels_of(data, enough).shape for enough in (ENOUGH, (30, 20), (15, 10), (7, 5))]

    assert shapes == [(90, 120, 3), (45, 60, 3), (23, 30, 3), (12, 15, 3)]


@pytest.mark.parametrize("behind_frame", [False, True])
@pytest.mark.parametrize(
    "inserted",
    [
        b"\xff" * 9,
        b"\0 junk that is no segment",
        b"\xff\0",
        b"\xff\xd0",
        b"\xff\xd8",
        b"\xff\xd9",
        b"\xff\xe5\0\0",
        b"\xff\xfe\0\1",
        b"\xff\xe5\xff\xff",
        b"\xff\xe1\xff\xffExif\0\0",
        segment(0xE0, b"JFXX\0\x10"),
        segment(0xE1, b""),
        segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<not xml"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\x10"),
        segment(0xC8, b"ab"),
        segment(0xCC, b"\0\x10"),
        segment(0xDC, b"\0\x22"),
        segment(0xDD, b"\0\2"),
        segment(0xDE, b"\x08\0\x22\0\x2d\3\1\x11\0\2\x11\1\3\x11\1"),
        segment(0xDF, b"\0"),
        segment(0xF0, b"ab"),
        segment(0xFE, b""),
    ],
)
@pytest.mark.parametrize("name", ["4:2:0", "gray", "progressive"])
def test_pictures__whatever_else_is_in_a_header(name: str, inserted: bytes, behind_frame: bool):
    check(with_inserted(jpegs()[name], inserted, behind_frame=behind_frame))


@pytest.mark.parametrize("behind_frame", [False, True])
@pytest.mark.parametrize(
    "inserted",
    [
        segment(0xE0, b"JFIF\0"),
        segment(0xE2, b"ICC_PROFILE\0"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        segment(0xEE, b"Adobe"),
        b"\xff\x01",
    ],
    ids=["jfif", "profile", "photoshop", "adobe", "tem"],
)
def test_pictures__segments_too_short_for_pillow(inserted: bytes, behind_frame: bool):
    check(with_inserted(jpegs()["4:2:0"], inserted, behind_frame=behind_frame))


@pytest.mark.parametrize("behind_frame", [False, True])
def test_pictures__two_frames_are_refused(behind_frame: bool):
    segments, frame, _ = parts(jpegs()["4:2:0"])

    data = with_inserted(jpegs()["4:2:0"], segments[frame], behind_frame=behind_frame)

    assert reason_of(data) == "broken"


@pytest.mark.parametrize("name", NAMES)
def test_pictures__what_follows_the_end_is_not_looked_at(name: str):
    data = jpegs()[name]

    for tail in (b"\0", b"\xff", b"trailing bytes" * 50, data):
        np.testing.assert_array_equal(pixels_of(data + tail), pixels_of(data))


def test_pictures__quantisation_tables_of_16_bits():
    segments, _, scans = parts(encoded(textured(5, (60, 40)), quality=10))
    for index, each in enumerate(segments):
        if each[1] == 0xDB:
            values = [9 * value for value in each[5:]]
            assert len(values) == 64
            body = struct.pack(">B64H", 0x10 | each[4], *values)
            segments[index] = segment(0xDB, body)
            assert max(values) > 255
    data = b"\xff\xd8" + b"".join(segments) + scans

    for enough in (ENOUGH, (15, 10), (7, 5)):
        assert np.ptp(pixels_of(data, enough)) == 255


# Turned pictures


@pytest.mark.parametrize("behind_frame", [False, True])
@pytest.mark.parametrize("told_by", [exif_segment, xmp_segment])
@pytest.mark.parametrize("orientation", range(10))
def test_pictures__are_upright_wherever_the_turn_is_told(
    orientation: int, told_by: Any, behind_frame: bool
):
    plain = encoded(textured(6, (90, 60)))
    data = with_inserted(plain, told_by(orientation), behind_frame=behind_frame)
    stored = np.asarray(decode(plain).image)
    upright = {
        2: stored[:, ::-1],
        3: np.rot90(stored, 2),
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored, 2).transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }.get(orientation, stored)

    np.testing.assert_array_equal(pixels_of(data), upright)
    for enough in ((30, 45), (23, 15), (9, 5)):
        pixels_of(data, enough)
    picture = Pictures([Record(data, None)])[0]  # type: ignore[arg-type]
    assert picture.size == read_size(data) == upright.shape[1::-1]


def test_pictures__exif_counts_before_xmp():
    plain = encoded(textured(6, (90, 60)))
    for tags in (exif_segment(6) + xmp_segment(3), xmp_segment(3) + exif_segment(6)):
        data = with_inserted(plain, tags, behind_frame=False)

        np.testing.assert_array_equal(pixels_of(data), np.rot90(pixels_of(plain), -1))


def test_pictures__what_is_tagged_and_upright_is_plain(monkeypatch: pytest.MonkeyPatch):
    plain = jpegs()["4:2:0"]
    want = by_decode(plain, ENOUGH)
    monkeypatch.setattr("mimray.trainers.data.decoded.decode", None)

    for tag in (exif_segment(1), xmp_segment(1), exif_segment(77), segment(0xE1, b"")):
        data = with_inserted(plain, tag, behind_frame=False)
        np.testing.assert_array_equal(by_pictures(data, ENOUGH), want)


# Refusals


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((9500, 9500), "too_large"),  # Pillow warns
        ((65_000, 1400), "too_large"),
        ((30_000, 30_000), "too_large"),  # Pillow raises
        ((65_535, 65_535), "too_large"),
        ((1, 34), "too_small"),
        ((45, 1), "too_small"),
        ((1, 1), "too_small"),
        ((65_535, 1), "too_small"),
    ],
)
@pytest.mark.parametrize("name", ["4:2:0", "gray", "progressive", "upright"])
def test_pictures__sizes_are_refused_by_the_header_alone(
    name: str, size: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mimray.trainers.data.decoded.decode_plain", None)
    data = with_frame(jpegs()[name], width=size[0], height=size[1])

    assert reason_of(data) == reason


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 1)])
def test_pictures__whole_ones_with_a_side_of_1_are_too_small(size: tuple[int, int]):
    assert reason_of(encoded(textured(0, size))) == "too_small"


@pytest.mark.parametrize("size", [(2, 2), (2, 50), (50, 2), (3, 200)])
def test_pictures__a_side_of_2_is_enough(size: tuple[int, int]):
    assert pixels_of(encoded(textured(0, size))).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("change", [(1, 0), (-1, 0), (0, 1), (0, -1), (19, 0), (0, 30), (-20, -9)])
@pytest.mark.parametrize("name", ["4:2:0", "gray", "progressive", "restarts"])
def test_pictures__a_header_of_another_size_than_the_pixels(name: str, change: tuple[int, int]):
    data = with_frame(jpegs()[name], width=45 + change[0], height=34 + change[1])

    check(data)
    check(data, (5, 4))


# Damage


@pytest.mark.parametrize("name", NAMES)
def test_pictures__cut_anywhere_are_refused_as_decode_does(name: str):
    data = jpegs()[name]
    end = data.find(b"\xff\xd8", 2) if name == "two" else len(data)

    reasons = Counter(reason_of(data[:length]) for length in range(end))

    assert set(reasons) == {"empty", "not_an_image", "broken", "truncated"}
    assert reasons["truncated"] > 100


@pytest.mark.parametrize("name", NAMES)
def test_pictures__with_any_byte_changed_are_those_of_decode(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    data = jpegs()[name]
    plainly = Mock(wraps=decode_plain)
    monkeypatch.setattr("mimray.trainers.data.decoded.decode_plain", plainly)
    outcomes: Counter[str] = Counter()

    for place in range(len(data) // 2 if name == "two" else len(data)):
        value = (data[place] ^ 1 << place % 8, 0, data[place] ^ 0x80, 0xFF)[place % 4]
        changed = data[:place] + bytes([value]) + data[place + 1 :]
        found = check(changed, (5, 4) if place % 3 else ENOUGH)
        outcomes[found[0] if isinstance(found, tuple) else "pixels"] += 1

    # Of each outcome there were many, so that the comparison is not of refusals alone.
    assert outcomes["pixels"] > 200
    assert outcomes.total() - outcomes["pixels"] > 25
    assert (plainly.call_count > 200) == (name in PLAIN_NAMES)


@given(
    name=st.sampled_from(NAMES),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5),
    in_header=st.booleans(),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    inserted=st.tuples(st.floats(0, 1), st.binary(max_size=4)),
    removed=st.tuples(st.floats(0, 1), st.integers(0, 3)),
    enough=st.sampled_from([ENOUGH, (20, 15), (11, 8), (5, 4), (1, 1)]),
)
@settings(max_examples=1500)
def test_pictures__damaged_in_any_way_are_those_of_decode(
    name: str,
    changes: list[tuple[float, int]],
    in_header: bool,
    cut: float | None,
    inserted: tuple[float, bytes],
    removed: tuple[float, int],
    enough: tuple[int, int],
):
    data = bytearray(jpegs()[name])
    reach = min(700, len(data)) if in_header else len(data)
    for where, value in changes:
        data[int(where * (reach - 1))] = value
    place = int(inserted[0] * reach)
    data[place:place] = inserted[1]
    place = int(removed[0] * reach)
    del data[place : place + removed[1]]
    if cut is not None:
        del data[int(cut * len(data)) :]

    check(bytes(data), enough)


@given(
    name=st.sampled_from(PLAIN_NAMES),
    bits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=3),
    enough=st.sampled_from([ENOUGH, (20, 15), (11, 8), (5, 4)]),
)
@settings(max_examples=800)
def test_pictures__with_bits_of_the_coded_pixels_flipped_are_those_of_decode(
    name: str, bits: list[tuple[float, int]], enough: tuple[int, int]
):
    data = bytearray(jpegs()[name])
    start = data.find(b"\xff\xda")
    for where, bit in bits:
        data[start + int(where * (len(data) - 1 - start))] ^= 1 << bit

    check(bytes(data), enough)
