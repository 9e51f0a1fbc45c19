"""The drivers of `benchmarks/scaling.py`, `zero_memory.py` and `scale_on_paper.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return __import__(name)


def run(script: str, *arguments: object) -> str:
    """Output of a benchmark, run as a person runs it."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *map(str, arguments)],
        capture_output=True, text=True, timeout=800, env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_clock__gives_time_to_the_innermost_part(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = module("scaling", monkeypatch)
    now = iter(float(second) for second in range(100))
    monkeypatch.setattr(scaling.time, "perf_counter", lambda: next(now))
    monkeypatch.setattr(scaling.time, "thread_time", lambda: 0.0)
    clock = scaling.Clock()
    clock.begin_update()
    with clock.part("loader"), clock.part("order"):
        pass
    clock.around("checkpoint", clock.around("collectives", lambda: None))()
    clock.begin_update()

    # A second goes by between two looks at the clock.
    first, second = clock.updates
    assert {part: wall for part, (wall, _) in first.items()} == {
        "engine": 3.0, "loader": 2.0, "order": 1.0, "checkpoint": 3.0,
    }  # fmt: skip
    assert second == {}


def test_summary__is_of_updates_after_the_start_and_without_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaling = module("scaling", monkeypatch)

    def rank(loader: float) -> list[dict[str, tuple[float, float]]]:
        first = [{"loader": (99.0, 9.0)}] * scaling.SKIPPED
        plain = {"compute": (2.0, 0.0), "loader": (loader, 0.5)}
        return [*first, plain, {**plain, "checkpoint": (7.0, 1.0)}, plain, {"export": (50.0, 1.0)}]

    found = scaling.summary([rank(1.0), rank(3.0)], recorder=0.1)

    assert (found.update, found.checkpoint, found.recorder) == (4.0, 7.0, 0.1)
    assert (found.parts["loader"], found.parts["collectives"]) == (2.0, 0.0)
    assert found.cpu["loader"] == 0.5


def test_scaling__is_efficient_where_an_update_takes_no_longer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scaling = module("scaling", monkeypatch)
    parts = dict.fromkeys(("compute", *scaling.PARTS), 0.01)
    monkeypatch.setattr(scaling, "cluster", lambda num_cpus: nullcontext())
    monkeypatch.setattr(scaling, "ingest_photos", lambda out: None)
    # A second for 16 pictures of a worker, and a tenth for each worker.
    monkeypatch.setattr(
        scaling, "start", lambda case, *_: scaling.Start(
            case.batch / case.num_workers / 16 + case.num_workers / 10, parts, parts, 0.5, 0.02
        ),
    )  # fmt: skip
    figures = tmp_path / "figures.json"
    words = ["scaling.py", str(tmp_path / "out"), "--rounds", "2", "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", words)
    scaling.main()

    printed = capsys.readouterr().out
    weak, strong = printed.split("strong scaling")
    assert "0.786 (0.786 to 0.786)" in weak  # 1.1 / 1.4
    assert "0.732 (0.732 to 0.732)" in strong  # 4.1 / 1.4 / 4
    # Strong with as many workers as can be is weak with as many, and is made once.
    cases = [(row["num_workers"], row["batch"]) for row in json.loads(figures.read_text())]
    assert cases == 2 * [(1, 16), (2, 32), (4, 64), (1, 64), (2, 64)]


@pytest.mark.slow
def test_scaling__measures_trainings(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    printed = run(
        "scaling.py", tmp_path / "out", "--workers", "1,2", "--rounds", 1, "--updates", 16,
        "--pictures", 2, "--ms", 20, "--json", figures,
    )  # fmt: skip

    assert "weak scaling" in printed
    starts = json.loads(figures.read_text())
    assert [(s["num_workers"], s["batch"]) for s in starts] == [(1, 2), (2, 4), (1, 4)]
    for start in starts:
        slept = 0.02 * start["batch"] / start["num_workers"]
        assert start["update"] > start["parts"]["compute"] >= slept
        assert min(start["parts"].values()) > 0, start
        assert start["checkpoint"] > 0
        metrics = tmp_path / f"out/runs/workers-{start['num_workers']}-batch-{start['batch']}"
        assert len((metrics / "metrics.jsonl").read_text().splitlines()) == 16


@pytest.mark.slow
def test_zero_memory__counts_what_each_stage_hands_to_collectives(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run(
        "zero_memory.py", tmp_path / "out", "--stages", "1,3", "--width", 256, "--depth", 4,
        "--accumulation", 2, "--json", figures,
    )  # fmt: skip

    first, third = json.loads(figures.read_text())
    for row in (first, third):
        assert row["update"] == pytest.approx(row["forecast"], rel=0.3), row
        assert row["export"] > 0
    once = pytest.approx(1, abs=0.03)  # positions are not trained, small tensors are padded
    assert first["traffic"] == {"all_reduce": once, "all_gather_into_tensor": once}
    assert third["traffic"]["reduce_scatter_tensor"] == pytest.approx(2, abs=0.06)
    # Small parameters are kept whole, and gathered but once an update.
    assert 1.8 < third["traffic"]["all_gather_into_tensor"] < 2


@pytest.mark.parametrize(("processes", "least", "most"), [(1, 1.0, 1.0), (10, 9.0, 10.0)])
def test_reads__are_one_for_each_process_that_sees_a_window(
    processes: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper = module("scale_on_paper", monkeypatch)
    monkeypatch.setattr(paper, "PICTURES", 400 * paper.GROUP_ROWS)
    paper.reads.cache_clear()
    assert least <= paper.reads(processes, 64) <= most
    paper.reads.cache_clear()


def test_paper__prints_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = module("scale_on_paper", monkeypatch)
    monkeypatch.setattr(paper, "reads", lambda processes, micro_batch: 5.0)
    monkeypatch.setattr(sys, "argv", ["scale_on_paper.py", "--gpus", "8", "--batch", "1024"])
    paper.main()

    printed = capsys.readouterr().out
    # 4 bytes of 111.66 M gradients twice, and once more for the weights, over a ring of 8.
    assert "| ViT-B | 8 | 128 | 32 | 0.8 GB, 2 ms | 1.2 GB, 3 ms |" in printed
    assert "| ViT-B | 8 | 32,456 | 17.5 h | 0.8 | 64 | 5 | 9.0 | 0.3 |" in printed
