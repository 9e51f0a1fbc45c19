from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mimray.trainers.storage import RunDir
from mimray.tuning.record import SweepRecord
from mimray.tuning.report import write_report
from mimray.tuning.report.summary import summarise
from mimray.tuning.report.tables import commands

RATIO = "method.mask_ratio"
EVIL = "<script>window.evil=1</script>\"'&|`</script><img src=x onerror=evil()>"
Make = Callable[..., Any]


class Tags(HTMLParser):
    """Start tags of a page with their attributes, and how deep each tag is still open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def data_in(place: Path) -> dict[str, Any]:
    tree = json.loads((place / "report.json").read_text(), parse_constant=refuse)
    assert isinstance(tree, dict)
    return tree


def page_in(place: Path) -> str:
    return (place / "report.html").read_text()


def body_of(page: str) -> str:
    """The page without plotly's code, which is most of it."""
    return page.partition("<body>")[2].partition('<script type="application/json"')[0]


def test_write_report__names_the_three_files(grid: SweepRecord, tmp_path: Path):
    uris = write_report(grid, RunDir(str(tmp_path)))

    assert uris == [str(tmp_path / f"report.{ending}") for ending in ("html", "md", "json")]
    assert all(Path(uri).stat().st_size for uri in uris)


def test_json__has_all_that_was_drawn(grid: SweepRecord, tmp_path: Path):
    write_report(grid, RunDir(str(tmp_path)), speed={0.75: 3.8})

    tree = data_in(tmp_path)
    summary = summarise(grid)
    assert [row["trial"] for row in tree["ranked"]] == [t.number for t in grid.ranked()]
    assert [p["trial"] for p in tree["pareto"]["samples"]] == [
        p.trial for p in summary.fronts["samples"]
    ]
    assert tree["heatmap"]["cells"][0][0]["trial"] == 0
    assert {row["mask_ratio"]: row["measured"] for row in tree["speed"]}[0.75] == 3.8
    assert set(tree["importances"]["shares"]) == set(grid.keys)
    assert SweepRecord.model_validate(tree["record"]) == grid


