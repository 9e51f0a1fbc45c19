"""Pictures that hold more than 8-bit RGB, and what must not keep one from being read."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mimray.trainers.data import png, tiff
from mimray.trainers.data.canonical import canonicalise
from mimray.trainers.data.decode import (
    AS_STORED,
    Note,
    PictureFile,
    Reading,
    decode,
    decode_rgb,
    read_orientation,
    read_size,
)
from mimray.trainers.data.ingest import Preparation, _rows
from mimray.trainers.data.ingest_plan import SourcePicture
from mimray.trainers.data.pages import choose_pages
from mimray.trainers.errors import ImageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")
tifffile = pytest.importorskip("tifffile")


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tiff(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with more chunks, behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def random_pixels(shape: tuple[int, ...], dtype: type = np.uint8, below: int = 256) -> np.ndarray:
    return np.random.default_rng(3).integers(0, below, shape).astype(dtype)


PLAIN = encode(Image.fromarray(random_pixels((8, 6, 3))))
PIXELS = np.asarray(Image.open(io.BytesIO(PLAIN)))
BOMB = zlib.compress(b"\0" * (20 << 20), 9)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"iCCP", b"profile\0\0" + BOMB)],
        [chunk(b"zTXt", b"XML\0\0" + BOMB)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)],
        [chunk(b"tEXt", b"key\0" + b"x" * (3 << 20))],
        [chunk(b"zTXt", b"key\0\0" + zlib.compress(b"x" * 900_000))] * 100,  # 90 MB together
        [chunk(b"zTXt", b"key\0\0 no zlib stream")],
        [chunk(b"iCCP", b"")],
        [chunk(b"pHYs", b"short")],
        [chunk(b"eXIf", b"no EXIF")],
        [chunk(b"tEXt", b"a\0b")[:-4] + b"\0\0\0\0"],  # a wrong checksum
        [chunk(b"prVt", b"of another program")],
    ],
)
@pytest.mark.parametrize("behind", [False, True])
def test_png__metadata_is_no_reason_to_refuse(chunks: list[bytes], behind: bool) -> None:
    data = PLAIN[:-12] + b"".join(chunks) + PLAIN[-12:] if behind else with_chunks(PLAIN, *chunks)
    image, header = decode(data)
    np.testing.assert_array_equal(np.asarray(image), PIXELS)
    assert header.plain
    assert read_size(data) == (6, 8)


def test_png__the_work_on_text_is_bounded() -> None:
    bombs = [chunk(b"zTXt", b"key\0\0" + BOMB)] * 200  # 4 GiB unpacked
    began = time.monotonic()
    assert png.without_metadata(with_chunks(PLAIN, *bombs)) == PLAIN
    assert time.monotonic() - began < 2


def test_png__orientation_in_text_or_exif_stays() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.fromarray(PIXELS), exif=exif)
    bulky = with_chunks(turned, chunk(b"iCCP", b"profile\0\0" + BOMB))
    assert decode(bulky).image.size == decode(turned).image.size == (8, 6)
    text = PngImagePlugin.PngInfo()
    body = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    text.add_text("Raw profile type exif", f"\nexif\n{len(body):8}\n{body.hex()}\n", zip=True)
    assert decode_rgb(encode(Image.fromarray(PIXELS), pnginfo=text)).size == (8, 6)


def test_png__damage_of_what_pixels_need_is_told() -> None:
    data = bytearray(PLAIN)
    data[50] ^= 255
    with pytest.raises(ImageError) as caught:
        decode(bytes(data))
    assert caught.value.reason in ("broken", "truncated")
    assert png.without_metadata(PLAIN) is PLAIN
    assert png.without_metadata(PLAIN[:40]) == PLAIN[:40]


def test_16_bits__the_whole_range_is_rounded_as_before() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image, header = decode(encode(Image.fromarray(values)))
    expected = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)
    assert header.notes == (Note("to_8_bits", "0 to 65535"),)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits__dark_ones_are_noted_and_a_range_cures_them(kind: str) -> None:
    values = random_pixels((16, 16), np.uint16, 4096)
    values[0, :2] = 0, 4095
    data = encode(Image.fromarray(values), kind)
    image, header = decode(data)
    assert len(np.unique(np.asarray(image))) <= 17
    assert Note("dark", "values 0:4095") in header.notes
    image, header = decode(data, reading=Reading(value_range=(0, 4095)))
    expected = np.floor(values * (255 / 4095) + 0.5)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)
    assert header.notes == (Note("to_8_bits", "0 to 4095"),)


def test_16_bits__a_narrow_band_far_from_zero_is_dark_too() -> None:
    values = random_pixels((16, 16), np.uint16, 2000) + np.uint16(32768)
    assert "dark" in {note.reason for note in decode(encode(Image.fromarray(values))).header.notes}


def test_16_bits__values_outside_the_range_are_noted() -> None:
    values = np.array([[0, 100], [200, 300]], np.uint16)
    image, header = decode(encode(Image.fromarray(values)), reading=Reading((100, 200)))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], [[0, 0], [255, 255]])
    assert Note("clipped") in header.notes


def test_16_bits__dark_colour_is_noted_and_a_range_it_cannot_have() -> None:
    values = random_pixels((8, 8, 3), np.uint16, 4096)
    data = write_tiff(values, photometric="rgb")
    assert Note("dark", "colour") in decode(data).header.notes
    unused = decode(data, reading=Reading((0, 4095))).header.notes
    assert Note("range_unused", "TIFF") in unused
    chosen = decode(data, reading=Reading((0, 4095), bands=(1, 2, 3))).image
    np.testing.assert_array_equal(np.asarray(chosen), np.floor(values * (255 / 4095) + 0.5))


def test_png__significant_bits_that_are_not_scaled_are_the_range() -> None:
    values = random_pixels((16, 16), np.uint16, 4096)
    values[0, :2] = 0, 4095
    shallow = with_chunks(encode(Image.fromarray(values)), chunk(b"sBIT", b"\x0c"))
    assert decode(shallow).image.getextrema()[0] == (0, 255)
    # As the standard has it: scaled to 16 bits, so that the whole range is right.
    scaled = (values << 4 | values >> 8).astype(np.uint16)
    data = with_chunks(encode(Image.fromarray(scaled)), chunk(b"sBIT", b"\x0c"))
    assert decode(data).header.notes == (Note("to_8_bits", "0 to 65535"),)
    dark = (random_pixels((16, 16), np.uint16, 100) << 4).astype(np.uint16)
    data = with_chunks(encode(Image.fromarray(dark)), chunk(b"sBIT", b"\x0c"))
    assert decode(data).image.getextrema()[0][1] < 16


def test_float_and_signed_gray_need_a_range() -> None:
    values = np.linspace(-1000, 1000, 64, dtype=np.float32).reshape(8, 8)
    for pixels in (values, values.astype(np.int16), values.astype(np.int32)):
        data = write_tiff(pixels)
        with pytest.raises(ImageError, match="--range LOW:HIGH") as caught:
            decode(data)
        assert caught.value.reason == "unsupported_mode"
        image = decode(data, reading=Reading((-1000, 1000))).image
        assert image.getextrema()[0] == (0, 255)
    values[0, 0] = np.nan
    with pytest.raises(ImageError, match="not finite"):
        decode(write_tiff(values), reading=Reading((-1000, 1000)))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rowsperstrip": 7},
        {"tile": (16, 32)},
        {"compression": "zlib", "predictor": True},
        {"compression": "zlib", "predictor": True, "tile": (16, 32)},
        {"byteorder": ">"},
        {"compression": "zlib", "predictor": True, "byteorder": ">"},
    ],
)
def test_tiff__bands_are_chosen_by_number(
    planar: str, dtype: type, options: dict[str, object]
) -> None:
    values = random_pixels((40, 50, 5), dtype, np.iinfo(dtype).max + 1)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    try:
        data = write_tiff(stored, planarconfig=planar, photometric="minisblack", **options)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"tifffile cannot write it: {error}")
    with pytest.raises(
        ImageError, match=f"TIFF of 5 bands of {8 * values.itemsize} bits"
    ) as caught:
        decode(data)
    assert caught.value.reason == "unsupported_mode"
    assert "--bands" in caught.value.hint
    expected = values if dtype == np.uint8 else (values.astype(np.uint32) + 128) // 257
    image = decode(data, reading=Reading(bands=(4, 3, 1))).image
    np.testing.assert_array_equal(np.asarray(image), expected[..., [3, 2, 0]])
    gray = decode(data, reading=Reading(bands=(5,)))
    np.testing.assert_array_equal(np.asarray(gray.image)[..., 2], expected[..., 4])
    assert gray.header.mode == "L"
    with pytest.raises(ImageError, match="band 6 was asked for"):
        decode(data, reading=Reading(bands=(6,)))


def test_tiff__bands_beside_rgb_are_noted() -> None:
    values = random_pixels((8, 8, 4))
    data = write_tiff(values, photometric="rgb", extrasamples=["unspecified"])
    image, header = decode(data)
    np.testing.assert_array_equal(np.asarray(image), values[..., :3])
    assert header.notes == (Note("bands_left_out", "of 4 bands"),)


def test_tiff__bands_leave_other_formats_alone() -> None:
    image = decode(PLAIN, reading=Reading(bands=(3, 2, 1))).image
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


def test_tiff__only_damage_is_broken() -> None:
    values = random_pixels((20, 20, 4), np.uint16, 65536)
    whole = write_tiff(values, photometric="minisblack", planarconfig="contig")
    for cut in (10, len(whole) // 2):
        with pytest.raises(ImageError) as caught:
            decode(whole[:cut])
        assert caught.value.reason == "broken"
        with pytest.raises(ImageError) as caught:
            decode(whole[:cut], reading=Reading(bands=(1,)))
        assert caught.value.reason == "broken"


@pytest.mark.parametrize("reading", [AS_STORED, Reading((0, 4095), bands=(4, 2, 1))])
def test_tiff__random_damage_never_leaks_another_exception(reading: Reading) -> None:
    values = random_pixels((20, 20, 4), np.uint16, 4096)
    whole = write_tiff(values, photometric="minisblack", planarconfig="contig")
    rng = np.random.default_rng(3)
    for _ in range(200):
        data = bytearray(whole)
        for at in rng.integers(0, 300, rng.integers(1, 6)):
            data[at] = rng.integers(256)
        try:
            decode(bytes(data), reading=reading, max_pixels=10**6)
        except ImageError as error:
            assert error.reason  # noqa: PT017


def test_tiff__pages_are_read_one_by_one() -> None:
    stack = random_pixels((5, 12, 10))
    data = write_tiff(stack, photometric="minisblack")
    assert len(tiff.read_pages(data)) == 5
    for page in range(5):
        image = decode(data, reading=Reading(page=page)).image
        np.testing.assert_array_equal(np.asarray(image)[..., 0], stack[page])


def test_tiff__overviews_and_masks_are_no_pages() -> None:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(random_pixels((64, 64)), photometric="minisblack")
        writer.write(random_pixels((32, 32)), photometric="minisblack", subfiletype=1)
        writer.write(random_pixels((64, 64)), photometric="minisblack")
    pages = tiff.read_pages(buffer.getvalue())
    assert [page.is_page for page in pages] == [True, False, True]
    assert not tiff.Tags({254: 4}).is_page


def test_tiff__a_ring_of_pages_ends() -> None:
    data = bytearray(write_tiff(random_pixels((8, 8)), metadata=None))
    (start,) = struct.unpack_from("<I", data, 4)
    (entries,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * entries, start)
    assert len(tiff.read_pages(bytes(data))) == 1


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0" + b"x" * 50, "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0" + b"x" * 50, "HEIF"),
        (b"\xff\x0a" + b"x" * 50, "JPEG XL"),
        (b"8BPS\0\1" + b"x" * 50, "Photoshop"),
        (b"\0" * 128 + b"DICM" + b"x" * 50, "DICOM"),
    ],
)
def test_formats__that_are_not_read_are_named(data: bytes, name: str) -> None:
    with pytest.raises(ImageError, match=f"{name} is not read") as caught:
        decode(data)
    assert caught.value.reason == "unsupported_format"


def test_jpeg__of_12_bits_is_not_called_broken() -> None:
    data = bytearray(encode(Image.fromarray(PIXELS), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ImageError, match="JPEG of 12 bits a channel") as caught:
        decode(bytes(data))
    assert caught.value.reason == "unsupported_mode"


@pytest.mark.parametrize(
    ("make", "notes"),
    [
        (lambda: encode(Image.new("RGBA", (4, 4), (1, 2, 3, 100))), {"on_white"}),
        (lambda: encode(Image.new("RGBA", (4, 4), (1, 2, 3, 255))), set()),
        (lambda: encode(Image.new("CMYK", (4, 4)), "JPEG"), {"cmyk"}),
        (lambda: PLAIN, set()),
    ],
)
def test_notes__say_what_was_lost(make: Callable[[], bytes], notes: set[str]) -> None:
    assert {note.reason for note in decode(make()).header.notes} == notes


def test_tiff__12_bits_are_their_own_range(tmp_path: Path) -> None:
    packed = np.arange(4096, dtype=np.uint16)
    first, second = packed[::2], packed[1::2]
    body = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1)
    whole = tiff._with_tags(
        b"II*\0\0\0\0\0" + body.astype(np.uint8).tobytes(),
        {256: 64, 257: 64, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: 6144},
    )
    image, header = decode(whole)
    assert image.getextrema()[0] == (0, 255)
    assert header.notes == (Note("to_8_bits", "0 to 4095"),)


def test_tiff__16_bits_of_which_0_is_white_are_turned() -> None:
    values = random_pixels((8, 8), np.uint16, 65536)
    data = write_tiff(values, photometric="miniswhite", metadata=None)
    expected = 255 - (values.astype(np.uint32) + 128) // 257
    for reading in (AS_STORED, Reading(bands=(1,))):
        image = decode(data, reading=reading).image
        np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)


def test_tiff__8_bits_of_which_0_is_white_are_the_same_by_bands() -> None:
    values = random_pixels((8, 8))
    data = write_tiff(values, photometric="miniswhite", metadata=None)
    for reading in (AS_STORED, Reading(bands=(1,)), Reading(bands=(1, 1, 1))):
        image = decode(data, reading=reading).image
        np.testing.assert_array_equal(np.asarray(image)[..., 0], 255 - values)


@pytest.mark.parametrize("predictor", [2, 3])
@pytest.mark.parametrize("planar", [1, 2])
def test_tiff__what_is_not_compressed_has_no_predictor(predictor: int, planar: int) -> None:
    values = random_pixels((8, 6, 3))
    body = (values if planar == 1 else values.transpose(2, 0, 1)).tobytes()
    num_strips = 1 if planar == 1 else 3
    data = tiff._with_tags(
        b"II*\0\0\0\0\0" + body,
        {
            256: 6,
            257: 8,
            258: (8, 8, 8),
            259: 1,
            262: 2,
            277: 3,
            278: 8,
            284: planar,
            273: tuple(8 + i * 144 // num_strips for i in range(num_strips)),
            279: (144 // num_strips,) * num_strips,
            317: predictor,
        },
    )
    for reading in (AS_STORED, Reading(bands=(1, 2, 3))):
        np.testing.assert_array_equal(np.asarray(decode(data, reading=reading).image), values)


def many_bands(width: int, height: int, num_bands: int) -> bytes:
    """A TIFF of one strip of zeros, Deflate."""
    packed = zlib.compress(bytes(width * height * num_bands), 1)
    return tiff._with_tags(
        b"II*\0\0\0\0\0" + packed,
        {
            256: width,
            257: height,
            258: 8,
            259: 8,
            262: 1,
            273: 8,
            277: num_bands,
            278: height,
            279: len(packed),
            284: 1,
        },
    )


def test_tiff__bands_together_may_be_more_than_pillow_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48)
    data = many_bands(64, 48, 13)
    assert decode(data, reading=Reading(bands=(4, 3, 2))).image.size == (64, 48)
    monkeypatch.setattr(tiff, "MAX_BAND_BYTES", 64 * 48 * 12)
    with pytest.raises(ImageError, match="64 x 48 pixels of 13 bands of 8 bits take") as caught:
        decode(data, reading=Reading(bands=(4, 3, 2)))
    assert caught.value.reason == "too_large"
    assert "bomb" not in str(caught.value)


# A short text, a fraction 0 / 0, bytes, a negative number, no number at all.
_ODD = {
    "ascii": (2, b"x\0"),
    "rational": (5, bytes(8)),
    "undefined": (7, b"abcd"),
    "float": (11, struct.pack("<f", float("nan"))),
    "negative": (9, struct.pack("<i", -5)),
    "none": (3, b""),
    "two": (3, struct.pack("<2H", 8, 8)),
}
_SIZES = {2: 1, 3: 2, 5: 8, 7: 1, 9: 4, 11: 4}


def with_odd_tag(tag: int, kind: str) -> bytes:
    code, body = _ODD[kind]
    count = len(body) // _SIZES[code]
    values = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    entries = {t: struct.pack("<HHII", t, 4, 1, v) for t, v in values.items()}
    if len(body) > 4:
        start = 8 + 64
        entries[tag] = struct.pack("<HHII", tag, code, count, start)
    else:
        entries[tag] = struct.pack("<HHI", tag, code, count) + body.ljust(4, b"\0")
    directory = struct.pack("<H", len(entries)) + b"".join(entries[t] for t in sorted(entries))
    return (
        b"II*\0"
        + struct.pack("<I", 8 + 64 + 8)
        + bytes(64)
        + body.ljust(8, b"\0")
        + directory
        + bytes(4)
    )


@pytest.mark.parametrize("kind", _ODD)
@pytest.mark.parametrize(
    "tag", [254, 256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 322, 324, 325, 339]
)
def test_tiff__odd_tags_never_leak_another_exception(tag: int, kind: str) -> None:
    data = with_odd_tag(tag, kind)
    for read in (
        lambda: decode(data),
        lambda: decode(data, reading=Reading(bands=(1,))),
        lambda: decode(data, reading=Reading(page=0)),
        lambda: choose_pages(data, every_page=True),
        lambda: read_size(data),
        lambda: read_orientation(data),
        lambda: canonicalise(data, 4),
    ):
        try:
            read()
        except ImageError as error:
            assert error.reason in ("broken", "unsupported_mode", "truncated", "too_large")  # noqa: PT017


def test_tiff__odd_tags_are_damage_unless_pixels_do_not_need_them() -> None:
    with pytest.raises(ImageError) as caught:
        decode(with_odd_tag(258, "ascii"))
    assert caught.value.reason == "broken"
    for tag in (254, 274):
        assert decode(with_odd_tag(tag, "ascii"), reading=Reading(bands=(1,))).image.size == (8, 8)


def thumbnail_first() -> tuple[bytes, np.ndarray]:
    pixels = random_pixels((64, 48))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(pixels[::8, ::8], photometric="minisblack", subfiletype=1)
        writer.write(pixels, photometric="minisblack")
    return buffer.getvalue(), pixels


def test_tiff__a_leading_thumbnail_is_passed_over_by_all_who_read() -> None:
    data, pixels = thumbnail_first()
    assert choose_pages(data).indices == (1,)
    assert read_size(data) == (48, 64)
    for reading in (AS_STORED, Reading(bands=(1,))):
        image, header = decode(data, reading=reading)
        assert (header.width, header.height) == (48, 64)
        np.testing.assert_array_equal(np.asarray(image)[..., 0], pixels)
    assert canonicalise(data, None).width == 48
    assert decode(data, reading=Reading(page=0)).image.size == (6, 8)


@pytest.mark.parametrize("bands", [None, (1,)])
def test_tiff__every_page_is_read_in_one_go(
    monkeypatch: pytest.MonkeyPatch, bands: tuple[int, ...] | None
) -> None:
    stack = random_pixels((60, 8, 6))
    data = write_tiff(stack, photometric="minisblack", metadata=None)
    num_loads = 0
    load = ImageFileDirectory_v2.load

    def counted(self: ImageFileDirectory_v2, file: object) -> None:
        nonlocal num_loads
        num_loads += 1
        load(self, file)

    monkeypatch.setattr(ImageFileDirectory_v2, "load", counted)
    prepare = Preparation(reading=Reading(bands=bands), every_page=True)
    rows = list(_rows(SourcePicture("a.tif", None, data), prepare))
    assert [row["source"] for row in rows] == [f"a.tif#page={n}" for n in range(1, 61)]
    for page, row in zip(stack, rows, strict=True):
        np.testing.assert_array_equal(np.asarray(decode_rgb(row["image"]))[..., 0], page)
    assert num_loads < 5 * len(stack)


def test_tiff__pages_of_one_file_turn_each_by_itself() -> None:
    pages = [Image.fromarray(pixels) for pixels in random_pixels((3, 8, 6))]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:], tiffinfo={274: 6})
    file = PictureFile(data)
    together = [decode(file, reading=Reading(page=n)) for n in range(3)]
    alone = [decode(data, reading=Reading(page=n)) for n in range(3)]
    assert [header for _, header in together] == [header for _, header in alone]
    for (first, _), (second, _) in zip(together, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(
    "bulk",
    [
        [chunk(b"tEXt", b"workflow\0" + b"x" * (2 << 20))],
        [chunk(b"tEXt", b"workflow\0" + b"x" * 60_000)] * 20,
        [chunk(b"zTXt", b"key\0\0 no zlib stream")],
        [chunk(b"zTXt", b"Raw profile type exif\0\0 no zlib stream")] * 3,
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)] * 3,
    ],
)
def test_png__orientation_behind_large_or_damaged_text_stays(bulk: list[bytes]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.fromarray(PIXELS), exif=exif)
    assert decode(with_chunks(turned, *bulk)).header.orientation == 6
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="6"/>'
    assert decode(with_chunks(PLAIN, *bulk, chunk(b"iTXt", xmp))).header.orientation == 6


def test_png__orientation_in_a_large_exif_stays() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * (2 << 20)
    assert decode(encode(Image.fromarray(PIXELS), exif=exif)).header.orientation == 6


def test_png__unpacking_is_bounded_over_all_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[int] = []
    count = png._text_bytes

    def counted(name: bytes, content: bytes, limit: int) -> int:
        unpacked.append(min(count(name, content, limit), limit))
        return count(name, content, limit)

    monkeypatch.setattr(png, "_text_bytes", counted)
    bombs = [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)] * 50
    assert png.without_metadata(with_chunks(PLAIN, *bombs)) == PLAIN
    assert sum(unpacked) == png.MAX_UNPACKED_BYTES
