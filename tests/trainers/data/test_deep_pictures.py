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

from mimray.trainers.data import png, tiff
from mimray.trainers.data.decode import AS_STORED, Note, Reading, decode, decode_rgb, read_size
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
