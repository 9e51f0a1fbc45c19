"""Overheads of a training by the number of workers, with a sleep in place of the computation.

    python benchmarks/scaling.py OUT [--workers 1,2,4] [--rounds 3] [--json FILE]

A small MAE is trained from Parquet as `mimray pretrain` does it, through Ray Train and DeepSpeed,
but that a worker sleeps a time for each picture in place of the forward and backward pass, so that
a few cores hold several workers. Order, decode processes, collectives, optimiser, rows of metrics,
heartbeats and checkpoints are those of any training. Weak scaling gives each worker as many
pictures, strong scaling divides as many among all. A round starts every case once. Figures are
medians over the updates of a start and means over its workers, then the median of the rounds with
the least and the most in brackets.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from measuring import DECODER, SHAPE

PARTS = ("order", "loader", "collectives", "reporting", "engine")
"""Parts of an update beside the sleep; the engine is what no other part is."""
PAUSES = ("checkpoint", "export")
COLLECTIVES = (
    "all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_object",
    "broadcast_object_list", "barrier",
)  # fmt: skip
SKIPPED = 5
"""Updates of a start that do not count: the first one connects, the next have batches ready."""
EVERY = 10
SETS = (
    *SHAPE, *DECODER, "data.num_workers=1", "resources.cpus_per_worker=1", "engine.precision=fp32",
    "optim.warmup_steps=1", "logging.every_steps=1", "logging.pictures_every_steps=0",
    f"checkpoint.every_steps={EVERY}",
)  # fmt: skip


class Case(NamedTuple):
    """A training of the benchmark.

    Attributes:
        num_workers: the number of workers.
        batch: pictures of an update, over all workers.
    """

    num_workers: int
    batch: int


# --- a worker ------------------------------------------------------------------------------------


class Clock:
    """Seconds of each update by part, of the clock and of the main thread's CPU.

    Time is that of the innermost part under way; all within a pause is the pause's.

    Attributes:
        updates: for each update seconds by part, what came before the first one aside.
    """

    def __init__(self) -> None:
        self.updates: list[dict[str, tuple[float, float]]] = []
        self._seconds: dict[str, tuple[float, float]] = {}
        self._within = ["engine"]
        self._since = time.perf_counter(), time.thread_time()

    def settle(self) -> None:
        """Give the time since the last call to the part under way."""
        now = time.perf_counter(), time.thread_time()
        wall, cpu = self._seconds.get(self._within[-1], (0.0, 0.0))
        wall, cpu = wall + now[0] - self._since[0], cpu + now[1] - self._since[1]
        self._seconds[self._within[-1]] = wall, cpu
        self._since = now

    def begin_update(self) -> None:
        """End an update, and begin another."""
        self.settle()
        self._seconds = {}
        self.updates.append(self._seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Do what belongs to a part."""
        self.settle()
        self._within.append(self._within[-1] if self._within[-1] in PAUSES else name)
        try:
            yield
        finally:
            self.settle()
            self._within.pop()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function as a part."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self.part(name):
                return function(*arguments, **named)

        return call


def asleep(clock: Clock, seconds_a_picture: float, build: Callable[..., Any]) -> Callable[..., Any]:
    """`build_method`, of methods of which a training step sleeps, and has gradients of all weights.

    Args:
        clock: gets the sleep as a part.
        seconds_a_picture: the sleep for each picture.
        build: the function as it is.
    """
    import torch

    from mimray.trainers.types import MethodOutput

    def built(recipe: Any) -> Any:
        method = build(recipe)
        real = method.forward

        def forward(images: torch.Tensor, mask: torch.Tensor) -> Any:
            if not method.training:
                return real(images, mask)
            with clock.part("compute"):
                time.sleep(seconds_a_picture * len(images))
            weights = [w for w in method.parameters() if w.requires_grad]
            loss = torch.stack([w.square().mean() for w in weights]).sum()
            return MethodOutput(loss, images, images, mask)

        method.forward = forward
        return method

    return built


