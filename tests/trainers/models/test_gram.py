"""The Gram loss against NumPy, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimray.trainers.models.gram import gram_loss


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def written_out(tokens: torch.Tensor, reference: torch.Tensor) -> float:
    """The loss picture by picture and pair by pair."""
    errors = []
    for ours, theirs in zip(tokens.double().numpy(), reference.double().numpy(), strict=True):
        for i in range(len(ours)):
            for j in range(len(ours)):
                cosines = [
                    x[i] @ x[j] / np.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) for x in (ours, theirs)
                ]
                errors.append((cosines[0] - cosines[1]) ** 2)
    return float(np.mean(errors))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_loss__equals_the_formula_in_fp64(scale: float):
    tokens, reference = drawn(3, 5, 8, seed=0) * scale, drawn(3, 5, 6, seed=1)
    assert float(gram_loss(tokens, reference)) == pytest.approx(
        written_out(tokens, reference), rel=1e-5
    )


def test_loss__is_that_of_each_picture_alone():
    tokens, reference = drawn(4, 5, 8, seed=0), drawn(4, 5, 8, seed=1)
    alone = [gram_loss(tokens[i : i + 1], reference[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(gram_loss(tokens, reference), torch.stack(alone).mean())


def test_rotation_and_length__cost_nothing():
    tokens = drawn(2, 7, 8, seed=0)
    turn, _ = torch.linalg.qr(drawn(8, 8, seed=1))
    assert float(gram_loss(tokens, 3 * tokens @ turn)) < 1e-12


def test_gradient__goes_to_the_trained_tokens_and_equals_differences_in_fp64():
    tokens, reference = drawn(1, 3, 4, seed=0), drawn(1, 3, 4, seed=1)
    tokens.requires_grad_(True)
    (found,) = torch.autograd.grad(gram_loss(tokens, reference), tokens)
    step = 1e-6
    for place in np.ndindex(1, 3, 4):
        moved = [tokens.detach().double() for _ in range(2)]
        moved[0][place] += step
        moved[1][place] -= step
        slope = (written_out(moved[0], reference) - written_out(moved[1], reference)) / (2 * step)
        assert float(found[place]) == pytest.approx(slope, abs=1e-6)


def test_a_token_of_zeros__has_a_finite_gradient():
    tokens = torch.zeros(1, 2, 4, requires_grad=True)
    (found,) = torch.autograd.grad(gram_loss(tokens, drawn(1, 2, 4, seed=0)), tokens)
    assert found.isfinite().all()


def test_autocast__does_not_reach_it():
    tokens, reference = drawn(2, 9, 8, seed=0).bfloat16(), drawn(2, 9, 8, seed=1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram_loss(tokens, reference)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, gram_loss(tokens.float(), reference.float()), rtol=0, atol=0)
