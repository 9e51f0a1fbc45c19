"""The pictures of docs/performance.md, from what the benchmarks wrote.

    python benchmarks/loading.py PICTURES --json LOADING
    python benchmarks/steps.py --json STEPS
    python benchmarks/plots.py LOADING STEPS OUT

OUT gets `pictures.png` and `steps.png`: bars are medians of ratios within a round, lines reach from
the least to the most.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mimray.trainers.evaluation.charts import new_figure

_OURS, _PEERS, _TEXT = "#1f5fae", "#a9b4c0", "#33383f"
_STEPS = {
    "mae": "MAE, ViT-B/16", "simmim": "SimMIM, ViT-B/16", "beit": "BEiT, ViT-B/16",
    "cross": "MAE, decoder", "visible": "MAE's encoder",
}  # fmt: skip

Bars = dict[str, list[float]]
"""Ratios of each round, by name."""


def over_base(rates: Mapping[str, Sequence[float]], base: str) -> Bars:
    """Each way's rates over those of one of them, round by round."""
    return {
        name: [a / b for a, b in zip(found, rates[base], strict=True)]
        for name, found in rates.items()
    }


def picture_bars(found: Mapping[str, Any]) -> dict[str, Bars]:
    """Of what loading.py found: by a core, and by two processes."""
    whole = {name: each["images_per_s"] for name, each in found["end_to_end"].items()}
    base = next(iter(whole))
    return {
        "pictures a second of a core": over_base(found["core"], next(iter(found["core"]))),
        "pictures a second of two processes": over_base(whole, base),
    }


def step_bars(found: Mapping[str, Any]) -> Bars:
    """Of what steps.py found: ours over each other way of the same step."""
    bars: Bars = {}
    for part, title in _STEPS.items():
        rates = {
            name: each["images_per_s"]
            for name, each in found["parts"][part].items()
            if "images_per_s" in each
        }
        ours, *others = rates
        for other in others:
            if not other.startswith("mimray"):
                name = f"{title}: {ours} / {other}"
                bars[name] = over_base(rates, other)[ours]
    return bars


def draw(panels: Mapping[str, Bars], width: float, path: Path) -> None:
    """Draw panels of bars side by side; 1 is marked."""
    rows = max(map(len, panels.values()))
    figure = new_figure(width, 1.1 + 0.42 * rows)
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, bars) in zip(drawn, panels.items(), strict=True):
        names = list(reversed(bars))
        for place, name in enumerate(names):
            middle = statistics.median(bars[name])
            axes.barh(place, middle, color=_OURS if "mimray" in name or "/" in name else _PEERS)
            axes.plot([min(bars[name]), max(bars[name])], [place, place], color=_TEXT, lw=1.2)
            axes.annotate(
                f"{middle:.2f}", (max(bars[name]), place), xytext=(5, 0),
                textcoords="offset points", va="center", fontsize=9, color=_TEXT,
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.axvline(1, color=_TEXT, lw=0.8, ls=":")
        axes.set_xlim(0, 1.15 * max(max(each) for each in bars.values()))
        axes.set_title(title, fontsize=10, loc="left", color=_TEXT)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loading", type=Path)
    parser.add_argument("steps", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    loading, steps = (json.loads(p.read_text()) for p in (arguments.loading, arguments.steps))
    panels = picture_bars(loading)
    draw(
        {f"{title}, torchvision's loader = 1": bars for title, bars in panels.items()},
        12,
        arguments.out / "pictures.png",
    )
    draw({"steps, ratios of pictures a second": step_bars(steps)}, 9, arguments.out / "steps.png")


if __name__ == "__main__":
    main()