def measured_work(seconds_a_picture: float) -> Callable[[dict[str, Any]], None]:
    """The function of each worker: the product's own, changed in the worker's process alone.

    It writes the updates of its `Clock` to `parts-RANK.json` in the run's directory.

    Args:
        seconds_a_picture: the sleep for each picture.
    """

    def work(config: dict[str, Any]) -> None:
        import ray.train
        import torch.distributed as dist

        from mimray.trainers import launch
        from mimray.trainers.data.order import SampleOrder
        from mimray.trainers.engine import loop
        from mimray.trainers.engine.metrics import MetricsLog
        from mimray.trainers.lifeline import WorkerLifeline
        from mimray.trainers.recorder import RunLink
        from mimray.trainers.storage import RunDir

        clock = Clock()
        step, pause, make_loader = WorkerLifeline.step, WorkerLifeline.pause, loop.make_loader

        def begun(lifeline: WorkerLifeline) -> Any:
            clock.begin_update()
            return step(lifeline)

        @contextmanager
        def paused(lifeline: WorkerLifeline, doing: str) -> Iterator[None]:
            name = "checkpoint" if doing == "checkpoint" else "export"
            with clock.part(name), pause(lifeline, doing):
                yield

        def loader(*arguments: Any, **named: Any) -> Iterator[Any]:
            batches = make_loader(*arguments, **named)
            while True:
                with clock.part("loader"):
                    batch = next(batches)
                yield batch

        changed: list[tuple[Any, str, Callable[..., Any]]] = [
            (loop, "build_method", asleep(clock, seconds_a_picture, loop.build_method)),
            (loop, "make_loader", loader),
            (WorkerLifeline, "step", begun),
            (WorkerLifeline, "pause", paused),
            (SampleOrder, "take", clock.around("order", SampleOrder.take)),
            (MetricsLog, "append", clock.around("reporting", MetricsLog.append)),
            (RunLink, "metrics", clock.around("reporting", RunLink.metrics)),
            *((dist, n, clock.around("collectives", getattr(dist, n))) for n in COLLECTIVES),
        ]
        with ExitStack() as stack:
            for owner, name, function in changed:
                stack.enter_context(mock.patch.object(owner, name, function))
            launch._work(config)
        clock.settle()
        rank = ray.train.get_context().get_world_rank()
        RunDir(config["run"]).write(f"parts-{rank}.json", json.dumps(clock.updates).encode())

    return work


# --- the driver ----------------------------------------------------------------------------------


class Start(NamedTuple):
    """Seconds of a start: medians over its updates, means over its workers.

    Attributes:
        update: an update without a checkpoint.
        parts: by part, the sleep among them as `compute`.
        cpu: the main thread's CPU by part.
        checkpoint: the time that a checkpoint takes from the training.
        recorder: CPU of the recorder in a second.
    """

    update: float
    parts: dict[str, float]
    cpu: dict[str, float]
    checkpoint: float
    recorder: float


def start(case: Case, out: Path, updates: int, seconds_a_picture: float) -> Start:
    """Train a case once, from nothing.

    Args:
        case: the case.
        out: the directory with the data, which gets the run.
        updates: the length of the run.
        seconds_a_picture: the sleep for each picture.
    """
    from mimray.trainers import launch
    from mimray.trainers.config.recipes import load_recipe

    sets = (
        *SETS, f"resources.num_workers={case.num_workers}", f"optim.batch_size={case.batch}",
        f"optim.steps={updates}",
    )  # fmt: skip
    name = f"workers-{case.num_workers}-batch-{case.batch}"
    recipe = load_recipe("mae-tiny", sets)
    job = launch.Job(recipe, str(out / "shards"), name, str(out / "runs"), fresh=True)
    recorder = RecorderCpu()
    with mock.patch.object(launch, "_work", measured_work(seconds_a_picture)):
        launch.pretrain(job, launch.prepare(job), recorder.look)
    ranks = [json.loads(job.run.read(f"parts-{rank}.json")) for rank in range(case.num_workers)]
    return summary(ranks, recorder.share)


