"""Every method's runs from weights: ZeRO stages, a kill, and two workers learn the same.

Two ranks need processes of their own; this file is also what they run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.methods.needs import (
    with_needs,
)
from mimray.trainers.storage import RunDir
from tests.trainers.methods.initial_cases import BEGUN, CASES, STEPS, plan_of, recipe_of
from tests.trainers.runs import Observer, group_of_two, run_of


def learn(
    case: str, donors: Path, run_name: str, *, stage: int = 0, cut_at: int | None = None
) -> dict[str, Any]:
    """The rows of metrics and the weights of a short run, in the process group there is."""
    place = donors / run_name
    begins = {"init": str(donors / case), **BEGUN.get(case, {})}
    recipe = recipe_of(case, donors, stage=stage, **begins)
    recipe = with_needs(recipe, run=RunDir(str(place)))
    plan = plan_of(recipe, donors, dist.get_world_size())
    trained = run_of(plan, place, Observer(cut_at))
    return {"rows": read_metrics(RunDir(str(place))), "state": trained.state}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    losses = [[row["loss"] for row in one["rows"]] for one in (found, wanted)]
    assert len(losses[1]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, value in wanted["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def whole(donors: Path, process_group: None) -> Callable[[str], dict[str, Any]]:
    """Uninterrupted runs without ZeRO, by case."""
    known: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in known:
            known[case] = learn(case, donors, f"{case}-whole")
        return known[case]

    return of


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.slow),
                                   pytest.param(3, marks=pytest.mark.slow)])  # fmt: skip
def test_zero__learns_the_same_from_weights(
    stage: int, case: str, donors: Path, whole: Callable[[str], dict[str, Any]]
):
    assert_same(learn(case, donors, f"{case}-zero{stage}", stage=stage), whole(case))


@pytest.mark.parametrize("case", CASES)
def test_resume__a_killed_run_needs_nothing_but_its_own_directory(
    case: str, donors: Path, whole: Callable[[str], dict[str, Any]]
):
    wanted, given = whole(case), donors / case
    with pytest.raises(KeyboardInterrupt):
        learn(case, donors, f"{case}-cut", cut_at=3)
    given.rename(donors / f"{case}-away")
    try:
        found = learn(case, donors, f"{case}-cut")
    finally:
        (donors / f"{case}-away").rename(given)

    assert [row["loss"] for row in found["rows"]] == [row["loss"] for row in wanted["rows"]]
    for name, value in wanted["state"].items():
        assert torch.equal(found["state"][name], value), name


@pytest.fixture(scope="module")
def on_two_ranks(donors: Path, run_ranks: Callable[..., None]) -> dict[str, Any]:
    run_ranks(__file__, donors, json.dumps(list(CASES)))
    found: dict[str, Any] = torch.load(donors / "found.0")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_workers__change_nothing(
    case: str, on_two_ranks: dict[str, Any], whole: Callable[[str], dict[str, Any]]
):
    assert_same(on_two_ranks[case], whole(case))


if __name__ == "__main__":
    donors, rank, cases = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    with group_of_two(donors, rank):
        found = {case: learn(case, donors, f"{case}-two", stage=1) for case in cases}
        torch.save(found, donors / f"found.{rank}")
