"""Pictures kept decoded: whatever happens, a sample is the one that decoding gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from mimray.trainers.config.run import Recipe, essential, parse_recipe, resolve
from mimray.trainers.data.arena import open_arena
from mimray.trainers.data.decode import decode, draft_scale, read_size
from mimray.trainers.data.decoded import Pictures, decoded_bytes, release
from mimray.trainers.data.jpeg import decode_plain
from mimray.trainers.data.loader import Place, Samples, make_loader
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.errors import DataError, EmptyDatasetError
from mimray.trainers.methods.catalogue import inputs_of
from tests.trainers.data.encoding import encoded, turned

MIB = 8


def smooth(number: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def late_exif() -> bytes:
    """A PNG that says behind its pixels how it is turned."""
    data = encoded(smooth(9, (60, 40)), "PNG")
    chunk = io.BytesIO()
    PngImagePlugin.putchunk(chunk, b"eXIf", turned(6).tobytes()[6:])
    return data[:-12] + chunk.getvalue() + data[-12:]


PICTURES = {
    "large.jpg": encoded(smooth(0, (301, 227)), "JPEG"),
    "small.jpg": encoded(smooth(1, (19, 17)), "JPEG"),
    "turned6.jpg": encoded(smooth(2, (260, 130)), "JPEG", exif=turned(6)),
    "turned5.jpg": encoded(smooth(3, (131, 267)), "JPEG", exif=turned(5)),
    "turned3.png": encoded(smooth(4, (90, 50)), "PNG", exif=turned(3)),
    "gray.jpg": encoded(smooth(5, (200, 200)).convert("L"), "JPEG"),
    "cmyk.jpg": encoded(smooth(6, (150, 170)).convert("CMYK"), "JPEG"),
    "alpha.png": encoded(smooth(7, (70, 40)).convert("RGBA"), "PNG"),
    "two.jpg": encoded(
        smooth(8, (140, 99)), "MPO", save_all=True, append_images=[smooth(9, (140, 99))]
    ),
    "late.png": late_exif(),
    "picture.webp": encoded(smooth(10, (128, 128)), "WEBP"),
}
# Those that have a faster way than `decode`.
PLAIN = ("large.jpg", "small.jpg", "gray.jpg", "two.jpg")


def write(folder: Path, pictures: dict[str, bytes]) -> Source:
    folder.mkdir()
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    return open_source(str(folder))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return write(tmp_path / "pictures", PICTURES)


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whatever reads a header or pixels fail."""
    for name in ("read_frame", "decode_plain", "PictureFile", "decode"):
        monkeypatch.setattr(f"mimray.trainers.data.decoded.{name}", None)


def recipe_of(cache_mib: int, *, beit: bool = False, **data: Any) -> Recipe:
    method: dict[str, Any] = {"name": "mae"}
    if beit:
        method = {"name": "beit", "tokenizer_image_size": (48, 48), "min_block_patches": 2}
    return parse_recipe(
        {
            "encoder": {"name": "vit_tiny", "depth": 1, "patch_size": 8},
            "method": method,
            "data": {
                "image_size": 32,
                "num_workers": 0,
                "crop_scale": (0.1, 1.0),
                "decoded_cache_mib": cache_mib,
                **data,
            },
            "optim": {"batch_size": 4, "steps": 11},
            "seed": 3,
        }
    )


