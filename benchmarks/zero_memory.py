"""Memory and traffic of a worker at each ZeRO stage, beside the forecast of `mimray plan`.

    python benchmarks/zero_memory.py OUT [--stages 0,1,2,3] [--accumulation 1] [--json FILE]

Two processes on the CPU run the training loop itself, with its data and checkpoints, on a MAE whose
weights outweigh its activations, in fp32. Memory is the peak of the resident set beyond what the
process had before, after a small training of the same stage, since libraries keep what they need
once. Traffic is what an update hands to collectives, in bytes of all weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from faults import draw

HERE = Path(__file__).resolve().parent
WORKERS, UPDATES, MICRO_BATCH = 2, 4, 2
SETS = (
    "encoder.num_heads=4", "data.image_size=32", "data.num_workers=0", "engine.precision=fp32",
    f"engine.micro_batch_size={MICRO_BATCH}", f"optim.steps={UPDATES}", "optim.warmup_steps=1",
    "logging.every_steps=1", f"checkpoint.every_steps={UPDATES}",
)  # fmt: skip
SMALL = ("encoder.width=64", "encoder.depth=2", f"optim.batch_size={WORKERS * MICRO_BATCH}")
COLLECTIVES = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor",
    "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip
# Freed memory goes back at once, so that the resident peak is that of what is held.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1",
}  # fmt: skip


class Row(NamedTuple):
    """Memory of a worker at a ZeRO stage, MiB, and its traffic.

    Attributes:
        zero_stage: the ZeRO stage.
        weights: all weights in fp32.
        forecast: the peak of an update by `mimray plan`.
        update: the peak of an update as measured.
        start: the peak before the first update, in which the engine is made.
        checkpoint: the peak while a checkpoint is written.
        export: the peak while whole weights are put together for the bundle.
        traffic: bytes handed to each collective in an update, over those of the weights; in the
            first one, which is left out, stage 3 learns what to gather.
    """

    zero_stage: int
    weights: float
    forecast: float
    update: float
    start: float
    checkpoint: float
    export: float
    traffic: dict[str, float]


# --- a worker, a process of its own --------------------------------------------------------------


def resident_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024


class Phases:
    """The phases of a training, with the peak of memory and the traffic of each.

    It is the loop's lifeline, which is told of every update and of every pause.

    Attributes:
        peaks_mib: the peak of the resident set by phase.
        traffic: bytes handed to collectives by phase and collective.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, with the start of a training."""
        self.peaks_mib: dict[str, float] = {}
        self.traffic: dict[str, Counter[str]] = defaultdict(Counter)
        self._updates = 0
        self._phase = "start"
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak

    def begin(self, phase: str) -> None:
        """End a phase, and begin another one."""
        known = self.peaks_mib.get(self._phase, 0.0)
        self.peaks_mib[self._phase] = max(known, resident_mib("VmHWM"))
        self._phase = phase
        Path("/proc/self/clear_refs").write_text("5")

    def step(self) -> Any:
        """Begin an update; nothing is asked for."""
        from mimray.trainers.types import Notice

        self._updates += 1
        self.begin("update" if self._updates > 1 else "first update")
        return Notice.NONE

    @contextmanager
    def pause(self, work: str) -> Iterator[None]:
        """Do work between two updates."""
        self.begin(work)
        yield
        self.begin("export")  # the end of a training, but where an update follows

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is handed to torch's collectives meanwhile."""
        import torch
        import torch.distributed as dist

        def counted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                given = [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
                # Of an input and an output one is whole, the other a share.
                self.traffic[self._phase][name] += max(tensor.nbytes for tensor in given)
                return collective(*arguments, **named)

            return call

        with ExitStack() as stack:
            for name in COLLECTIVES:
                changed = counted(name, getattr(dist, name))
                stack.enter_context(mock.patch.object(dist, name, changed))
            yield


class Silent:
    """An observer that keeps nothing."""

    def resumed(self, step: int) -> None:
        """Begin."""

    def metrics(self, row: dict[str, Any]) -> None:
        """Take a row."""

    def pictures(self, step: int, panels: list[Any]) -> None:
        """Take pictures."""


def train_for(phases: Phases, out: Path, overrides: tuple[str, ...]) -> tuple[float, float]:
    """Train for some updates.

    Returns:
        The forecast of an update's peak, and the size of all weights, MiB.
    """
    import torch
    import torch.distributed as dist

    from mimray.trainers.config.recipes import load_recipe
    from mimray.trainers.config.run import resolve
    from mimray.trainers.cost import estimate
    from mimray.trainers.data.selection import open_training
    from mimray.trainers.engine.loop import train
    from mimray.trainers.storage import RunDir

    recipe = load_recipe("mae-tiny", [*SETS, *overrides])
    source = open_training(str(out / "pictures"), recipe)
    plan = resolve(recipe, source.facts, WORKERS)
    cost = estimate(plan, "fp32", on_gpu=False)
    run = RunDir(str(out / "run"))
    if dist.get_rank() == 0:
        run.delete()
        run.create()
    dist.barrier()
    phases.forget()
    train(plan, run, source, device=torch.device("cpu"), observer=Silent(), lifeline=phases)
    phases.begin("end")
    forecast = cost.memory[recipe.engine.zero_stage, False].peak
    return forecast / 2**20, sum(cost.parameters.values()) * 4 / 2**20


def work(out: Path, rank: int, stage: int, shape: tuple[str, ...]) -> None:
    """Be one of the workers, and on rank 0 print the row."""
    import torch
    import torch.distributed as dist

    from mimray.trainers.engine.deepspeed import prepare_process

    os.environ["LOCAL_RANK"] = str(rank)
    prepare_process(torch.device("cpu"))
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/meeting", rank=rank, world_size=WORKERS
    )
    chosen = f"engine.zero_stage={stage}"
    phases = Phases()
    with phases.counting():  # from the first on, since DeepSpeed keeps hold of them
        train_for(phases, out, (chosen, *SMALL))
        gc.collect()
        before = resident_mib("VmRSS")
        forecast, weights = train_for(phases, out, (chosen, *shape))
    if rank == 0:
        peaks = {phase: peak - before for phase, peak in phases.peaks_mib.items()}
        bytes_each = (UPDATES - 1) * weights * 2**20
        traffic = {name: n / bytes_each for name, n in phases.traffic["update"].items()}
        row = Row(
            stage, weights, forecast, max(peaks["first update"], peaks["update"]), peaks["start"],
            peaks["checkpoint"], peaks["export"], traffic,
        )  # fmt: skip
        print(json.dumps(row._asdict()))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


