"""Workers that hang, as the driver finds them."""

from __future__ import annotations

import re
import threading

import pytest

from mimray.trainers.lifeline import STACKS_WITHIN_S, Heartbeat, Roster, stacks


def beat(rank: int = 0, **facts: object) -> Heartbeat:
    return Heartbeat(rank, "node", "host", 100 + rank, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (beat(), ""),
        (beat(steps=3, since_s=10.9, slowest_s=1.0), ""),
        (beat(steps=3, since_s=11.1, slowest_s=1.0), "no step for 11 s, the slowest .* 1.0 s"),
        (beat(steps=3, since_s=500, slowest_s=1.0, pause="checkpoint"), ""),
        (beat(steps=1, since_s=500), ""),  # the first update may take any time
    ],
)
def test_roster__a_step_that_takes_too_long(found: Heartbeat, reason: str):
    roster = Roster(timeout_s=10)
    roster.beat(found, None, now_s=100)

    said = roster.hung(now_s=101)

    assert bool(said) == bool(reason)
    if reason:
        assert re.search(reason, said)


def test_roster__silence_counts_in_a_pause_too():
    roster = Roster(timeout_s=10)
    roster.beat(beat(0, steps=4, pause="checkpoint"), None, now_s=100)
    roster.beat(beat(1, steps=4), None, now_s=105)

    assert roster.hung(now_s=110) == ""
    assert roster.hung(now_s=111) == (
        "rank 0 (process 100 on host, checkpoint) has given no sign of life for 11 s"
    )


def test_roster__one_that_has_left_is_not_missed():
    roster = Roster(timeout_s=10)
    roster.beat(beat(0, steps=4), None, now_s=0)
    roster.leave(0)

    assert roster.hung(now_s=100) == ""


def test_roster__standing_is_the_last_heartbeat_of_each():
    roster = Roster(timeout_s=10)
    roster.beat(beat(1, steps=4), None, now_s=1)
    roster.beat(beat(0, steps=3), None, now_s=2)
    roster.beat(beat(0, steps=4), None, now_s=3)

    assert roster.standing(now_s=5) == [(beat(0, steps=4), 2), (beat(1, steps=4), 4)]
    roster.forget()
    assert roster.standing(now_s=5) == []


def test_roster__nobody_is_silent_while_nobody_listens():
    roster = Roster(timeout_s=10)
    roster.beat(beat(0, steps=4), None, now_s=0)
    for now_s in (1, 2, 100, 101, 102):  # MLflow kept the recorder for 98 s
        assert roster.due(now_s) == []
        assert roster.wants_stacks == ""

    for now_s in range(103, 110):
        roster.due(now_s)

    assert "no sign of life for 11 s" in roster.wants_stacks


def test_roster__zero_is_never():
    roster = Roster(timeout_s=0)
    roster.beat(beat(steps=4), None, now_s=0)

    assert roster.hung(now_s=1e6) == ""


def test_roster__asks_each_for_its_stacks_once_and_then_ends_all():
    roster = Roster(timeout_s=10)
    roster.beat(beat(0, steps=1), "first", now_s=0)
    roster.beat(beat(1, steps=1), "second", now_s=9)

    assert roster.due(now_s=11) == []
    assert roster.beat(beat(1, steps=1), "second", now_s=12)
    assert not roster.beat(beat(1, steps=1), "second", now_s=13)
    assert roster.due(now_s=11 + STACKS_WITHIN_S - 0.1) == []
    assert roster.due(now_s=11 + STACKS_WITHIN_S) == ["first", "second"]

    assert roster.wants_stacks == ""
    assert roster.due(now_s=1e6) == []


def test_stacks__are_those_of_the_other_threads():
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait, name="waits for the test")
    thread.start()

    said = stacks()
    ended.set()
    thread.join()

    assert "thread waits for the test" in said
    assert "in wait" in said
    assert "test_stacks__are_those" not in said
