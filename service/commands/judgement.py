"""The judgement on an adapted encoder: what was gained, by which rule, and the words for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mimray.trainers.evaluation.uncertainty import Figure, around, difference

ENCODERS = ("untrained", "start", "adapted")
PROXIES = ("rankme", "cka")
"""Figures that need no labels, and so say what changed, not whether it is better."""
BOUNDS = {"rankme": (1.0, math.inf), "cka": (-1.0, 1.0)}
"""Bounds of figures; all others lie between 0 and 1."""
PLACES = {
    "labelled": "",
    "data": "pictures adapted to, ",
    "retain": "retention set, ",
}
RULE = (
    "A gain is claimed where the 95 % interval of the paired difference, adapted less start, lies "
    "above 0 for at least one figure on the labelled pictures and below 0 for none of them. "
    "RankMe, CKA and the retention set decide nothing."
)
SCOPE = (
    "Intervals are over pictures, each by itself: they do not hold what another seed of the "
    "adaptation would change."
)


def with_changes(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure with its intervals, `change` from start to adapted and `above_untrained`.

    Args:
        figure: the headline, standard error and evidence of each of its `encoders`, by name; and
            `comparable`, False where no difference is to be taken.

    Returns:
        The figure without its evidence; a difference is None where there is none.
    """
    encoders = figure["encoders"]
    known = {name: Figure.of(found) for name, found in encoders.items()}
    pairs = {"change": ("adapted", "start"), "above_untrained": ("adapted", "untrained")}
    changes: dict[str, Any] = dict.fromkeys(pairs)
    if figure["comparable"]:
        changes = {
            key: _change(figure["task"], known[one], known[other])
            for key, (one, other) in pairs.items()
        }
    shown = {name: _shown(figure["task"], one) for name, one in known.items()}
    return {**figure, "encoders": shown, **changes}


def _shown(task: str, figure: Figure) -> dict[str, Any]:
    """A figure with its interval, which ends where the figure itself does."""
    error, least, most = figure.standard_error, *BOUNDS.get(task, (0.0, 1.0))
    if error is None:
        return {"value": figure.value, "interval": None}
    low, high = around(figure.value, error)
    return {"value": figure.value, "interval": (max(low, least), min(high, most))}


def _change(task: str, one: Figure, other: Figure) -> dict[str, Any]:
    """The difference of two figures, with its outcome in a word."""
    found = difference(one, other)
    return {**asdict(found), "outcome": _outcome(task, found.interval)}


def _outcome(task: str, interval: tuple[float, float] | None) -> str:
    better, worse = ("rose", "fell") if task in PROXIES else ("gained", "lost")
    if interval is None:
        return "no interval"
    return better if interval[0] > 0 else worse if interval[1] < 0 else "not told apart"


def judged(figures: Sequence[Mapping[str, Any]]) -> tuple[bool | None, list[str]]:
    """The verdict by `RULE`, and its reasons in words, the deciding one first.

    Args:
        figures: figures from `with_changes`.

    Returns:
        True for a gain, False for none, None where there are no labels to tell by.
    """
    deciding = {name_of(f): f["change"]["outcome"] for f in figures if f["role"] == "labelled"}
    gained, lost = (_having(deciding, outcome) for outcome in ("gained", "lost"))
    others = [
        f"{name_of(figure)} is not told apart from that of an untrained encoder"
        for figure in figures
        if figure["role"] == "labelled" and figure["above_untrained"]["outcome"] != "gained"
    ]
    others += [
        f"{name_of(figure)} was lost on the retention set"
        for figure in figures
        if figure["role"] == "retain" and figure["change"] and figure["change"]["outcome"] == "lost"
    ]
    if not deciding:
        return None, [
            "without labels nothing says that it became better, only how it changed",
            *others,
        ]
    if gained and not lost:
        alone = ", and lost on none" if len(deciding) > 1 else ""
        return True, [f"gained on {' and '.join(gained)}{alone}", *others]
    if lost:
        but = f", though gained on {' and '.join(gained)}" if gained else ""
        return False, [f"lost on {' and '.join(lost)}{but}", *others]
    verb = "is" if len(deciding) == 1 else "are"
    return False, [f"{' and '.join(deciding)} {verb} not told apart from the start's", *others]


