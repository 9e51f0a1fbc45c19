"""Tables and charts of `benchmarks/family.py`, from the figures found so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from measuring import TESTS, value_text

Found = dict[str, Any]


class Facts(NamedTuple):
    """The properties of a method in the document's table, which no run measures.

    Attributes:
        year: the year of its paper.
        tokenizer: what makes its targets, where they are learnt beforehand.
        target: what is predicted.
        loss: the loss.
        sees: the tokens that the encoder computes.
        predictor: what predicts.
    """

    year: str
    tokenizer: str
    target: str
    loss: str
    sees: str
    predictor: str


FACTS = {
    "ae": Facts("2006", "none", "pixels", "squared error", "all", "convolutions"),
    "vae": Facts("2013", "none", "pixels", "ELBO", "all", "convolutions"),
    "beit": Facts("2021", "dVAE (512)", "codes", "cross-entropy", "all, masked", "linear"),
    "mae": Facts("2021", "none", "pixels", "squared error", "visible", "2 blocks"),
    "mae-cross": Facts("2024", "none", "pixels", "squared error", "visible", "2 cross blocks"),
    "simmim": Facts("2021", "none", "pixels", "absolute error", "all, masked", "linear"),
    "maskfeat": Facts("2021", "none", "HOG", "squared error", "all, masked", "linear"),
    "maskfeat-mae": Facts("-", "none", "HOG", "squared error", "visible", "2 blocks"),
    "distill": Facts("2022", "mae, frozen", "features", "cosine", "all, masked", "linear"),
    "ibot": Facts("2021", "own average", "prototypes", "cross-entropy", "all, views", "MLP"),
    "capi": Facts("2025", "own average", "clusters", "cross-entropy", "visible", "cross blocks"),
}
"""Rows of the document's table (4.7.2), with losses and masking as they are implemented here."""