@given(
    size=st.tuples(st.integers(2, 300), st.integers(2, 300)),
    enough=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    orientation=st.integers(1, 8),
)
@settings(max_examples=150)
def test_draft_scale__is_what_decoding_divides_by(
    size: tuple[int, int], enough: tuple[int, int], orientation: int
):
    data = encoded(Image.new("RGB", size), "JPEG", exif=turned(orientation))
    stored = read_size(data)

    image = decode(data, draft_size=enough).image

    scale = draft_scale(stored, enough)
    assert image.size == tuple(-(-side // scale) for side in stored)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 1},
        {"beit": True, "color_jitter": 0.4},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
    ],
)
def test_views__a_cache_changes_no_sample(node: Path, source: Source, options: dict[str, Any]):
    plain = Samples(source, recipe_of(0, **options), inputs_of(recipe_of(0, **options)))
    cached, later = (
        Samples(source, recipe_of(MIB, **options), inputs_of(recipe_of(MIB, **options)))
        for _ in range(2)
    )

    for epoch in range(12):
        for index in range(len(source)):
            place = Place(epoch, index)
            want = plain[place]
            for views in (cached, later):
                found = views[place]
                np.testing.assert_array_equal(found.inputs["images"], want.inputs["images"])
                if "tokenizer_images" in want.inputs:
                    np.testing.assert_array_equal(
                        found.inputs["tokenizer_images"], want.inputs["tokenizer_images"]
                    )
    arena = open_arena(source.facts.fingerprint, len(source), MIB)
    assert arena is not None
    assert all(arena.known(index) for index in range(len(source)))


