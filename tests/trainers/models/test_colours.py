"""Tokens as colours: components, signs, and colours of two encoders that can be compared."""

from __future__ import annotations

import numpy as np
import torch

from mimray.trainers.models.colours import aligned_colours, principal_colours


def test_colours__are_the_teachers_principal_components() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 50, 6, generator=rng) * torch.tensor([9.0, 4, 2, 0.1, 0.1, 0.1])
    same, alike = principal_colours(tokens, tokens)
    assert np.array_equal(same, alike)
    assert same.shape == (2, 50, 3)
    for axis in range(3):
        colour, value = same[..., axis].ravel().astype(float), tokens[..., axis].numpy().ravel()
        assert np.corrcoef(colour, value)[0, 1] > 0.9  # the sign, too
    assert principal_colours(tokens[..., :2])[0].shape == (2, 50, 3)


def test_aligned__a_turned_and_scaled_encoder_has_the_same_colours() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 60, 6, generator=rng) * torch.tensor([9.0, 8, 7, 0.1, 0.1, 0.1])
    turned = torch.linalg.qr(torch.randn(6, 6, generator=rng))[0]
    ours, theirs = aligned_colours(tokens, 5 * tokens @ turned + 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.array_equal(ours, principal_colours(tokens)[0])
    # Without the alignment, signs and order of close components differ.
    alone = principal_colours(tokens @ turned)[0]
    assert np.abs(ours.astype(int) - alone).max() > 100


def test_aligned__takes_other_widths_and_tokens_that_are_all_equal() -> None:
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, 30, 8, generator=rng)
    for other in (tokens[..., :2], torch.ones(2, 30, 4)):
        ours, theirs = aligned_colours(tokens, other)
        assert ours.shape == theirs.shape == (2, 30, 3)
