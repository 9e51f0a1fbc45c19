"""The figures of collapse against NumPy, and the end of a run that has collapsed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mimray.trainers.config.method import CollapseGuard
from mimray.trainers.errors import CollapseError
from mimray.trainers.methods.collapse import CollapseWatch


class Guard(CollapseGuard):
    implementation = "none:None"


def watch(num_prototypes: int = 8, width: int = 5, **keys: float) -> CollapseWatch:
    return CollapseWatch(Guard(**keys), num_prototypes, width, "a cure")


def test_figures__are_those_of_all_micro_batches_and_equal_numpy():
    torch.manual_seed(0)
    assignments = torch.randn(12, 3, 8).mul(3).softmax(dim=-1)
    outputs = 7 * torch.randn(12, 5)
    whole, parts = watch(), watch()
    whole.add(assignments, outputs)
    for part in range(3):
        parts.add(assignments[part::3], outputs[part::3])

    figures = whole.settle(1)

    mean = assignments.double().numpy().reshape(-1, 8).mean(axis=0)
    entropy = -(mean * np.log(mean)).sum()
    unit = outputs.double().numpy()
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert figures["assignment_entropy"] == pytest.approx(entropy, abs=1e-5)
    assert figures["assignment_entropy_share"] == pytest.approx(entropy / np.log(8), abs=1e-5)
    assert figures["output_std"] == pytest.approx(unit.std(axis=0).mean(), abs=1e-5)
    assert figures["output_std_share"] == pytest.approx(
        unit.std(axis=0).mean() * np.sqrt(5), abs=1e-5
    )
    assert parts.settle(1) == pytest.approx(figures, rel=1e-5)


def test_figures__of_a_step_know_nothing_of_the_step_before():
    watched = watch()
    watched.add(torch.eye(8)[:1].expand(4, 8), torch.ones(4, 5))
    watched.settle(1)
    watched.add(torch.full((4, 8), 1 / 8), torch.eye(5))
    assert watched.settle(2)["assignment_entropy_share"] == pytest.approx(1.0)


def test_figures__range_from_collapse_to_random_directions():
    torch.manual_seed(0)
    watched = watch(width=64, min_entropy_share=0, min_std_share=0)
    watched.add(torch.eye(8)[:1].expand(500, 8), torch.ones(500, 64))
    collapsed = watched.settle(1)
    watched.add(torch.eye(8), torch.randn(500, 64))
    healthy = watched.settle(2)
    assert collapsed["assignment_entropy_share"] == 0
    assert collapsed["output_std_share"] < 2e-3
    assert healthy["assignment_entropy_share"] == pytest.approx(1)
    assert healthy["output_std_share"] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("assignments", "outputs", "said"),
    [
        (torch.eye(8)[:1].expand(4, 8), torch.eye(5)[:4], "min_entropy_share 0.1"),
        (torch.full((4, 8), 1 / 8), torch.ones(4, 5), "min_std_share 0.01"),
    ],
)
def test_run__stops_once_a_figure_stays_below_its_bound(
    assignments: torch.Tensor, outputs: torch.Tensor, said: str
):
    watched = watch(collapse_steps=3)
    healthy = torch.eye(8)[:4], torch.eye(5)[:4]
    for step, seen in enumerate([(assignments, outputs)] * 2 + [healthy], start=1):
        watched.add(*seen)
        watched.settle(step)
    for step in (4, 5):
        watched.add(assignments, outputs)
        watched.settle(step)
    # A run that is continued has the count of its checkpoint.
    resumed = watch(collapse_steps=3)
    resumed.load_state_dict(watched.state_dict())
    resumed.add(assignments, outputs)

    with pytest.raises(CollapseError, match=said) as caught:
        resumed.settle(6)

    assert "for 3 steps" in str(caught.value)
    assert "a cure" in str(caught.value)
    assert caught.value.on_every_rank


def test_run__never_stops_where_the_bounds_are_zero():
    watched = watch(collapse_steps=1, min_entropy_share=0, min_std_share=0)
    watched.add(torch.eye(8)[:1].expand(4, 8), torch.ones(4, 5))
    assert watched.settle(1)["assignment_entropy"] == 0


def test_sums__stay_in_fp32_when_the_method_is_cast():
    watched = watch().bfloat16()
    assert {buffer.dtype for buffer in watched.buffers()} == {torch.float32}