CURVE = ("mae-15", "mae-50", "mae", "mae-90")
# The t-distribution's 97.5 % quantile by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def tables(found: Found, out: Path) -> None:
    """Write all tables as OUT/family.md.

    Args:
        found: the figures so far.
        out: the benchmark's directory.
    """
    parts = [
        _scores(found),
        _comparison(found),
        _masking(found),
        _adaptation(found),
        _speeds(found),
    ]
    (out / "family.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def guide(found: Found) -> str:
    """The rows of `mimray plan`'s guide, as `service/commands/measured.yaml` has them.

    Args:
        found: the figures so far.
    """
    asked, names = found["asked"], _with_scores(found)
    measured = [
        {"method": name}
        | {
            column: _short(found["scores"][name].get(test))
            for column, test in (
                ("knn", "knn"),
                ("linear", "linear"),
                ("fine_tuned", "finetune"),
                ("dense_knn", "camvid-knn"),
                ("dense_linear", "camvid-linear"),
                ("detection", "bccd"),
            )
        }
        for name in names
    ]
    conditions = (
        f"{asked['minutes']:g} minutes of training each on two CPU cores; a ViT of 2.7 M "
        "parameters, 15,000 pictures of 50 classes at 64 px. knn, linear, fine_tuned (on 5,000 of "
        "them): accuracy in percent; dense_knn, dense_linear: CamVid mIoU; detection: BCCD AP50"
    )
    if asked["limit"] or asked["epochs"]:
        conditions = "A trial of the benchmark, on few pictures: no figures to go by"
    return (
        "# Written by `benchmarks/family.py --guide`; `mimray plan` shows it.\n"
        + yaml.safe_dump({"conditions": conditions, "rows": measured}, sort_keys=False, width=100)
    )


def _with_scores(found: Found) -> list[str]:
    return [name for name in found["scores"] if name != "of adaptation"]


def _short(score: dict[str, Any] | None) -> str:
    return "-" if score is None else f"{100 * score['headline']:.1f}"


def _table(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def _scores(found: Found) -> str:
    body = [
        [
            name,
            f"{run['steps']:,}" if run else "",
            f"{run['pflop']:.3g}" if run else "",
            *(value_text(found["scores"][name].get(test)) for test in TESTS),
        ]
        for name in _with_scores(found)
        for run in [found["runs"].get(name)]
    ]
    head = ("method", "steps", "PFLOP", *(test.title for test in TESTS.values()))
    asked = ", ".join(f"{key} {value}" for key, value in found["asked"].items() if value)
    return _table(f"Scores ({asked})", head, body) if body else ""


def _comparison(found: Found) -> str:
    """The document's table (4.7.2): items down, methods across."""
    names = [name for name in found["runs"] if name in FACTS]
    if not names:
        return ""
    runs, scores = found["runs"], found["scores"]
    facts = [FACTS[name] for name in names]

    def of(test: str) -> list[str]:
        return [_short(scores.get(name, {}).get(test)) for name in names]

    ratios = [runs[name]["mask_ratio"] for name in names]
    body = [
        ["year", *(one.year for one in facts)],
        ["tokenizer or teacher", *(one.tokenizer for one in facts)],
        ["prediction target", *(one.target for one in facts)],
        ["loss", *(one.loss for one in facts)],
        ["hidden", *("0 %" if r is None else _hidden(r) for r in ratios)],
        ["encoder's input", *(one.sees for one in facts)],
        ["predictor", *(one.predictor for one in facts)],
        ["linear probe, %", *of("linear")],
        ["fine-tuned, %", *of("finetune")],
        ["kNN, %", *of("knn")],
        ["images/s", *(f"{runs[name]['images_per_s']:.0f}" for name in names)],
        ["GFLOP a picture", *(f"{runs[name]['gflop_a_picture']:.2f}" for name in names)],
        ["stages", *("2" if runs[name]["minutes_before"] else "1" for name in names)],
        ["CamVid mIoU, dense kNN", *of("camvid-knn")],
        ["CamVid mIoU, linear", *of("camvid-linear")],
        ["BCCD AP50", *of("bccd")],
    ]
    return _table("The methods (4.7.2 of the document), with our figures", ["", *names], body)


def _hidden(ratio: Any) -> str:
    return f"{100 * ratio:.0f} %" if isinstance(ratio, int | float) else str(ratio)


def _masking(found: Found) -> str:
    """The document's table A.2."""
    runs = {name: found["runs"][name] for name in CURVE if name in found["runs"]}
    if len(runs) < 2:
        return ""
    slowest = min(run["images_per_s"] for run in runs.values())
    body = [
        [
            f"{100 * run['mask_ratio']:.0f} %",
            f"{run['images_per_s'] / slowest:.2f}",
            f"{run['pictures']:,}",
            *(
                value_text(found["scores"].get(name, {}).get(test))
                for test in ("knn", "linear", "finetune")
            ),
        ]
        for name, run in runs.items()
    ]
    head = ("hidden", "speed of a step, decoder included", "pictures seen", "kNN", "linear")
    title = "MAE by masking ratio, at equal time (A.2 of the document)"
    return _table(title, (*head, "fine-tuned"), body)


def _adaptation(found: Found) -> str:
    """Scores after adaptation less those of the start, paired by seed."""
    body = []
    for way, target in dict.fromkeys((one["way"], one["on"]) for one in found["adapted"]):
        same = [one for one in found["adapted"] if (one["way"], one["on"]) == (way, target)]
        for test in same[0]["scores"]:
            pairs = [one["scores"][test] for one in same]
            body.append(
                [
                    target,
                    way,
                    TESTS[test].title,
                    f"{statistics.mean(start for _, start in pairs):.4f}",
                    f"{statistics.mean(adapted for adapted, _ in pairs):.4f}",
                    paired_text([adapted - start for adapted, start in pairs]),
                ]
            )
    if not body:
        return ""
    head = ("pictures", "way", "score", "start", "adapted", "difference, 95 % over seeds")
    verdicts = [
        f"- {one['on']}, {one['way']}, seed {one['seed']}: {line}"
        for one in found["adapted"]
        for line in one.get("verdict", {}).get("lines", ())
    ]
    return "\n".join([_table("Adaptation, from half of the classes", head, body), "", *verdicts])


def paired_text(differences: Sequence[float]) -> str:
    """The mean of differences and, of several, its 95 % interval by Student's t."""
    mean, count = statistics.mean(differences), len(differences)
    if count < 2:
        return f"{mean:+.4f} (one seed)"
    half = _T[count - 1] * statistics.stdev(differences) / math.sqrt(count)
    return f"{mean:+.4f} ({mean - half:+.4f} to {mean + half:+.4f}; {count} seeds)"


def _speeds(found: Found) -> str:
    body = [
        [name, f"{speed['images_per_s']:.1f}", ", ".join(f"{one:.1f}" for one in speed["measured"])]
        for name, speed in found["speeds"].items()
        if "measured" in speed
    ]
    return _table("Speeds", ("method", "images/s", "measured"), body) if body else ""


def _points(found: Found) -> Iterator[tuple[str, list[float], list[float], list[float]]]:
    """Name, minutes, PFLOP and kNN along each run; what was trained beforehand counts."""
    for name, run in found["runs"].items():
        own = run["gflop_a_picture"] * 1e9 * run["pictures"] / 1e15
        before = run["pflop"] - own
        minutes = [run["minutes_before"] + minute for minute, _, _ in run["curve"]]
        pflop = [before + run["gflop_a_picture"] * samples / 1e6 for _, samples, _ in run["curve"]]
        yield name, minutes, pflop, [accuracy for _, _, accuracy in run["curve"]]


def chart(found: Found, out: Path) -> None:
    """Draw kNN over minutes and over PFLOP of training, a line a method, as OUT/family.png.

    Args:
        found: the figures so far.
        out: the benchmark's directory.
    """
    if not any(run["curve"] for run in found["runs"].values()):
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (by_time, by_flops) = pyplot.subplots(1, 2, figsize=(13, 5.5), sharey=True)
    marks = "os^Dv<>Pp*Xhd8"
    for number, (name, minutes, pflop, accuracy) in enumerate(_points(found)):
        style = {
            "marker": marks[number % len(marks)],
            "markersize": 5,
            "linewidth": 1.3,
            "linestyle": "--" if name in CURVE and name != "mae" else "-",
            "color": pyplot.get_cmap("tab20")(number % 20),
        }
        by_time.plot(minutes, accuracy, label=name, **style)
        by_flops.plot(pflop, accuracy, label=name, **style)
    untrained = found.get("untrained_probe")
    for axes, label in ((by_time, "minutes on two CPU cores"), (by_flops, "PFLOP of training")):
        if untrained is not None:
            axes.axhline(untrained["headline"], color="#a9b4c0", linestyle=":", label="untrained")
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    by_time.set_ylabel("kNN accuracy on a part of the validation pictures")
    by_flops.set_xscale("log")
    by_flops.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle("Frozen encoders by compute, tiny-imagenet-50 at 64 px", x=0.02, ha="left")
    figure.tight_layout()
    figure.savefig(out / "family.png", dpi=120)
    pyplot.close(figure)
