"""The page in a real browser: it draws everything, fetches nothing, and fits a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mimray.trainers.storage import RunDir
from mimray.tuning.record import SweepRecord
from mimray.tuning.report import write_report

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "<script>window.evil=1</script></script><img src=x onerror='window.evil=1'>"
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if shutil.which(CHROMIUM) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{CHROMIUM} is missing; .ci/run installs it")
        pytest.skip(f"{CHROMIUM} is missing; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def look(browser: Any) -> Iterator[Make]:
    """Opens a page, waits until it is drawn, and gives it with what went wrong."""
    contexts = []

    def opened(place: Path, *, width: int = 1200, scheme: str = "light") -> tuple[Any, list[str]]:
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            is_mobile=width < 600,
            has_touch=width < 600,
        )
        contexts.append(context)
        page, wrong = context.new_page(), []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on(
            "request",
            lambda r: (
                None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url)
            ),
        )
        page.goto((place / "report.html").as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached")
        return page, wrong

    yield opened
    for context in contexts:
        context.close()


def undrawn(page: Any) -> list[str]:
    """Ids of plots that hold no trace; parallel coordinates have axes only where WebGL works."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll(".plot")].filter(plot => !plot.querySelector(
             ".scatterlayer .trace path, .heatmaplayer image, .barlayer path, .parcoords .axis"))
           .map(plot => plot.id)"""
    )
    return found


def colours(page: Any) -> list[str]:
    page.wait_for_timeout(200)
    found: list[str] = page.evaluate(
        """[getComputedStyle(document.body).backgroundColor,
            getComputedStyle(document.querySelector("#plot-scores .xtick text")).fill,
            document.querySelector("#plot-heatmap").data[0].colorscale[0][1]]"""
    )
    return found


@pytest.mark.parametrize(
    ("width", "schemes"), [(1200, ("light", "dark")), (375, ("dark", "light"))]
)
def test_page__draws_every_plot_in_its_width_and_follows_the_scheme(
    grid: SweepRecord, tmp_path: Path, look: Make, draw: Make, width: int, schemes: tuple[str, str]
):
    draw(tmp_path, grid.ranked()[0].number)
    rows = [{"step": i, "samples": 10 * i, "loss": 1 / (i + 1)} for i in range(40)]
    curves = {trial.number: rows for trial in grid.trials}
    write_report(grid, RunDir(str(tmp_path)), curves=curves, speed={0.75: 3.8})

    page, wrong = look(tmp_path, width=width, scheme=schemes[0])

    names = page.evaluate("[...document.querySelectorAll('.plot')].map(plot => plot.id.slice(5))")
    assert sorted(names) == sorted(
        ["heatmap", "compute-samples", "compute-device-seconds", "scores", "losses", "parallel",
         "importance", "speed"]
    )  # fmt: skip
    seen = []
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        seen.append(colours(page))
        assert undrawn(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.body.scrollWidth") <= width
    assert all(first != then for first, then in zip(*seen, strict=True))
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    assert wrong == []


def test_page__runs_nothing_that_a_name_holds(
    record: Make, trial: Make, tmp_path: Path, look: Make
):
    made = [
        trial(i, {"a": f"{EVIL}{i % 2}", "b": i}, [i / 10], reason=EVIL, state="finished")
        for i in range(5)
    ]
    write_report(
        record(made, name=EVIL, metric=EVIL, proxy=EVIL, command=EVIL), RunDir(str(tmp_path))
    )

    page, wrong = look(tmp_path)

    assert page.evaluate("window.evil") is None
    assert page.inner_text("h1") == EVIL
    # plotly drops tags that it does not know; escaped, they are still read.
    for place in (".legendtext", ".ytitle"):
        assert page.text_content(f"#plot-scores {place}").startswith("<script>window.evil")
    assert undrawn(page) == []
    assert wrong == []


@pytest.mark.parametrize("count", [0, 1, 2])
def test_page__of_a_sweep_that_has_hardly_begun(
    record: Make, trial: Make, tmp_path: Path, look: Make, count: int
):
    made = [trial(i, {"a": None, "b": "x"}, [0.5] * i, state="running") for i in range(count)]
    write_report(record(made, keys=("a", "b")), RunDir(str(tmp_path)))

    page, wrong = look(tmp_path)

    assert undrawn(page) == []
    assert wrong == []


def test_page__shows_where_a_policy_is_broken(grid: SweepRecord, tmp_path: Path, look: Make):
    # The checks above would be worth nothing if the browser told of nothing.
    write_report(grid, RunDir(str(tmp_path)))
    page = tmp_path / "report.html"
    added = '<script>window.evil=1</script><img alt="" src="http://127.0.0.1:9/x.png"></footer>'
    page.write_text(page.read_text().replace("</footer>", added))

    opened, wrong = look(tmp_path)

    assert opened.evaluate("window.evil") is None
    assert len(wrong) >= 2
