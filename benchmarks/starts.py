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
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHAPE = ("encoder.width=192", "encoder.depth=6", "encoder.num_heads=3")
MAE = ("method.decoder_width=96", "method.decoder_depth=2")
TEACHER = ("optim.batch_size=128", "optim.base_lr=2.0e-3", "optim.warmup_steps=200")
CALIBRATION_STEPS = 30
PICTURES = {"camvid": "train", "bccd": "JPEGImages"}
SCORES = {
    "camvid": {
        "dense kNN": ("dense-knn", "ignore_index=11", "image_size=[184,240]"),
        "linear": ("segmentation", "ignore_index=11", "image_size=[184,240]"),
    },
    "bccd": {
        "Faster R-CNN": (
            "detection",
            "image_size=[160,208]",
            "num_proposals=64",
            "pyramid_width=64",
        ),
    },
}
EPOCHS = {"segmentation": 6, "detection": 8}


def mimray(*arguments: str) -> dict[str, Any]:
    """Run a command with `--json`; returns what it prints."""
    command = [sys.executable, "-m", "service", *arguments, "--json"]
    print("$ mimray", *arguments, flush=True)
    done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"exit {done.returncode}")
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def settings(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def ways(teacher: Path) -> dict[str, list[str]]:
    """The arguments of `mimray pretrain` by way."""
    return {
        "MAE from nothing": ["mae-tiny", *settings(*SHAPE, *MAE)],
        "MAE, --init": ["mae-tiny", "--init", str(teacher), *settings(*SHAPE, *MAE)],
        "distill": ["distill-tiny", *settings(*SHAPE, f"method.teacher={teacher}")],
    }


def steps_in(minutes: float, pretrain: list[str], run: Path) -> int:
    """The steps that a way makes in some minutes, at its speed over a few steps."""
    name, storage = run.name, str(run.parent)
    mimray(
        *pretrain, "--storage", storage, "--name", name, "--steps", str(CALIBRATION_STEPS),
        *settings("logging.every_steps=5", "optim.warmup_steps=1"),
    )  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(row["images_per_s"] for row in rows[2:])
    batch = rows[0]["samples"] // rows[0]["step"]
    return max(CALIBRATION_STEPS, round(60 * minutes * speed / batch))


def scored(task: str, options: tuple[str, ...], data: Path, bundle: str, out: Path) -> Any:
    """The headline of an encoder with its standard error, and AP50 where there is one."""
    epochs = ["--epochs", str(EPOCHS[task])] if task in EPOCHS else []
    strict = ["--skip-invalid"] if task == "detection" else []
    found = mimray(
        "evaluate", bundle, "--task", task, "--data", str(data), "--out", str(out),
        *epochs, *strict, *settings(*options),
    )  # fmt: skip
    score = {key: found[key] for key in ("metric", "headline", "standard_error", "num_val")}
    return {**score, "AP50": found["metrics"].get("AP50")}


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
        *settings(*SHAPE, *MAE, *TEACHER),
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
            way: steps_in(arguments.minutes, pretrain, out / f"{name}-{number}-speed")
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
            for metric, (task, *options) in SCORES[name].items():
                results = out / "scores" / name / encoder.replace(" ", "-") / task
                score = scored(task, tuple(options), data / name, bundle, results)
                rows.append({"pictures": name, "start": encoder, "what": metric, **score})
                rows[-1]["steps"] = steps.get(encoder)
                print(json.dumps(rows[-1]), flush=True)
    print("\n| pictures | start | steps | score | value |\n|---|---|---|---|---|")
    for row in rows:
        error = row["standard_error"]
        value = f"{row['metric']} {row['headline']:.4f} ± {error:.4f}"
        if row["AP50"] is not None:
            value += f", AP50 {row['AP50']:.4f}"
        steps_made = row["steps"] or ""
        print(f"| {row['pictures']} | {row['start']} | {steps_made} | {row['what']} | {value} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
