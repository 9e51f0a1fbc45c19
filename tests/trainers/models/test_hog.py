"""HOG targets against the definition written a second time, and against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mimray.trainers.models.hog import HOG, orientation_histograms


def written_out(image: np.ndarray, bins: int, cell: int, patch: int) -> np.ndarray:
    """The definition with loops over pixels, in float64: [C, H, W] -> [N, P]."""
    channels, height, width = image.shape
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    votes = np.zeros((channels, bins, height // cell, width // cell))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                window = padded[c, y : y + 3, x : x + 3]
                gx, gy = (kernel * window).sum(), (kernel.T * window).sum()
                k = math.floor(math.atan2(gx, gy) / math.pi * bins) % bins
                votes[c, k, y // cell, x // cell] += math.sqrt(gx * gx + gy * gy)
    votes /= np.maximum(np.sqrt((votes**2).sum(axis=1, keepdims=True)), 1e-12)
    m = patch // cell
    return np.stack(
        [
            votes[:, :, y : y + m, x : x + m].ravel()
            for y in range(0, height // cell, m)
            for x in range(0, width // cell, m)
        ]
    )


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "bins", "cell", "patch"),
    [
        ((3, 32, 32), 9, 8, 16),
        ((1, 16, 40), 9, 4, 8),
        ((3, 24, 36), 6, 3, 12),
        ((5, 16, 8), 9, 8, 8),
    ],
    ids=str,
)
def test_hog__equals_the_definition_written_out(
    shape: tuple[int, ...], bins: int, cell: int, patch: int
):
    images = np.stack([picture(*shape, seed=seed) for seed in range(2)])

    found = HOG(shape[0], bins, cell, patch)(torch.from_numpy(images))

    expected = np.stack([written_out(image, bins, cell, patch) for image in images])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_hog__has_108_values_for_a_patch_of_the_paper():
    hog = HOG(channels=3, bins=9, cell_px=8, patch_px=16)

    assert hog.out_dim == 108
    assert hog(torch.zeros(1, 3, 224, 224)).shape == (1, 196, 108)


def skimage_hog(image: np.ndarray, cell: int) -> np.ndarray:
    """Its histograms of single cells, each of length 1: [H, W] -> [R, S, K]."""
    from skimage.feature import hog

    options = {"pixels_per_cell": (cell, cell), "cells_per_block": (1, 1), "block_norm": "L2"}
    cells = hog(image.astype(np.float64), orientations=9, feature_vector=False, **options)
    return cells[:, :, 0, 0]


def test_hog__equals_scikit_image_where_the_definitions_agree():
    # Sobel's smoothing leaves the differences of a sum p(y) + q(x) as they are, up to a factor;
    # mirrored borders have no gradient across them, as in scikit-image. Its angle is ours
    # with the axes swapped.
    rng = np.random.default_rng(0)
    image = rng.normal(size=(48, 1)) + rng.normal(size=(1, 32))

    found = HOG(channels=1, bins=9, cell_px=8, patch_px=8)(torch.from_numpy(image)[None, None])

    expected = skimage_hog(image.T, 8).transpose(1, 0, 2)
    np.testing.assert_allclose(found[0].numpy(), expected.reshape(-1, 9), rtol=0, atol=1e-5)


@pytest.mark.parametrize("cell", [4, 8])
def test_histograms__of_scikit_images_gradients_are_its_own(cell: int):
    image = picture(32, 48).astype(np.float64)
    down, across = np.zeros_like(image), np.zeros_like(image)
    down[1:-1] = image[2:] - image[:-2]
    across[:, 1:-1] = image[:, 2:] - image[:, :-2]

    votes = orientation_histograms(
        torch.from_numpy(down)[None, None], torch.from_numpy(across)[None, None], 9, cell
    )

    found = torch.nn.functional.normalize(votes[0, 0], dim=0).permute(1, 2, 0)
    np.testing.assert_allclose(found.numpy(), skimage_hog(image, cell), rtol=0, atol=1e-5)


def test_histograms__count_opposite_gradients_alike_and_start_at_the_vertical():
    angles = torch.tensor([5.0, 25.0, 95.0, 175.0]).deg2rad()
    gx, gy = angles.sin().reshape(1, 1, 1, 4), angles.cos().reshape(1, 1, 1, 4)

    votes = orientation_histograms(gx, gy, bins=9, cell_px=1)
    opposite = orientation_histograms(-gx, -gy, bins=9, cell_px=1)

    assert votes[0, 0, :, 0].argmax(dim=0).tolist() == [0, 1, 4, 8]
    torch.testing.assert_close(votes, opposite)


def test_hog__is_fp32_without_gradient_or_state_whatever_the_model_computes_in():
    hog = HOG(3, 9, 8, 16)
    images = torch.from_numpy(picture(1, 3, 32, 32)).bfloat16().requires_grad_()

    found = hog.bfloat16()(images)

    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert not hog.state_dict()
    assert torch.equal(found, hog(images.float()))


def test_hog__flat_pictures_have_none():
    assert not HOG(3, 9, 8, 16)(torch.full((1, 3, 32, 32), 1.7)).any()


def test_hog__brightness_and_contrast_do_not_matter():
    images = torch.from_numpy(picture(1, 1, 32, 32))
    hog = HOG(1, 9, 8, 16)

    torch.testing.assert_close(hog(2 * images + 1), hog(images), rtol=0, atol=1e-5)


def test_to_cells__is_the_inverse_of_to_patches():
    hog = HOG(channels=2, bins=3, cell_px=4, patch_px=8)
    cells = torch.arange(2 * 2 * 3 * 4 * 10).reshape(2, 2, 3, 4, 10).float()

    patches = hog.to_patches(cells)

    assert patches.shape == (2, 10, hog.out_dim)
    assert torch.equal(hog.to_cells(patches, (2, 5)), cells)
    last = patches[1, -1].reshape(2, 3, 2, 2)  # channel, bin, cell row, cell column
    assert torch.equal(last, cells[1, :, :, -2:, -2:])
