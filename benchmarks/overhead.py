"""Claims: the training loop costs little beside a bare one, and two workers share two cores well.

    python benchmarks/overhead.py [PICTURES] [--rounds 3] [--updates 4] [--batch 16] [--json FILE]

`loop`: MAE's ViT-S/16 at 224 in fp32, trained by the loop of a run (DeepSpeed, pictures decoded by
a process of its own from the folder PICTURES, or from small ones; metrics at every update) and by a
bare loop of torch on tensors that are there already, with the same method and optimiser. Both take
turns in one process; seconds an update, and seconds of what a round ends with: a checkpoint, its
pictures, and whole weights for a bundle.

`workers`: the same loop in one process with one thread, and in two, by ZeRO 1 over gloo, each with
one thread and as many pictures as the one had. Images a second of two over twice those of one.
Ratios are medians of pairs, with the least and the most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import sample_pictures

HERE = Path(__file__).resolve().parent


class Rows:
    """An observer that keeps the rows of metrics."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def resumed(self, step: int) -> None:
        """Begin."""

    def metrics(self, row: dict[str, Any]) -> None:
        """Keep a row."""
        self.rows.append(row)

    def pictures(self, step: int, panels: list[Any]) -> None:
        """Take pictures."""


def begin(rank: int, world_size: int, out: Path) -> None:
    """Join the process group, with DeepSpeed ready."""
    import torch
    import torch.distributed as dist

    from mimray.trainers.engine.deepspeed import prepare_process

    os.environ["LOCAL_RANK"] = str(rank)
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=world_size
    )


def planned(pictures: Path, batch: int, steps: int, workers: int, decoders: int) -> tuple[Any, Any]:
    """The source of the pictures, and the plan of a run on it."""
    from mimray.trainers.config.recipes import load_recipe
    from mimray.trainers.config.run import resolve
    from mimray.trainers.data.selection import open_training

    recipe = load_recipe(
        "mae-vit-s",
        [
            f"optim.batch_size={batch * workers}", f"data.num_workers={decoders}",
            "optim.warmup_epochs=null", "optim.warmup_steps=1", "engine.precision=fp32",
            "logging.every_steps=1", "checkpoint.every_steps=1000000",
            f"engine.zero_stage={int(workers > 1)}", "logging.pictures_every_steps=1000000",
        ],
        steps=steps,
    )  # fmt: skip
    source = open_training(str(pictures), recipe)
    return source, resolve(recipe, source.facts, workers)


def loop(
    pictures: Path, out: Path, rounds: int, updates: int, batch: int
) -> dict[str, list[float]]:
    """Seconds an update, of the loop and of a bare one, and of a checkpoint, by round."""
    import torch

    from mimray.trainers.engine.loop import stages
    from mimray.trainers.methods.catalogue import build_method
    from mimray.trainers.storage import RunDir

    begin(0, 1, out)
    source, plan = planned(pictures, batch, (rounds + 2) * updates, 1, 1)
    run = RunDir(str(out / "run"))
    run.create()
    method = build_method(plan.recipe)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, *plan.recipe.data.image_size)

    def bare() -> None:
        optimizer.zero_grad()
        method(images).loss.backward()
        optimizer.step()

    found: dict[str, list[float]] = {"loop": [], "bare": [], "checkpoint": []}
    observer = Rows()
    trained = stages(
        plan, run, source, device=torch.device("cpu"), observer=observer,
        pauses=range(updates, plan.steps, updates),
    )  # fmt: skip
    for number in range(rounds + 1):  # the first round warms up
        at_pause = next(trained)
        seconds = []
        for _ in range(updates):
            began = time.perf_counter()
            bare()
            seconds.append(time.perf_counter() - began)
        if number:
            rates = [row["images_per_s"] for row in observer.rows[-updates:]]
            an_update = batch / statistics.median(rates)
            found["loop"].append(an_update)
            found["checkpoint"].append(at_pause.seconds - updates * an_update)
            found["bare"].append(statistics.median(seconds))
    trained.close()  # type: ignore[attr-defined]
    return found


def work(pictures: Path, out: Path, rank: int, workers: int, updates: int, batch: int) -> None:
    """Be one of the workers, and on rank 0 print its images a second."""
    import torch

    from mimray.trainers.engine.loop import train
    from mimray.trainers.storage import RunDir

    torch.set_num_threads(1)
    begin(rank, workers, out)
    source, plan = planned(pictures, batch, updates, workers, 0)
    run = RunDir(str(out / "run"))
    run.create()
    train(plan, run, source, device=torch.device("cpu"), observer=Rows())
    if rank == 0:
        rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
        print(statistics.median(row["images_per_s"] for row in rows[1:]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


def images_per_s(pictures: Path, workers: int, updates: int, batch: int) -> float:
    """Images a second of a run of one or two workers with one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [
                    sys.executable, __file__, "--worker", str(pictures), folder, str(rank),
                    str(workers), str(updates), str(batch),
                ],
                stdout=subprocess.PIPE, text=True, cwd=HERE.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            )
            for rank in range(workers)
        ]  # fmt: skip
        printed, *_ = [process.communicate(timeout=1800)[0] for process in processes]
    return float(printed.splitlines()[-1])


def spread(over: list[float], under: list[float]) -> str:
    each = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(each):.3f} ({min(each):.3f} to {max(each):.3f})"


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        pictures, out, *numbers = sys.argv[2:]
        work(Path(pictures), Path(out), *(int(number) for number in numbers))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=4, help="of each round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    rounds, updates = arguments.rounds, arguments.updates
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pictures = (arguments.pictures or sample_pictures(scratch)).resolve()
        alone, together = [], []
        for _ in range(rounds):
            alone.append(images_per_s(pictures, 1, updates, arguments.batch))
            together.append(images_per_s(pictures, 2, updates, arguments.batch))
        doubled = [2 * rate for rate in alone]
        print(
            f"one worker {statistics.median(alone):.2f} images/s, two "
            f"{statistics.median(together):.2f}: {spread(together, doubled)} of twice the one"
        )
        seconds = loop(pictures, scratch, rounds, updates, arguments.batch)
        print(
            f"an update: bare {statistics.median(seconds['bare']):.2f} s, the loop "
            f"{statistics.median(seconds['loop']):.2f} s: "
            f"{spread(seconds['loop'], seconds['bare'])} of the bare one; a checkpoint "
            f"{statistics.median(seconds['checkpoint']):.1f} s"
        )
        if arguments.json:
            found = {**seconds, "one": alone, "two": together}
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        sys.stdout.flush()
        os._exit(0)  # as for a worker


if __name__ == "__main__":
    main()
