"""Figures of docs/choosing.md: what a start from weights is worth, at equal time of training.

    python benchmarks/starts.py DATA OUT [--minutes 5] [--teacher-steps 3000] [--json FILE]

DATA holds `tiny-imagenet-50`, `camvid` and `bccd`; OUT gets the runs, and is taken up where an
earlier start of the same command was stopped. A small MAE is trained on tiny-imagenet-50. Then, on
the pictures of CamVid and of BCCD at 64 pixels, without their labels, an encoder of the same shape
is trained for as many minutes in each of three ways: MAE from nothing, MAE that begins with those
weights, and distillation from them. All are scored frozen, beside the untrained encoder and the
weights themselves. The number of steps of each way comes from its own speed over a few steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from measuring import (
    DECODER,
    SHAPE,
    TESTS,
    mimray,
    scored,
    settings,
    speed_of,
    steps_in,
    value_text,
)

TEACHER = ("optim.batch_size=128", "optim.base_lr=2.0e-3", "optim.warmup_steps=200")
PICTURES = {"camvid": "train", "bccd": "JPEGImages"}


def ways(teacher: Path) -> dict[str, list[str]]:
    """The arguments of `mimray pretrain` by way."""
    return {
        "MAE from nothing": ["mae-tiny", *settings(*SHAPE, *DECODER)],
        "MAE, --init": ["mae-tiny", "--init", str(teacher), *settings(*SHAPE, *DECODER)],
        "distill": ["distill-tiny", *settings(*SHAPE, f"method.teacher={teacher}")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=5, help="of training, each way")
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    data, out = arguments.data.resolve(), arguments.out.resolve()
    teacher = out / "teacher"
    mimray(
        "pretrain", "mae-tiny", "--data", str(data / "tiny-imagenet-50"), "--storage", str(out),
        "--name", teacher.name, "--steps", str(arguments.teacher_steps),
        *settings(*SHAPE, *DECODER, *TEACHER),
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name, folder in PICTURES.items():
        encoders = {"untrained": f"untrained:{teacher}", "the weights": str(teacher)}
        pretrains = {
            way: ["pretrain", *recipe, "--data", str(data / name / folder)]
            for way, recipe in ways(teacher).items()
        }
        # One after the other, so that a machine that is slower for a while is so for all.
        steps = {
            way: steps_in(arguments.minutes, speed_of(pretrain, out / f"{name}-{number}-speed"))
            for number, (way, pretrain) in enumerate(pretrains.items())
        }
        for number, (way, pretrain) in enumerate(pretrains.items()):
            run = out / f"{name}-{number}"
            warm_up = settings(f"optim.warmup_steps={max(1, steps[way] // 10)}")
            mimray(
                *pretrain, "--storage", str(out), "--name", run.name, "--steps", str(steps[way]),
                *warm_up,
            )  # fmt: skip
            encoders[way] = str(run)
        for encoder, bundle in encoders.items():
            for test in (test for test in TESTS.values() if test.data == name):
                results = out / "scores" / name / encoder.replace(" ", "-") / test.task
                score = scored(test, data, bundle, results)
                rows.append({"pictures": name, "start": encoder, "what": test.title, **score})
                rows[-1]["steps"] = steps.get(encoder)
                print(json.dumps(rows[-1]), flush=True)
    print("\n| pictures | start | steps | score | value |\n|---|---|---|---|---|")
    for row in rows:
        value, steps_made = value_text(row), row["steps"] or ""
        print(f"| {row['pictures']} | {row['start']} | {steps_made} | {row['what']} | {value} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
