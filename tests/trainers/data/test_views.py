"""The view the tokenizer sees, and the jitter of colours both views share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv

from mimray.trainers.config.run import Recipe, parse_recipe, resolve
from mimray.trainers.data.canonical import canonicalise
from mimray.trainers.data.decode import draft_scale
from mimray.trainers.data.decoded import Picture, Pictures
from mimray.trainers.data.loader import Place, Samples, make_loader
from mimray.trainers.data.resample import resampled, to_planes
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.data.transforms import color_jitter, to_array
from mimray.trainers.data.views import View, _Crop, _scaled, make_inputs, numbered
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.types import Record
from tests.trainers.data.encoding import encoded

JITTERS = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)


def smooth(number: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("views")
    for i in range(8):
        smooth(i).save(folder / f"{i}.png")
    return open_source(str(folder))


def recipe_of(tokenizer_size: tuple[int, int] | None = (16, 24), **data: Any) -> Recipe:
    method = {"name": "mae"}
    if tokenizer_size is not None:
        method = {
            "name": "beit",
            "tokenizer_image_size": tokenizer_size,
            "min_block_patches": 2,
        }
    return parse_recipe(
        {
            "encoder": {"name": "vit_tiny", "depth": 1, "patch_size": 8},
            "method": method,
            "data": {"image_size": [32, 48], "num_workers": 0, **data},
            "optim": {"batch_size": 4, "steps": 2},
            "seed": 5,
        }
    )


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("seed", range(6))
def test_color_jitter__is_torchvisions_in_the_order_and_by_the_factors_drawn(mode: str, seed: int):
    image = smooth(seed).convert(mode)

    ours = to_array(color_jitter(np.random.default_rng(seed), image, 0.4))

    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random(3))
    factors = 0.6 + 0.8 * rng.random(3)
    pixels = torch.from_numpy(to_array(image).copy())
    for i in order:
        pixels = JITTERS[i](pixels, float(factors[i]))
    # Pillow's mean and its grey are whole numbers, torchvision's are not.
    np.testing.assert_allclose(ours.astype(int), pixels.numpy().astype(int), atol=3)


def test_color_jitter__factors_are_uniform():
    draws = []
    for seed in range(3000):
        rng = np.random.default_rng(seed)
        grey = Image.new("RGB", (2, 1), (128, 128, 128))
        grey.putpixel((0, 0), (64, 64, 64))
        draws.append(np.asarray(color_jitter(rng, grey, 0.4), dtype=float).mean())

    # Of a grey picture saturation changes nothing and contrast keeps the mean: what is left of
    # the mean, 96, is the factor of brightness.
    factors = np.sort(np.array(draws) / 96)
    np.testing.assert_allclose(
        np.quantile(factors, [0.0, 0.25, 0.5, 0.75, 1.0]), [0.6, 0.8, 1.0, 1.2, 1.4], atol=0.03
    )


def test_color_jitter__strength_zero_changes_nothing():
    image = smooth(1)

    assert color_jitter(np.random.default_rng(0), image, 0.0).tobytes() == image.tobytes()


def test_views__crop_and_flip_do_not_depend_on_the_jitter(source: Source):
    plain, jittered = (
        Samples(source, recipe_of(color_jitter=s), inputs_of(recipe_of(color_jitter=s)))
        for s in (0.0, 0.4)
    )

    for i in range(8):
        a, b = plain[Place(0, i)].inputs["images"], jittered[Place(0, i)].inputs["images"]
        # Colours change, edges stay: the same crop correlates, another one does not.
        assert np.corrcoef(a.mean(axis=0).ravel(), b.mean(axis=0).ravel())[0, 1] > 0.9
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("jitter", [0.0, 0.4])
@pytest.mark.parametrize("channels", [1, 3])
def test_views__the_tokenizer_sees_the_same_crop_flip_and_colours(
    source: Source, jitter: float, channels: int
):
    views = Samples(
        source,
        recipe_of((32, 48), color_jitter=jitter, channels=channels),
        inputs_of(recipe_of((32, 48), color_jitter=jitter, channels=channels)),
    )

    for i in range(8):
        sample = views[Place(0, i)]
        assert sample.inputs["tokenizer_images"].shape == (channels, 32, 48)
        # At one size the views differ by their filters alone.
        apart = np.abs(
            sample.inputs["images"].astype(int) - sample.inputs["tokenizer_images"].astype(int)
        )
        assert apart.max() <= 12


def test_views__the_tokenizers_view_is_the_box_resized_by_lanczos(
    source: Source, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []
    flips: list[bool] = []
    views = Samples(source, recipe_of(), inputs_of(recipe_of()))
    monkeypatch.setattr(
        "mimray.trainers.data.views.resampled", lambda *a: seen.append(a) or resampled(*a)
    )
    monkeypatch.setattr(
        "mimray.trainers.data.views.to_planes",
        lambda pixels, *, flip: flips.append(flip) or to_planes(pixels, flip=flip),
    )

    found = [views[Place(0, index)].inputs["tokenizer_images"] for index in range(8)]

    for index, tokenizer_images in enumerate(found):
        (pixels, size, how, box), second = seen[2 * index : 2 * index + 2]
        flip, second_flip = flips[2 * index : 2 * index + 2]
        assert (size, how) == ((32, 48), "bicubic")
        assert second[0] is pixels
        assert second[1:] == ((16, 24), "lanczos", box)
        assert second_flip == flip
        expected = Image.fromarray(pixels).crop(box).resize((24, 16), Image.Resampling.LANCZOS)
        if flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        np.testing.assert_array_equal(tokenizer_images, to_array(expected))
    assert set(flips) == {False, True}


def test_views__a_larger_tokenizer_view_is_not_blurred_by_draft_decoding(tmp_path: Path):
    stripes = np.tile(np.array([0, 255], dtype=np.uint8).repeat(4), 64)  # 512, period 8
    pixels = np.broadcast_to(stripes[None, :, None], (512, 512, 3)).copy()
    Image.fromarray(pixels).save(tmp_path / "stripes.jpg", quality=95)
    recipe = recipe_of((256, 256), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)

    sample = Samples(open_source(str(tmp_path)), recipe, inputs_of(recipe))[Place(0, 0)]

    # Stripes of two pixels are left; decoded for 32 x 48 they would be a flat grey.
    assert sample.inputs["tokenizer_images"].std() > 90


def test_loader__hands_over_both_views(source: Source):
    plan = resolve(recipe_of(), source.facts, 1)

    batch = next(make_loader(source, plan, inputs_of(plan.recipe)))

    assert (batch.inputs["tokenizer_images"].dtype, batch.inputs["tokenizer_images"].shape) == (
        torch.uint8,
        (4, 3, 16, 24),
    )
    assert batch.inputs["images"].shape == (4, 3, 32, 48)


def test_loader__makes_no_second_view_for_methods_without_a_tokenizer(source: Source):
    plan = resolve(recipe_of(None), source.facts, 1)

    assert next(make_loader(source, plan, inputs_of(plan.recipe))).inputs.keys() == {
        "images",
        "mask",
    }


@given(
    size=st.tuples(st.integers(2, 3000), st.integers(2, 3000)),
    view_size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300)
def test_crop__of_a_picture_at_a_lower_scale_is_off_by_a_quarter_of_a_views_pixel_at_most(
    size: tuple[int, int], view_size: tuple[int, int], scale: list[float], seed: int
):
    view = View("images", view_size, crop_scale=(scale[0], scale[1]))
    crop = _Crop(view, size, np.random.default_rng(seed))
    divisor = draft_scale(size, crop.enough(size, view_size))
    decoded = (-(-size[0] // divisor), -(-size[1] // divisor))

    found = _scaled(crop.box, size, decoded)

    for axis in (0, 1):
        low, high = found[axis], found[axis + 2]
        assert 0 <= low < high <= decoded[axis]
        whole = decoded[axis] / size[axis]
        pixel_of_view = (crop.box[axis + 2] - crop.box[axis]) * whole / view_size[1 - axis]
        for edge, place in ((low, crop.box[axis]), (high, crop.box[axis + 2])):
            assert abs(edge - place * whole) <= (pixel_of_view / 4 + 1e-9 if divisor > 1 else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_views__a_change_after_the_crop_sees_the_view_as_it_will_be(source: Source, channels: int):
    seen: list[np.ndarray] = []

    def note(rng: np.random.Generator, image: Image.Image) -> Image.Image:
        seen.append(to_array(image))
        return image

    plain = View("images", (32, 48), crop_scale=(0.2, 0.8), hflip=0.5)
    upright = replace(plain, hflip=0.0)
    noting = replace(plain, after=(note,))
    flipped = set()
    for index in range(8):
        without, with_note, never = (
            make_inputs(
                [view], Pictures(source)[index], seed=0, epoch=0, index=index, channels=channels
            )["images"]
            for view in (plain, noting, upright)
        )
        assert without.shape == (channels, 32, 48)
        np.testing.assert_array_equal(with_note, without)
        np.testing.assert_array_equal(seen.pop(), without)
        flipped.add(np.array_equal(without, never[..., ::-1]))
        assert np.array_equal(without, never) or np.array_equal(without, never[..., ::-1])
    assert flipped == {False, True}


def test_views__of_rows_decoded_alone_are_those_of_the_whole_picture(
    monkeypatch: pytest.MonkeyPatch,
):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
    picture = Record(canonicalise(encoded(image), 64).data, None)
    few = View("images", (32, 32), count=2, crop_scale=(0.05, 0.3), hflip=0.5)
    seen: list[tuple[int, int] | None] = []
    decoding = Picture.decoded

    def decoded(
        self: Picture, enough: tuple[int, int], needed: tuple[int, int] | None = None
    ) -> np.ndarray:
        seen.append(needed)
        found = decoding(self, enough, needed).copy()
        if needed is not None:  # nothing beyond them is looked at
            found[: needed[0]] = found[needed[1] :] = 0
        return found

    def made(view: View, index: int) -> np.ndarray:
        pictures = Pictures([picture])  # type: ignore[arg-type]
        inputs = make_inputs([view], pictures[0], seed=0, epoch=0, index=index, channels=3)
        return inputs["images"]

    changing = replace(few, before=(lambda rng, image: image,))
    whole = [made(changing, index) for index in range(20)]
    monkeypatch.setattr(Picture, "decoded", decoded)
    for index in range(20):
        np.testing.assert_array_equal(made(few, index), whole[index])
    made(changing, 0)

    *rows, last = seen
    assert last is None  # what changes a picture may look at all of it
    heights = [needed[1] - needed[0] for needed in rows if needed]
    assert len(heights) == 20
    assert min(heights) < 40
    assert 50 < max(heights) <= 64


def test_numbered__a_view_shares_streams_with_one_that_has_as_many() -> None:
    leader, small = View("crops", (32, 32), count=2), View("tokens", (16, 16), like="crops")
    other = View("local", (16, 16), count=3)
    assert [first for _, first in numbered([leader, small, other])] == [0, 0, 2]
    with pytest.raises(AssertionError, match="crops has fewer crops than more"):
        list(numbered([leader, View("more", (16, 16), count=3, like="crops")]))
