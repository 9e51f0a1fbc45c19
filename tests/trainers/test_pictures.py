from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimray.trainers.errors import DataError
from mimray.trainers.pictures import (
    hide_patches,
    loss_chart,
    panel_sheet,
    paste_visible,
    pixel_mask,
    smoothed,
)
from mimray.trainers.types import Panel


def pictures(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sheet_of(*columns: np.ndarray, **options: object) -> Image.Image:
    return panel_sheet([Panel(f"column {i}", c) for i, c in enumerate(columns)], **options)


def cell(sheet: Image.Image, row: int, column: int, size: tuple[int, int]) -> np.ndarray:
    """Cut one cell out of a sheet without captions; 24 px margin, 53 px to the first row."""
    width, height = size
    left, top = 24 + column * (width + 10), 53 + row * (height + 10)
    return np.asarray(sheet)[top : top + height, left : left + width]


def test_pixel_mask__covers_the_patch_row_major_on_a_non_square_picture():
    mask = np.zeros((1, 6), dtype=bool)
    mask[0, 4] = True  # second row, second column of a grid of 2 x 3

    pixels = pixel_mask(mask, (8, 12), 4)

    expected = np.zeros((1, 8, 12), dtype=bool)
    expected[0, 4:8, 4:8] = True
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("patches", "size"), [(4, (8, 12)), (6, (8, 13)), (6, (12, 4))], ids=str)
def test_pixel_mask__refuses_a_grid_that_does_not_fit(patches: int, size: tuple[int, int]):
    with pytest.raises(DataError, match="does not fit"):
        pixel_mask(np.zeros((1, patches), dtype=bool), size, 4)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_hide_and_paste__are_complements(channels: int):
    original = pictures(2, 8, 12, channels)
    prediction = pictures(2, 8, 12, channels, seed=1)
    mask = np.random.default_rng(2).random((2, 6)) < 0.5
    hidden = pixel_mask(mask, (8, 12), 4)

    masked = hide_patches(original, mask, 4)
    pasted = paste_visible(prediction, original, mask, 4)

    assert masked.dtype == pasted.dtype == np.uint8
    assert (masked[hidden] == 127).all()
    np.testing.assert_array_equal(pasted[hidden], prediction[hidden])
    for made in (masked, pasted):
        np.testing.assert_array_equal(made[~hidden], original[~hidden])


def test_sheet__every_cell_is_its_picture_enlarged_without_smoothing():
    columns = [pictures(2, 32, 48, 3, seed=seed) for seed in range(3)]

    sheet = sheet_of(*columns)

    for column, images in enumerate(columns):
        for row, image in enumerate(images):
            shown = cell(sheet, row, column, (192, 128))
            np.testing.assert_array_equal(shown, image.repeat(4, axis=0).repeat(4, axis=1))


def test_sheet__headings_and_captions_leave_ink_outside_the_cells():
    white = np.full((1, 192, 192, 3), 255, dtype=np.uint8)

    plain = np.asarray(sheet_of(white, white, white))
    captioned = np.asarray(sheet_of(white, white, white, captions=["loss 0.1"]))

    assert plain[:53].min() < 100  # headings
    assert plain[53:].min() == 255
    assert captioned[53 + 192 :].min() < 160


@pytest.mark.parametrize(("channels", "first"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_sheet__shows_any_number_of_channels(channels: int, first: list[int]):
    images = pictures(1, 16, 16, channels)

    sheet = sheet_of(images, images, images, scale=12)

    expected = images[0][..., first].repeat(12, axis=0).repeat(12, axis=1)
    np.testing.assert_array_equal(cell(sheet, 0, 0, (192, 192)), expected)


@pytest.mark.parametrize("size", [(8, 8), (16, 48), (96, 96), (224, 224), (1200, 300)], ids=str)
def test_sheet__cells_have_a_size_people_can_see(size: tuple[int, int]):
    images = pictures(1, *size, 3)

    sheet = sheet_of(images, images, images)

    cell_height = sheet.height - 53 - 24
    cell_width = (sheet.width - 48 - 20) / 3
    assert 150 <= max(cell_height, cell_width) <= 256


def test_sheet__takes_any_number_of_columns():
    images = pictures(1, 192, 192, 3)

    assert sheet_of(images).width == 48 + 192
    assert sheet_of(images, images, images, images).width == 48 + 4 * 192 + 30


def test_sheet__brings_other_sizes_to_that_of_the_first_column():
    images, small = pictures(1, 192, 192, 3), pictures(1, 48, 48, 3, seed=1)

    sheet = sheet_of(images, small)

    shown = cell(sheet, 0, 1, (192, 192))
    np.testing.assert_array_equal(shown, small[0].repeat(4, axis=0).repeat(4, axis=1))


def test_sheet__refuses_columns_that_do_not_match():
    images = pictures(2, 16, 16, 3)

    with pytest.raises(DataError, match="of one B"):
        sheet_of(images, images[:1], images)
    with pytest.raises(DataError, match="2 rows need as many captions"):
        sheet_of(images, images, images, captions=["only one"])


def test_smoothed__keeps_a_line_and_takes_out_noise():
    line = np.linspace(3.0, 1.0, 200)
    noise = np.random.default_rng(0).normal(0, 0.1, 200)

    np.testing.assert_allclose(smoothed(line), line)
    assert np.abs(smoothed(line + noise) - line).mean() < np.abs(noise).mean() / 2
    np.testing.assert_allclose(smoothed(np.array([1.0, 2.0, 6.0, 4.0, 5.0]), window=3)[2], 4.0)


@pytest.mark.parametrize("length", [1, 2, 3, 40, 41, 60])
def test_smoothed__has_the_length_it_was_given(length: int):
    assert smoothed(np.arange(length, dtype=float)).shape == (length,)


def test_loss_chart__draws_a_readable_picture_and_no_global_figure(tmp_path: Path):
    rows = [
        {"step": step, "loss": 1 / step, "lr": 1e-4, "images_per_s": 20.0} for step in range(1, 60)
    ]

    loss_chart([*rows, {"step": 60, "knn": 0.5}], tmp_path / "loss.png")

    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert image.size == (1200, 720)
        blue = np.asarray(image.convert("RGB")) == (0x1F, 0x5F, 0xAE)
    assert blue.all(axis=-1).sum() > 500
    if "matplotlib.pyplot" in sys.modules:  # by another test
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


@pytest.mark.parametrize("length", [1, 2])
def test_loss_chart__draws_a_run_of_few_steps_without_rate_and_speed(tmp_path: Path, length: int):
    loss_chart([{"step": step, "loss": 1.0} for step in range(length)], tmp_path / "loss.png")

    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_loss_chart__says_when_there_is_nothing_to_draw(tmp_path: Path):
    with pytest.raises(DataError, match="no loss to draw"):
        loss_chart([{"step": 1, "knn": 0.4}], tmp_path / "loss.png")