# --- the driver ----------------------------------------------------------------------------------


def measured(out: Path, stage: int, shape: tuple[str, ...]) -> Row:
    """The row of a ZeRO stage, from two processes."""
    (out / "meeting").unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(out), str(rank), str(stage), *shape],
            stdout=subprocess.PIPE, text=True, cwd=HERE.parent,
            env={**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )
        for rank in range(WORKERS)
    ]  # fmt: skip
    try:
        printed, *_ = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise SystemExit(f"a worker of ZeRO {stage} ended with an error")
    return Row(**json.loads(printed.splitlines()[-1]))


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    head = ("ZeRO", "forecast of an update, MiB", "measured", "measured / forecast", "start",
            "checkpoint", "export", "handed to collectives, over the weights")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in rows:
        traffic = ", ".join(f"{name} {n:.2f}" for name, n in row.traffic.items() if n > 0.005)
        memory = [f"{mib:,.0f}" for mib in (row.forecast, row.update)]
        others = [f"{mib:,.0f}" for mib in (row.start, row.checkpoint, row.export)]
        cells = [str(row.zero_stage), *memory, f"{row.update / row.forecast:.2f}", *others, traffic]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        out, rank, stage, *shape = sys.argv[2:]
        work(Path(out), int(rank), int(stage), tuple(shape))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--stages", default="0,1,2,3", help="with commas between them")
    parser.add_argument("--width", type=int, default=768, help="of the encoder")
    parser.add_argument("--depth", type=int, default=8, help="blocks of the encoder")
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches of an update")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    draw(out / "pictures")
    shape = (
        f"encoder.width={arguments.width}", f"encoder.depth={arguments.depth}",
        f"optim.batch_size={WORKERS * MICRO_BATCH * arguments.accumulation}",
    )  # fmt: skip
    rows: list[Row] = []
    for stage in arguments.stages.split(","):
        rows.append(measured(out, int(stage), shape))
        print(rows[-1], flush=True)
    print(f"\n{rows[0].weights / 4 * 2**20 / 1e6:.1f} M parameters, {rows[0].weights:,.0f} MiB\n")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
