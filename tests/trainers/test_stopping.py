"""A training that is asked to end, or to save, from outside."""

from __future__ import annotations

import re
import signal
import threading
from pathlib import Path

import pytest

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.checkpoints import find
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.errors import NonFiniteLossError, StoppedError
from mimray.trainers.lifeline import Lifeline
from mimray.trainers.stopping import interruptible, signals_handled_by
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Notice
from tests.trainers.runs import Observer, Remote, run_of, write_noise

STEPS = 6


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
            "method": {"name": "simmim", "mask_unit_px": 8},
            "data": {"image_size": 16, "num_workers": 0},
            "optim": {"batch_size": 4, "base_lr": 0.1, "steps": STEPS, "warmup_steps": 1},
            "engine": {"zero_stage": 1, "precision": "fp32"},
            "checkpoint": {"every_steps": 100, "keep": 9}, "logging": {"every_steps": 1},
        }
    )  # fmt: skip
    pictures = write_noise(tmp_path / "pictures", 8, side_px=16)
    return resolve(recipe, open_training(str(pictures), recipe).facts, world_size=1)


class Told(Lifeline):
    """A lifeline that asks for these, one a step, and for nothing more after them."""

    def __init__(self, *notices: Notice) -> None:
        self._waiting = iter(notices)

    def step(self) -> Notice:
        return next(self._waiting, Notice.NONE)


def saved(place: Path) -> list[int]:
    return [checkpoint.step for checkpoint in find(RunDir(str(place)))]


@pytest.mark.usefixtures("process_group")
def test_stop__writes_a_checkpoint_from_which_the_same_run_goes_on(plan: Plan, tmp_path: Path):
    whole, before, after = Observer(), Observer(), Observer()
    run_of(plan, tmp_path / "whole", whole)

    with pytest.raises(StoppedError, match=f"after step 2 of {STEPS}.*same command") as caught:
        run_of(plan, tmp_path / "run", before, lifeline=Told(Notice.NONE, Notice.STOP))
    assert saved(tmp_path / "run") == [2]
    run_of(plan, tmp_path / "run", after)

    assert (caught.value.exit_code, caught.value.on_every_rank) == (75, True)
    assert after.began == [2]
    assert before.losses | after.losses == whole.losses


@pytest.mark.usefixtures("process_group")
def test_save__writes_a_checkpoint_and_goes_on(plan: Plan, tmp_path: Path):
    watch = Observer()

    trained = run_of(plan, tmp_path / "run", watch, lifeline=Told(Notice.NONE, Notice.SAVE))

    assert trained.step == STEPS
    assert saved(tmp_path / "run") == [STEPS, 2]


@pytest.mark.usefixtures("process_group")
def test_stop__at_the_last_step_is_an_end_like_any_other(plan: Plan, tmp_path: Path):
    notices = [Notice.NONE] * (STEPS - 1)

    assert run_of(plan, tmp_path / "run", lifeline=Told(*notices, Notice.STOP)).step == STEPS


@pytest.mark.usefixtures("process_group")
def test_loss_not_finite__a_store_has_every_row_before_it(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tests.trainers.runs.RunDir", Remote)
    diverging = plan.model_copy(update={"lr": 1e30})

    with pytest.raises(NonFiniteLossError, match=r"at step (\d+)") as caught:
        run_of(diverging, tmp_path / "run")

    found = re.search(r"at step (\d+)", str(caught.value))
    assert found is not None
    failed_at = int(found[1])
    assert failed_at > 2  # rows there are, and the newest would have come later
    rows = read_metrics(Remote(str(tmp_path / "run")))
    assert [row["step"] for row in rows] == list(range(1, failed_at))


def sent(number: signal.Signals) -> None:
    """Call the handler, since the session takes a signal itself for its own end."""
    handler = signal.getsignal(number)
    assert callable(handler)
    handler(number, None)


def test_signal__the_first_is_handed_on_and_the_work_ends_by_itself():
    asked, ended = [], threading.Event()

    def ask(name: str) -> bool:
        asked.append(name)
        ended.set()
        return True

    def work() -> None:
        sent(signal.SIGTERM)
        assert ended.wait(10)

    interruptible(work, ask)

    assert asked == ["SIGTERM"]


def test_signal__the_second_ends_it_at_once():
    ended = threading.Event()

    def ask(name: str) -> bool:
        sent(signal.SIGINT)
        return True

    def work() -> None:
        sent(signal.SIGTERM)
        ended.wait(10)

    with pytest.raises(StoppedError, match="ended by SIGINT before a checkpoint") as caught:
        interruptible(work, ask)

    ended.set()
    assert caught.value.exit_code == 128 + signal.SIGINT


def test_signal__ends_at_once_what_has_not_begun():
    ended = threading.Event()

    def work() -> None:
        sent(signal.SIGTERM)
        ended.wait(10)

    with pytest.raises(StoppedError) as caught:
        interruptible(work, lambda name: False)

    ended.set()
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_work__its_error_is_raised_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def work() -> None:
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"):
        interruptible(work, lambda name: True)

    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_handlers__are_the_main_threads_alone():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def elsewhere() -> None:
        with signals_handled_by(signal.SIG_IGN):
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()

    assert inside == [before]
