from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.data.canonical import canonicalise
from mimray.trainers.data.decode import decode, decode_rgb
from mimray.trainers.errors import ImageError


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    planes = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_normalise__leaves_good_bytes_alone(kind: str, mode: str) -> None:
    data = encode(smooth(90, 64).convert(mode), kind)
    assert canonicalise(data, 64)[:4] == (data, 90, 64, False)
    assert canonicalise(data, None)[:4] == (data, 90, 64, False)


def test_normalise__shrinks_a_large_picture_to_jpeg() -> None:
    source = smooth(900, 600)
    data, width, height, reencoded, _ = canonicalise(encode(source, "JPEG", quality=95), 100)
    image, header = decode(data)
    assert (width, height, reencoded) == (150, 100, True)
    assert header.format == "JPEG"
    expected = np.asarray(source.resize((150, 100), Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(np.asarray(image) - expected).mean() < 1.5


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_normalise__lossless_formats_become_png_without_loss(kind: str) -> None:
    data = encode(smooth(40, 30), kind)
    stored = canonicalise(data, 64)
    image, header = decode(stored.data)
    assert stored.reencoded
    assert header.format == "PNG"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(decode_rgb(data)))


def test_normalise__turned_jpeg_is_stored_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = canonicalise(encode(smooth(60, 40), "JPEG", exif=exif, quality=95), 64)
    image, header = decode(stored.data)
    assert (stored.width, stored.height) == (40, 60) == image.size
    assert header.plain


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_normalise__output_is_rgb_or_gray(mode: str) -> None:
    stored = canonicalise(encode(smooth(300, 200).convert(mode), "JPEG"), 64)
    assert decode(stored.data).header.mode == ("L" if mode == "L" else "RGB")


def test_normalise__16_bit_gray_becomes_8_bit_gray() -> None:
    values = np.linspace(0, 65535, 900).round().astype(np.uint16).reshape(30, 30)
    stored = canonicalise(encode(Image.fromarray(values), "PNG"), 64)
    image, header = decode(stored.data)
    assert (header.mode, header.plain) == ("L", True)
    np.testing.assert_allclose(np.asarray(image)[..., 0], values / 257, atol=0.51)


def test_normalise__truncation_shows_in_large_and_small_pictures() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    for short_side_px in (None, 64, 2000):
        with pytest.raises(ImageError, match="too early"):
            canonicalise(encode(noise, "JPEG")[:-5000], short_side_px)
