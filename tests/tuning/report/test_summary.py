from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimray.tuning.record import SweepRecord, TrialRecord
from mimray.tuning.report.speed import QUOTED
from mimray.tuning.report.summary import Point, SweepSummary, front, heatmap_keys, summarise
from mimray.tuning.report.values import (
    distinct,
    duration,
    plain,
    short_names,
    shown,
    without_passwords,
)

RATIO, DEPTH = "method.mask_ratio", "method.decoder_depth"
Make = Callable[..., Any]

costs = st.integers(0, 6).map(float)
points = st.lists(st.builds(Point, trial=costs, rung=costs, samples=costs, device_seconds=costs,
                            score=costs), max_size=12)  # fmt: skip


def beats(a: Point, b: Point, cost: str) -> bool:
    no_worse = getattr(a, cost) <= getattr(b, cost) and a.score >= b.score
    return no_worse and (getattr(a, cost) < getattr(b, cost) or a.score > b.score)


@given(points, st.sampled_from(["samples", "device_seconds"]))
def test_front__holds_what_no_other_point_beats(points: list[Point], cost: str):
    expected = [p for p in points if not any(beats(q, p, cost) for q in points)]

    found = front(points, cost)

    assert sorted(map(repr, found)) == sorted(map(repr, expected))
    assert [getattr(p, cost) for p in found] == sorted(getattr(p, cost) for p in found)


trials = st.lists(
    st.tuples(
        st.sampled_from(["failed", "stopped", "running", "finished"]),
        st.sampled_from([0.1, 0.5, None, "a", (1, 2)]),
        st.sampled_from([1, 2, None]),
        st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan]), max_size=3),
    ),
    max_size=10,
)


@given(trials)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_heatmap__holds_the_best_of_those_that_came_farthest(record: Make, trial: Make, rows: Any):
    made = [
        trial(i, {"a.x": x, "a.y": y}, scores, state=state)
        for i, (state, x, y, scores) in enumerate(rows)
    ]
    sweep = record(made, keys=("a.x", "a.y"))
    expected: dict[Any, tuple[int, float, int]] = {}
    for number, (state, x, y, scores) in enumerate(rows):
        if state != "failed" and scores and math.isfinite(scores[-1]):
            best = expected.get((x, y))
            if best is None or (len(scores), scores[-1]) > best[:2]:
                expected[x, y] = (len(scores), scores[-1], number)

    summary = summarise(sweep)

    found = {
        (x, y): (cell.rungs, cell.score, cell.trial)
        for y, cells in zip(summary.heatmap.rows, summary.heatmap.cells, strict=True)
        for x, cell in zip(summary.heatmap.columns, cells, strict=True)
        if cell is not None
    } if summary.heatmap is not None else {}  # fmt: skip
    assert found == expected


def test_heatmap__shows_the_whole_grid_before_it_is_tried(grid: SweepRecord):
    heatmap = summarise(grid.model_copy(update={"trials": ()})).heatmap

    assert heatmap.columns == (0.15, 0.4, 0.5, 0.6, 0.75, 0.9)
    assert heatmap.rows == (1, 2, 4, 8)
    assert all(cell is None for row in heatmap.cells for cell in row)


def test_heatmap_keys__mask_ratio_and_depth_come_before_others(record: Make, trial: Make):
    params = {"optim.base_lr": 1e-3, DEPTH: 1, RATIO: 0.5}

    assert heatmap_keys(record([trial(0, params, [0.5])])) == (RATIO, DEPTH)


def test_heatmap_keys__a_key_of_many_values_is_passed_over(record: Make, trial: Make):
    made = [trial(i, {RATIO: i / 100, "a": i % 2, "b": i % 3}, [0.5]) for i in range(1, 32)]

    assert heatmap_keys(record(made)) == ("a", "b")
    assert heatmap_keys(record(made, keys=(RATIO, "a"))) is None


def test_points__device_seconds_add_up_over_rungs_and_devices(record: Make, trial: Make):
    summary = summarise(record([trial(0, {"a": 1}, [0.1, 0.2], devices=4.0)]))

    assert [p.device_seconds for p in summary.points] == [50.0, 100.0]
    assert [p.samples for p in summary.points] == [100, 200]


def test_facts__failed_trials_are_counted_and_not_ranked(grid: SweepRecord):
    summary = summarise(grid)

    assert 13 not in [t.number for t in summary.ranked]
    assert 13 not in [p.trial for p in summary.points]
    assert [t.number for t in summary.failed] == [13]
    assert sum(summary.states.values()) == 24
    assert summary.survived == 1


def test_facts__a_score_that_is_no_number_does_not_disturb_the_order(record: Make, trial: Make):
    scores = [0.1, math.nan, 0.3, math.nan, 0.2]
    made: list[TrialRecord] = [trial(i, {"a": i}, [s]) for i, s in enumerate(scores)]

    summary: SweepSummary = summarise(record(made))

    assert [t.number for t in summary.ranked] == [2, 4, 0]


def test_speed__is_said_only_where_the_mask_ratio_is_searched(record: Make, trial: Make):
    searched = summarise(record([trial(0, {RATIO: 0.4}, [])]), {0.4: 1.6})
    other = summarise(record([trial(0, {DEPTH: 1}, [])]), {0.4: 1.6})

    assert [row.mask_ratio for row in searched.speed] == sorted({*QUOTED, 0.4})
    (row,) = [row for row in searched.speed if row.searched]
    assert (row.mask_ratio, row.measured, row.quoted) == (0.4, 1.6, None)
    assert row.bound == pytest.approx(1 / 0.6)
    assert other.speed == ()


def test_without_passwords__keeps_the_rest():
    tree = {"study": ("s", "postgresql://me:secret@db/optuna"), "uri": "s3://bucket/a:b@c", "n": 1}

    cleaned = without_passwords(tree)

    assert cleaned["study"] == ("s", "postgresql://me:***@db/optuna")
    assert (cleaned["uri"], cleaned["n"]) == (tree["uri"], 1)


def test_distinct__orders_values_of_all_kinds():
    values = ["b", None, 2, True, 0.5, (1, 2), "a", 2]

    assert distinct(values) == [0.5, 2, (1, 2), "a", "b", True, None]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        (True, "true"),
        (0.75, "0.75"),
        (8, "8"),
        ((16, 8), "(16, 8)"),
        ("mae", "mae"),
    ],
    ids=str,
)
def test_shown__reads_as_it_was_written(value: Any, text: str):
    assert shown(value) == text


def test_short_names__stay_apart():
    assert short_names(["method.depth", "encoder.depth", "optim.lr", "method.name"]) == {
        "method.depth": "method.depth",
        "encoder.depth": "encoder.depth",
        "optim.lr": "lr",
        "method.name": "method.name",
    }


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42 s"), (190, "3 min 10 s"), (18120, "5 h 2 min")]
)
def test_duration__reads_well(seconds: float, text: str):
    assert duration(seconds) == text


def test_plain__leaves_no_number_that_json_lacks():
    assert plain({"a": (math.nan, -math.inf, 1.5), 2: {"b": None}}) == {
        "a": [None, None, 1.5],
        "2": {"b": None},
    }