class RecorderCpu:
    """The CPU that the recorder of a run takes while its workers train."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    def look(self, state: Any) -> None:
        """Look at the clock and at the recorder's; called with the run's state."""
        import psutil

        if state.started_at is None or not state.row:
            return
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "RunRecorder" in " ".join(process.cmdline()):
                    times = process.cpu_times()
                    self._seen.append((time.monotonic(), times.user + times.system))

    @property
    def share(self) -> float:
        """Its seconds of CPU in a second."""
        (began, before), (ended, after) = self._seen[0], self._seen[-1]
        return (after - before) / (ended - began)


def summary(ranks: list[list[dict[str, tuple[float, float]]]], recorder: float) -> Start:
    """Summarise a start.

    Args:
        ranks: for each worker, what its `Clock` counted.
        recorder: CPU of the recorder in a second.
    """
    counted = [updates[SKIPPED:-1] for updates in ranks]  # the last one ends the run
    plain = [[u for u in updates if "checkpoint" not in u] for updates in counted]
    saving = [u["checkpoint"][0] for updates in counted for u in updates if "checkpoint" in u]

    def seconds(part: str, which: int) -> float:
        return statistics.mean(
            statistics.median(u.get(part, (0.0, 0.0))[which] for u in updates) for updates in plain
        )

    whole = [statistics.median(sum(wall for wall, _ in u.values()) for u in us) for us in plain]
    return Start(
        update=statistics.mean(whole),
        parts={part: seconds(part, 0) for part in ("compute", *PARTS)},
        cpu={part: seconds(part, 1) for part in PARTS},
        checkpoint=statistics.median(saving),
        recorder=recorder,
    )


def efficiencies(cases: list[Case], found: dict[Case, Start]) -> list[float]:
    """The pictures a second of a worker in each case, over those in the first case of a round."""
    first = cases[0]
    a_worker = found[first].update / first.batch * first.num_workers
    return [a_worker * case.batch / found[case].update / case.num_workers for case in cases]


def spread(values: list[float], digits: int) -> str:
    """The median, with the least and the most in brackets."""
    texts = [f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values))]
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


def table(kind: str, cases: list[Case], rounds: list[dict[Case, Start]]) -> str:
    """The cases of one kind of scaling as Markdown, in milliseconds."""
    head = ("workers", "pictures of each", "sleep", "update", "efficiency", *PARTS, "a checkpoint",
            "recorder, % of a core")  # fmt: skip
    lines = [f"| {kind} scaling: {' | '.join(head)} |", "|" + "---|" * len(head)]
    by_round = [efficiencies(cases, found) for found in rounds]
    for number, case in enumerate(cases):
        starts = [found[case] for found in rounds]
        cells = [
            str(case.num_workers),
            str(case.batch // case.num_workers),
            f"{statistics.median(s.parts['compute'] for s in starts) * 1e3:.0f}",
            spread([s.update * 1e3 for s in starts], 0),
            spread([values[number] for values in by_round], 3),
            *(spread([s.parts[part] * 1e3 for s in starts], 1) for part in PARTS),
            spread([s.checkpoint * 1e3 for s in starts], 0),
            spread([s.recorder * 100 for s in starts], 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cpu_table(cases: list[Case], rounds: list[dict[Case, Start]]) -> str:
    """CPU of a worker's main thread as Markdown, in milliseconds an update."""
    lines = [f"| workers | {' | '.join(PARTS)} |", "|" + "---|" * (1 + len(PARTS))]
    for case in cases:
        starts = [found[case] for found in rounds]
        cells = [spread([s.cpu[part] * 1e3 for s in starts], 1) for part in PARTS]
        lines.append(f"| {case.num_workers} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ingest_photos(out: Path) -> None:
    """Write tiles of photographs as Parquet."""
    from mimray.trainers.data.ingest import ingest
    from mimray.trainers.data.sample_photos import write_photo_tiles

    pictures, _ = write_photo_tiles(out / "tiles", size_px=96)
    ingest(str(pictures), str(out / "shards"), shard_mib=1)


@contextmanager
def cluster(num_cpus: int) -> Iterator[None]:
    """A Ray of this process, with room for workers that are asleep most of the time."""
    from mimray.trainers.cluster import keep_token, set_environment

    set_environment()
    keep_token()
    import ray

    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", default="1,2,4", help="with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=32, help="of a start")
    parser.add_argument("--pictures", type=int, default=16, help="of a worker; strong: at the most")
    parser.add_argument("--ms", type=float, default=20.0, help="of sleep for a picture")
    parser.add_argument("--json", type=Path, help="write each start here")
    arguments = parser.parse_args()
    if arguments.updates < SKIPPED + EVERY + 1:
        parser.error(f"--updates {arguments.updates}: {SKIPPED + EVERY + 1} at least")
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    numbers = sorted(map(int, arguments.workers.split(",")))
    kinds = {
        "weak": [Case(n, n * arguments.pictures) for n in numbers],
        "strong": [Case(n, numbers[-1] * arguments.pictures) for n in numbers],
    }
    cases = list(dict.fromkeys(case for listed in kinds.values() for case in listed))
    rounds: list[dict[Case, Start]] = []
    with cluster(numbers[-1] + 1):
        ingest_photos(out)
        for number in range(arguments.rounds):
            rounds.append({})
            for case in cases:
                rounds[-1][case] = start(case, out, arguments.updates, arguments.ms / 1e3)
                update = rounds[-1][case].update
                print(f"round {number + 1}, {case}: {update * 1e3:.0f} ms an update", flush=True)
                if arguments.json:
                    kept = [{**c._asdict(), **s._asdict()} for r in rounds for c, s in r.items()]
                    arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\nmilliseconds an update; load of the machine {os.getloadavg()[1]:.1f}\n")
    for kind, listed in kinds.items():
        print(table(kind, listed, rounds), end="\n\n")
    print(f"CPU of a worker's main thread, weak scaling\n\n{cpu_table(kinds['weak'], rounds)}")


if __name__ == "__main__":
    main()