def _having(outcomes: Mapping[str, str], wanted: str) -> list[str]:
    return [name for name, outcome in outcomes.items() if outcome == wanted]


def name_of(figure: Mapping[str, Any]) -> str:
    """A figure's name for people, e.g. `dense kNN mIoU`."""
    name, metric = figure["name"], figure["metric"]
    return metric if name in ("", metric) else f"{name} {metric}"


def line_of(figure: Mapping[str, Any]) -> str:
    """A figure in one line: both values, the difference with its interval, the outcome."""
    where, encoders = f"{PLACES[figure['role']]}{name_of(figure)}", figure["encoders"]
    adapted, untrained = (encoders[name] for name in ("adapted", "untrained"))
    beside = f"untrained {number(untrained['value'])}"
    if "start" not in encoders:
        interval = _interval_text(adapted["interval"], signed=False)
        return f"{where} {number(adapted['value'])} ({interval}; {beside})"
    values = f"{number(encoders['start']['value'])} -> {number(adapted['value'])}"
    change = figure["change"]
    if change is None:
        return f"{where} {values} (not comparable; {beside})"
    return f"{where} {values} ({change_text(change)}; {beside}): {change['outcome']}"


def _interval_text(interval: Sequence[float] | None, *, signed: bool) -> str:
    if interval is None:
        return "no interval"
    low, high = (number(bound, signed=signed) for bound in interval)
    return f"95 % interval {low} to {high}"


def number(value: float, *, signed: bool = False) -> str:
    """A figure for people, as precise as its size warrants."""
    digits = 4 if abs(value) < 10 else 2
    return f"{value:{'+' if signed else ''}.{digits}f}"


def short(place: str) -> str:
    """The last two names of a path, which suffice to tell a verdict's places apart."""
    return "/".join(place.rstrip("/").rsplit("/", 2)[-2:])


def change_text(change: Mapping[str, Any]) -> str:
    """A difference with its interval."""
    interval = _interval_text(change["interval"], signed=True)
    return f"{number(change['value'], signed=True)}, {interval}"


def verdict_markdown(verdict: Mapping[str, Any], last_lines: Sequence[str]) -> str:
    """A verdict as a page: its sentence, the table, the rule, the pictures, the notes.

    Args:
        verdict: the content of verdict.json.
        last_lines: the reasons and the verdict, in words.
    """
    rows = [["pictures", "figure", *ENCODERS, "adapted less start", "outcome"]]
    rows += [["---"] * len(rows[0]), *(_cells(figure) for figure in verdict["figures"])]
    parts = [
        f"# {short(verdict['adapted'])} against {short(verdict['start'])}",
        "\n".join(f"- {line}" for line in reversed(last_lines)),
        "\n".join(f"| {' | '.join(row)} |" for row in rows),
        f"{RULE} {SCOPE}",
        "![Every figure with its 95 % interval](verdict.png)",
        "![Patch tokens by their principal components](pca.png)",
        "\n".join(f"- {note}" for note in verdict["notes"]),
        f"`{verdict['command']}`" if verdict["command"] else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(figure: Mapping[str, Any]) -> list[str]:
    encoders, change = figure["encoders"], figure["change"]
    values = [number(encoders[n]["value"]) if n in encoders else "" for n in ENCODERS]
    place = f"{short(figure['data'])} ({figure['num_pictures']:,})"
    if change is None:
        own = _interval_text(encoders["adapted"]["interval"], signed=False)
        return [place, name_of(figure), *values, own if "start" not in encoders else "", ""]
    return [place, name_of(figure), *values, change_text(change), change["outcome"]]