def test_page__is_well_formed_and_reloads_only_while_the_sweep_runs(
    grid: SweepRecord, tmp_path: Path
):
    write_report(grid, RunDir(str(tmp_path)))
    running = page_in(tmp_path)
    write_report(grid.model_copy(update={"ended": True}), RunDir(str(tmp_path)))
    ended = page_in(tmp_path)

    refreshes = [
        [m for m in Tags(page).named("meta") if m.get("http-equiv") == "refresh"]
        for page in (running, ended)
    ]
    assert [len(found) for found in refreshes] == [1, 0]
    tags = Tags(running)
    assert tags.open == []
    assert all(head.get("scope") in ("col", "row") for head in tags.named("th"))
    ids = [attributes["id"] for _, attributes in tags.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_page__lets_nothing_be_fetched(grid: SweepRecord, tmp_path: Path):
    write_report(grid, RunDir(str(tmp_path)))

    tags = Tags(page_in(tmp_path))
    (policy,) = [
        m["content"] or ""
        for m in tags.named("meta")
        if m.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"https?:|\*|script-src[^;]*'unsafe-inline'", policy)
    assert not [a for _, a in tags.found if str(a.get("src", a.get("href", ""))).startswith("http")]


def test_report__shows_what_people_typed_as_text(record: Make, trial: Make, tmp_path: Path):
    made = [
        trial(i, {EVIL: EVIL, "b": i}, [i / 10], state="failed" if i == 4 else "finished",
              reason=EVIL)
        for i in range(5)
    ]  # fmt: skip
    evil = record(made, name=EVIL, metric=EVIL, proxy=EVIL, command=EVIL, data=EVIL, uri=EVIL)

    write_report(evil, RunDir(str(tmp_path)))

    tags = Tags(page_in(tmp_path))
    assert len(tags.named("script")) == 3
    assert tags.named("img") == []
    assert not [a for _, a in tags.found if any(name.startswith("on") for name in a)]
    text, _, code = (tmp_path / "report.md").read_text().partition("## Commands")
    assert "<script" not in text
    assert code.count("````") == 0
    assert data_in(tmp_path)["record"]["name"] == EVIL


@pytest.mark.parametrize("proxy", ["", "RankMe needs no labels."])
def test_report__says_when_the_score_is_a_proxy_and_why(
    grid: SweepRecord, tmp_path: Path, proxy: str
):
    write_report(grid.model_copy(update={"proxy": proxy}), RunDir(str(tmp_path)))

    for text in (body_of(page_in(tmp_path)), (tmp_path / "report.md").read_text()):
        assert ("is a proxy, found without labels. RankMe needs no labels. " in text) == bool(proxy)
        assert "losses cannot be compared" in text


@pytest.mark.parametrize("count", [0, 1])
def test_report__of_a_sweep_that_has_hardly_begun(
    record: Make, trial: Make, tmp_path: Path, count: int
):
    made = [trial(i, {RATIO: 0.5, "b": 1}, [], state="running") for i in range(count)]

    write_report(record(made, keys=(RATIO, "b")), RunDir(str(tmp_path)), curves={0: []})

    assert "No trial has a score yet." in body_of(page_in(tmp_path))
    assert "models register" not in (tmp_path / "report.md").read_text()
    assert data_in(tmp_path)["ranked"] == []


def test_report__of_one_key_shows_score_against_it(record: Make, trial: Make, tmp_path: Path):
    made = [trial(i, {"method.loss": v}, [i / 10]) for i, v in enumerate(["l1", "l2", None])]

    write_report(record(made), RunDir(str(tmp_path)))

    page = page_in(tmp_path)
    assert 'id="plot-slice-0"' in page
    assert 'id="plot-heatmap"' not in page


def test_page__holds_reconstructions_of_the_best_three_and_the_worst(
    grid: SweepRecord, tmp_path: Path, draw: Make
):
    for trial in grid.trials:
        draw(tmp_path, trial.number)
    ranked = [t.number for t in grid.ranked()]
    (tmp_path / "trials" / f"{ranked[1]:04d}" / "reconstruction.png").write_bytes(b"\x89PNG half")

    write_report(grid, RunDir(str(tmp_path)))

    images = Tags(page_in(tmp_path)).named("img")
    shown = [re.search(r"trial (\d+)", str(image["alt"])) for image in images]
    assert [int(found[1]) for found in shown if found] == [ranked[0], ranked[2], ranked[-1]]
    assert all(str(image["src"]).startswith("data:image/") for image in images)
    assert {(image["width"], image["height"]) for image in images} == {("900", "450")}


def test_report__says_how_to_go_on(grid: SweepRecord, tmp_path: Path):
    named = grid.model_copy(update={"name": "my sweep", "uri": "s3://bucket/my sweep?region=eu"})

    found = [command for _, command in commands(named, named.best)]

    assert found == [
        grid.command,
        "mimray tune --resume 'my sweep' --storage 's3://bucket?region=eu'",
        "mimray models register 'my sweep:best' --name MODEL --alias champion "
        "--storage 's3://bucket?region=eu'",
        "mimray serve MODEL@champion",
        "mimray ui --sweep 'my sweep' --storage 's3://bucket?region=eu'",
        "tensorboard --logdir 's3://bucket/my sweep/tensorboard?region=eu'",
    ]


def test_report__gives_no_password_away(grid: SweepRecord, tmp_path: Path):
    address = "postgresql://me:hunter2@db/optuna"
    told = grid.model_copy(
        update={"study": ("s", address), "config": {"storage": address}, "command": address}
    )

    write_report(told, RunDir(str(tmp_path)))

    for name in ("report.html", "report.md", "report.json"):
        assert "hunter2" not in (tmp_path / name).read_text()


def test_write_report__is_quick(grid: SweepRecord, tmp_path: Path, draw: Make):
    for trial in grid.trials:
        draw(tmp_path, trial.number)
    rows = [{"step": i, "samples": 10 * i, "loss": 1 / (i + 1)} for i in range(400)]
    curves = {trial.number: rows for trial in grid.trials}
    write_report(grid, RunDir(str(tmp_path)), curves=curves)  # imports what it needs

    began = time.process_time()
    write_report(grid, RunDir(str(tmp_path)), curves=curves)

    # A second on a quiet core; what else runs must not fail a test.
    assert time.process_time() - began < 3


def test_import__brings_neither_plotly_nor_optuna():
    import subprocess

    code = (
        "import sys, mimray.tuning.report\n"
        "print(sorted({'plotly', 'optuna', 'sklearn', 'torch'} & set(sys.modules)))"
    )

    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert answer.stdout == "[]\n"


values = st.sampled_from([None, True, "l1", "<b>", "", (1, 2), 0, 3, 0.5, 1e-5, -2.0, 10**9])
scores = st.lists(st.sampled_from([0.1, 0.5, -3.0, 1e6, math.nan, math.inf]), max_size=3)
states = st.sampled_from(["waiting", "running", "stopped", "finished", "failed", "cut"])
spaces = st.sampled_from(
    [
        {},
        {"space": None},
        {"space": {"a": {"loguniform": [1e-5, 1]}, "b": {"choice": ["l1", None]}}},
    ]
)


@given(st.lists(st.tuples(states, values, values, scores), max_size=7), st.integers(0, 3), spaces)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_report__is_written_at_any_stage_of_any_sweep(
    record: Make, trial: Make, tmp_path: Path, rows: Any, num_keys: int, config: Any
):
    keys = ("a", "b", RATIO)[:num_keys]
    made = [
        trial(i, dict(zip(keys, (x, y, x), strict=False)), found, state=state, loss=math.nan)
        for i, (state, x, y, found) in enumerate(rows)
    ]

    write_report(record(made, keys=keys, config=config), RunDir(str(tmp_path)), speed={0.5: 2.0})

    data_in(tmp_path)
    assert Tags(page_in(tmp_path)).open == []
