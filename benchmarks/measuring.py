"""Commands, the speed of a recipe and scores, for benchmarks of pre-training."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
CALIBRATION_STEPS = 30

# The encoder of all of them: 2.7 M parameters, 64 tokens of 8 x 8 pixels.
SHAPE = ("encoder.width=192", "encoder.depth=6", "encoder.num_heads=3")
DECODER = ("method.decoder_width=96", "method.decoder_depth=2")


class CommandFailedError(Exception):
    """A command of mimray ended with an error, which it has printed."""


def sample_pictures(folder: Path) -> Path:
    """Write the photographs that every installation has as JPEGs, several times, for a trial.

    Args:
        folder: gets `pictures`, a flat folder.

    Returns:
        That folder.
    """
    from mimray.trainers.data.sample_photos import PHOTOGRAPHS, photograph

    flat = folder / "pictures"
    flat.mkdir()
    for name in PHOTOGRAPHS:
        picture = photograph(name)
        for copy in range(8):  # no two files alike, or `ingest` would keep one
            picture.save(flat / f"{name}-{copy}.jpg", quality=85 + copy)
    return flat


class Speed(NamedTuple):
    """The speed of a recipe.

    Attributes:
        images_per_s: pictures trained on in a second.
        batch: pictures of one update.
    """

    images_per_s: float
    batch: int


class Test(NamedTuple):
    """A score of an encoder.

    Attributes:
        title: the score's name in tables.
        data: the folder of the labelled pictures.
        task: the task of `mimray evaluate`.
        options: the task's options.
        epochs: the length of what is trained; None where nothing is.
        flags: further arguments.
        figure: the figure of the result that counts, if not its headline.
        limit: the most pictures of each part, for the sake of time; None for all.
    """

    title: str
    data: str
    task: str
    options: tuple[str, ...] = ()
    epochs: int | None = None
    flags: tuple[str, ...] = ()
    figure: str = ""
    limit: int | None = None

    def value(self, result: dict[str, Any]) -> dict[str, Any]:
        """The figure, with the standard error that a headline has, and the number of pictures.

        A figure that is not the headline has none; `beside` is then the headline, with its own.
        """
        found = {
            key: result.get(key) for key in ("metric", "headline", "standard_error", "num_val")
        }
        if self.figure:
            value, beside = result["metrics"][self.figure], value_text(found)
            found |= {"metric": self.figure, "headline": value, "standard_error": None}
            found["beside"] = f"{result['metric']} {beside}"
        return found


# A quarter of CamVid's pixels, a ninth of BCCD's: a score in one or two minutes on two cores.
_CAMVID = ("ignore_index=11", "image_size=[184,240]")
_BCCD = ("image_size=[160,208]", "num_proposals=64", "pyramid_width=64")
TESTS = {
    "knn": Test("kNN", "tiny-imagenet-50", "knn"),
    "linear": Test("linear", "tiny-imagenet-50", "linear"),
    "finetune": Test("fine-tuned", "tiny-imagenet-50", "finetune", epochs=5, limit=5000),
    "camvid-knn": Test("CamVid dense kNN, mIoU", "camvid", "dense-knn", _CAMVID),
    "camvid-linear": Test("CamVid linear, mIoU", "camvid", "segmentation", _CAMVID, 6),
    "bccd": Test(
        "BCCD Faster R-CNN, AP50", "bccd", "detection", _BCCD, 8, ("--skip-invalid",), "AP50"
    ),
}
"""Scores by name; of the dense ones the encoder is frozen."""


def mimray(*arguments: str) -> dict[str, Any]:
    """Run a command with `--json`; returns what it prints.

    Raises:
        CommandFailedError: it ended with another status than 0.
    """
    command = [sys.executable, "-m", "service", *arguments, "--json"]
    print("$ mimray", *arguments, flush=True)
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise CommandFailedError(f"exit {done.returncode}: mimray {' '.join(arguments)}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def settings(*assignments: str) -> list[str]:
    """The arguments that make assignments to keys."""
    return [word for assignment in assignments for word in ("--set", assignment)]


def speed_of(training: list[str], run: Path, *, anew: bool = False) -> Speed:
    """The speed of a training, over a few steps that it is run for.

    Args:
        training: the command, without name, storage and length.
        run: the directory of the short run.
        anew: measure again where it was measured before.
    """
    mimray(
        *training, "--storage", str(run.parent), "--name", run.name,
        "--steps", str(CALIBRATION_STEPS), *(["--fresh"] if anew else []),
        *settings("logging.every_steps=5", "optim.warmup_steps=1"),
    )  # fmt: skip
    found = rows(run)
    median = statistics.median(row["images_per_s"] for row in found[2:])
    return Speed(median, found[0]["samples"] // found[0]["step"])


def steps_in(minutes: float, speed: Speed) -> int:
    """The updates of some minutes; a few at least."""
    return max(CALIBRATION_STEPS, round(60 * minutes * speed.images_per_s / speed.batch))


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def scored(
    test: Test,
    data: Path,
    bundle: str,
    out: Path,
    options: tuple[str, ...] = (),
    *,
    epochs: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The headline of an encoder, with its standard error.

    Args:
        test: the score.
        data: the folder of all data sets.
        bundle: the encoder.
        out: the directory of the results.
        options: options of the task beside the test's own.
        epochs: the length of what is trained, if not the test's.
        limit: the most pictures of each part, if not the test's.
    """
    length = test.epochs and (epochs or test.epochs)
    limit = limit or test.limit
    found = mimray(
        "evaluate", bundle, "--task", test.task, "--data", str(data / test.data), "--out", str(out),
        *(["--epochs", str(length)] if length else []),
        *(["--limit", str(limit)] if limit else []),
        *test.flags, *settings(*test.options, *options),
    )  # fmt: skip
    return test.value(found)


def value_text(score: dict[str, Any] | None) -> str:
    """A score with its standard error; a dash for none."""
    if score is None:
        return "-"
    error, beside = score["standard_error"], score.get("beside")
    text = f"{score['headline']:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return text if beside is None else f"{text} ({beside})"