@pytest.mark.parametrize("name", PICTURES)
def test_pictures__at_every_scale_those_of_decode(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    decoding, plainly = Mock(wraps=decode), Mock(wraps=decode_plain)
    monkeypatch.setattr("mimray.trainers.data.decoded.decode", decoding)
    monkeypatch.setattr("mimray.trainers.data.decoded.decode_plain", plainly)
    source = write(tmp_path / "one", {name: PICTURES[name]})
    pictures = Pictures(source, cache_mib=MIB)
    width, height = read_size(PICTURES[name])

    for times in (1.5, 0.5, 3, 1, 16, 2, 4, 8, 6, 24) * 2:
        enough = (max(1, int(width / times)), max(1, int(height / times)))
        want = np.asarray(decode(PICTURES[name], draft_size=enough).image)
        picture = pictures[0]
        found = picture.decoded(enough)
        assert (found.dtype, found.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(found, want)
        assert picture.size == (width, height)
    # Once a scale that there is.
    scales = 4 if name.endswith(".jpg") else 1
    assert plainly.call_count == (scales if name in PLAIN else 0)
    assert decoding.call_count == (0 if name in PLAIN else scales)


@pytest.mark.parametrize("cache_mib", [0, MIB])
@pytest.mark.parametrize("name", PICTURES)
def test_picture__asked_twice_gives_each_scale_as_decode_does(
    node: Path, tmp_path: Path, name: str, cache_mib: int
):
    source = write(tmp_path / "one", {name: PICTURES[name]})
    picture = Pictures(source, cache_mib=cache_mib)[0]
    width, height = picture.size

    for times in (8, 1, 4, 2, 16):
        enough = (max(1, width // times), max(1, height // times))
        want = np.asarray(decode(PICTURES[name], draft_size=enough).image)
        np.testing.assert_array_equal(picture.decoded(enough), want)


def test_pictures__what_is_there_is_neither_read_nor_decoded(
    node: Path, taped: Any, monkeypatch: pytest.MonkeyPatch
):
    whole = (10_000, 10_000)
    for index in range(len(taped)):
        Pictures(taped, cache_mib=MIB)[index].decoded(whole)
    assert taped.read == list(range(len(taped)))
    forbid_decoding(monkeypatch)
    again = Pictures(taped, cache_mib=MIB)

    for index in range(len(taped)):
        again[index].decoded(whole)

    assert taped.read == list(range(len(taped)))


def test_pictures__labels_are_read_and_the_pixels_are_not_decoded(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for label in "ab":
        (tmp_path / "classes" / label).mkdir(parents=True)
        (tmp_path / "classes" / label / "0.png").write_bytes(PICTURES["turned3.png"])
        (tmp_path / "classes" / label / "1.jpg").write_bytes(PICTURES["large.jpg"])
    source = open_source(str(tmp_path / "classes"))
    for index in range(4):
        Pictures(source, cache_mib=MIB)[index].decoded((9, 9))
    forbid_decoding(monkeypatch)
    pictures = Pictures(source, cache_mib=MIB, labels=True)

    for index, (label, shape) in enumerate(
        [(0, (50, 90, 3)), (0, (29, 38, 3)), (1, (50, 90, 3)), (1, (29, 38, 3))]
    ):
        assert pictures[index].label == label
        assert pictures[index].decoded((9, 9)).shape == shape


def test_views__broken_pictures_are_told_each_time_and_never_kept(node: Path, tmp_path: Path):
    broken = {
        "a.jpg": PICTURES["large.jpg"][:900],
        "b.png": b"no picture",
        "c.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "d.png": PICTURES["turned3.png"],
    }
    source = write(tmp_path / "broken", broken)
    plain, cached = (Samples(source, recipe_of(mib), inputs_of(recipe_of(mib))) for mib in (0, MIB))

    for epoch in range(3):
        for index in range(4):
            want, found = plain[Place(epoch, index)], cached[Place(epoch, index)]
            np.testing.assert_array_equal(found.inputs["images"], want.inputs["images"])
            assert found.problems == want.problems
            assert len(found.problems) == 3 - index
    kept = open_arena(source.facts.fingerprint, 4, MIB)
    assert kept is not None
    assert [kept.known(index) is not None for index in range(4)] == [False, False, False, True]
    failing = Samples(
        source, recipe_of(MIB, on_bad="fail"), inputs_of(recipe_of(MIB, on_bad="fail"))
    )
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jpg: the file ends too early"):
            failing[Place(0, 0)]


def test_loader__decode_processes_share_what_they_decode(tmp_path: Path):
    # In the node's real shared memory: nothing is patched in the decode processes.
    source = write(tmp_path / "pictures", PICTURES)
    try:
        batches = []
        for mib in (0, MIB):
            plan = resolve(recipe_of(mib, num_workers=2 if mib else 0), source.facts, 1)
            batches.append(list(make_loader(source, plan, inputs_of(plan.recipe))))
        for plain, cached in zip(*batches, strict=True):
            assert plain.inputs["images"].equal(cached.inputs["images"])
        kept = open_arena(source.facts.fingerprint, len(source), MIB)
        assert kept is not None
        assert all(kept.known(index) for index in range(len(source)))
    finally:
        release(source.facts.fingerprint)
    empty = open_arena(source.facts.fingerprint, len(source), MIB)
    assert empty is not None
    assert empty.known(0) is None
    release(source.facts.fingerprint)


def test_config__the_cache_is_no_part_of_a_runs_identity():
    assert essential(recipe_of(MIB)) == essential(recipe_of(0))


def test_decoded_bytes__is_what_an_arena_takes(node: Path, tmp_path: Path):
    sizes = [(40 + 7 * i, 90 - 3 * i) for i in range(12)]
    pngs = {f"{i:02}.png": encoded(smooth(i, size), "PNG") for i, size in enumerate(sizes)}
    folder = write(tmp_path / "folder", pngs)
    (tmp_path / "parquet").mkdir()
    width, height = zip(*sizes, strict=True)
    table = pa.table({"image": list(pngs.values()), "width": width, "height": height})
    pq.write_table(table, tmp_path / "parquet/a.parquet")

    needed = decoded_bytes(folder)

    assert needed == decoded_bytes(open_source(str(tmp_path / "parquet")))
    assert decoded_bytes(folder, sample=4) == pytest.approx(needed, rel=0.3)
    pictures = Pictures(folder, cache_mib=1)
    for index in range(12):
        pictures[index].decoded((1, 1))
    kept = open_arena(folder.facts.fingerprint, 12, 1)
    assert kept is not None
    (taken,) = {path.read_bytes()[:8] for path in node.rglob("state")}
    assert int.from_bytes(taken, "little") + (1 << 20) - kept.bound == needed


def test_decoded_bytes__broken_pictures_are_passed_over(tmp_path: Path):
    some = {"a.png": b"broken", "b.png": PICTURES["alpha.png"]}
    broken = {"a.png": b"broken"}

    assert decoded_bytes(write(tmp_path / "some", some)) == 2 * (24 + 3 * 70 * 40 + 32)
    with pytest.raises(EmptyDatasetError, match="no header"):
        decoded_bytes(write(tmp_path / "none", broken))
