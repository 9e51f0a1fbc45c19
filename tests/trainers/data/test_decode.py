from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from mimray.trainers.data.decode import (
    decode,
    decode_rgb,
    draft_scale,
    read_size,
    resized_short_side,
)
from mimray.trainers.errors import ImageError


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 24, width: int = 40, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int = 64, width: int = 96) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    planes = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_decode__rgb_png_is_exact_and_plain() -> None:
    pixels = noise()
    image, header = decode(encode(Image.fromarray(pixels)))
    np.testing.assert_array_equal(np.asarray(image), pixels)
    assert (header.width, header.height, header.plain) == (40, 24, True)


def test_decode__gray_is_repeated() -> None:
    pixels = noise(channels=1)
    image = decode_rgb(encode(Image.fromarray(pixels)))
    np.testing.assert_array_equal(np.asarray(image), np.repeat(pixels[..., None], 3, 2))


def test_decode__one_bit_is_black_and_white() -> None:
    bits = noise(channels=1) > 127
    image = decode_rgb(encode(Image.fromarray(bits)))
    np.testing.assert_array_equal(np.asarray(image)[..., 0], bits * np.uint8(255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_decode__16_bit_gray_is_scaled_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 24 * 40).round().astype(np.uint16).reshape(24, 40)
    image = decode_rgb(encode(Image.fromarray(values), kind))
    expected = np.round(values / 65535 * 255)
    np.testing.assert_allclose(np.asarray(image)[..., 1], expected, atol=0.5)
    assert np.asarray(image).max() == 255


def test_decode__float_pixels_are_refused() -> None:
    with pytest.raises(ImageError) as caught:
        decode_rgb(encode(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))
    assert caught.value.reason == "unsupported_mode"


def test_decode__palette_is_looked_up() -> None:
    paletted = smooth().quantize(16)
    np.testing.assert_array_equal(
        np.asarray(decode_rgb(encode(paletted))), np.asarray(paletted.convert("RGB"))
    )


def test_decode__palette_transparency_is_laid_on_white() -> None:
    paletted = Image.new("P", (4, 4), 1)
    paletted.putpalette([10, 20, 30, 200, 100, 0])
    paletted.putpixel((0, 0), 0)
    image = decode_rgb(encode(paletted, transparency=0))
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((1, 1)) == (200, 100, 0)


def test_decode__alpha_is_laid_on_white() -> None:
    pixels = noise(channels=4)
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    image = decode_rgb(encode(Image.fromarray(pixels)))
    np.testing.assert_allclose(np.asarray(image), expected, atol=1)


def test_decode__gray_alpha_is_laid_on_white() -> None:
    pixels = Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 0)])
    assert decode_rgb(encode(pixels)).getpixel((2, 2)) == (255, 255, 255)


def test_decode__rgb_with_transparent_colour_is_laid_on_white() -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    decoded, header = decode(encode(image, transparency=(1, 2, 3)))
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert not header.plain


def test_decode__cmyk_jpeg() -> None:
    image = decode_rgb(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    np.testing.assert_allclose(image.getpixel((5, 5)), (255, 0, 0), atol=4)


def test_decode__16_bit_rgb_png_is_not_plain() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 65535, 32768, 0) * 4 for _ in range(4))
    ihdr = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", ihdr), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    image, header = decode(data)
    assert image.getpixel((1, 1)) == (255, 128, 0)
    assert not header.plain


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_decode__animation_gives_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    image, header = decode(data)
    assert image.getpixel((3, 3)) == (255, 0, 0)
    assert not header.plain


# What a viewer must do with stored pixels, in NumPy's words (EXIF 2.3, tag 0x0112).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: np.rot90(a, 2),
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_decode__orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = smooth()
    stored = np.asarray(decode_rgb(encode(source, kind)))
    data = encode(source, kind, exif=exif)
    image, header = decode(data)
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation](stored))
    assert read_size(data) == image.size == (header.width, header.height)
    assert header.plain == (orientation == 1 and kind in ("PNG", "JPEG"))


def test_decode__damaged_exif_counts_as_upright() -> None:
    data = encode(smooth(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert decode_rgb(data).size == (96, 64)


def test_decode__draft_covers_the_wanted_size_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (1600, 800)), "JPEG", exif=exif)
    image, header = decode(data, draft_size=(100, 200))
    assert image.size == (200, 400)
    assert (header.width, header.height) == (800, 1600)


@pytest.mark.parametrize(("enough", "decoded"), [(101, 400), (100, 200), (50, 100), (400, 800)])
def test_decode__draft_keeps_twice_what_is_needed(enough: int, decoded: int) -> None:
    data = encode(Image.new("RGB", (800, 800)), "JPEG")
    assert decode_rgb(data, draft_size=(enough, enough)).size == (decoded, decoded)
    assert draft_scale((800, 800), (enough, enough)) == 800 // decoded


def test_decode__draft_keeps_the_detail_of_what_is_resampled_from_it() -> None:
    # Amplitudes fall with frequency, as those of photographs do.
    height, width = 480, 720
    noise = np.fft.fft2(np.random.default_rng(3).normal(size=(height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    pixels = np.fft.ifft2(noise / frequency).real
    picture = Image.fromarray(np.clip(128 + 40 * pixels / pixels.std(), 0, 255).astype(np.uint8))
    data = encode(picture, "JPEG", quality=95)
    view = (150, 100)

    def gradient_energy(image: Image.Image) -> float:
        shown = np.asarray(image.resize(view, Image.Resampling.BICUBIC), np.float64)
        return float(sum((np.diff(shown, axis=axis) ** 2).sum() for axis in (0, 1)))

    whole = gradient_energy(decode_rgb(data))
    drafted = decode_rgb(data, draft_size=view)
    assert drafted.size == (360, 240)
    assert gradient_energy(drafted) > 0.95 * whole
    # The lowest scale that is not smaller than the view.
    least = Image.open(io.BytesIO(data))
    least.draft(None, view)
    assert gradient_energy(least.convert("RGB")) < 0.85 * whole


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"just some text\n" * 20, "not_an_image"),
        (encode(Image.new("RGB", (1, 1))), "too_small"),
        (encode(Image.new("RGB", (500, 1))), "too_small"),
        (png_header(30_000, 30_000), "too_large"),
        (png_header(10_000, 10_000), "too_large"),
        (encode(Image.fromarray(noise(200, 200)), "JPEG")[:-2000], "truncated"),
        (encode(Image.fromarray(noise(200, 200)), "PNG")[:-2000], "truncated"),
        (encode(smooth(), "JPEG")[:20], "broken"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decode__refuses_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode_rgb(data)
    assert caught.value.reason == reason
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_decode__random_damage_never_leaks_another_exception(kind: str) -> None:
    clean = encode(smooth(), kind)
    rng = np.random.default_rng(3)
    for _ in range(150):
        data = bytearray(clean)
        for at in rng.integers(0, len(data), rng.integers(1, 12)):
            data[at] = rng.integers(256)
        try:
            image = decode_rgb(bytes(data[: rng.integers(1, len(data) + 1)]), max_pixels=10**6)
        except ImageError as error:
            assert error.reason  # noqa: PT017
        else:
            assert image.mode == "RGB"


def test_resized_short_side__shrinks_and_never_enlarges() -> None:
    assert resized_short_side(Image.new("RGB", (400, 300)), 150).size == (200, 150)
    assert resized_short_side(Image.new("RGB", (40, 5000)), 20).size == (20, 2500)
    small = Image.new("RGB", (40, 30))
    assert resized_short_side(small, 150) is small
