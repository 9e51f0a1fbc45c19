"""Claim: `data.stream: ray` costs a training process less by actors than by a Ray Data pipeline.

    python benchmarks/stream.py DATA [--batches 300] [--batch 64] [--size 64] [--workers 2]

The same micro batches of MAE's recipe, in order, by decode processes (`local`), by the actors of
`data.stream: ray`, and by Ray Data with preserved order: a block a micro batch, decoded in a pool
of as many actors, handed over pickled. Prints, for each, CPU milliseconds of this process a micro
batch after the first, which depend little on other load; seconds to the first batch; and batches a
second after it. All three must have the same pictures.
"""

from __future__ import annotations

import argparse
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mimray.trainers.cluster import connected
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, resolve
from mimray.trainers.data.loader import MicroBatches, Samples, make_loader, training_order
from mimray.trainers.data.selection import open_training
from mimray.trainers.data.sources import Source
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.types import Batch


def by_loader(source: Source, plan: Plan) -> Iterator[Batch]:
    return make_loader(source, plan, inputs_of(plan.recipe))


class Decoder:
    """A pool's actor of Ray Data."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __call__(self, table: pa.Table) -> pa.Table:
        """Make the micro batches of a block."""
        made = [
            pickle.dumps(self.samples.__getitems__(pickle.loads(micro)), protocol=5)
            for micro in table["micro"].to_pylist()
        ]
        return pa.table({"batch": pa.array(made, pa.large_binary())})


def by_ray_data(source: Source, plan: Plan) -> Iterator[Batch]:
    import ray.data

    micros = MicroBatches(plan, training_order(source, plan.recipe), 0, 0)
    blocks = [pa.table({"micro": [pickle.dumps(micro)]}) for micro in micros]
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_arrow(blocks).map_batches(
            Decoder,
            fn_constructor_args=(Samples(source, plan.recipe, inputs_of(plan.recipe)),),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=plan.recipe.data.num_workers),
            num_cpus=1,
        )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield pickle.loads(table["batch"][0].as_py())


def measure(make: Callable[[], Iterator[Batch]]) -> tuple[float, float, float, list[int]]:
    """CPU milliseconds of this process a batch, seconds to the first, rate, sums of pixels."""
    began, sums = time.perf_counter(), []
    for number, batch in enumerate(make()):
        if number == 0:
            first_s, cpu_s = time.perf_counter() - began, time.process_time()
        else:
            before = time.process_time()
        sums.append(int(batch.inputs["images"].sum()))
        if number:
            cpu_s += time.process_time() - before  # the check is no cost of the stream
    later, cpu_s = len(sums) - 1, time.process_time() - cpu_s
    rate = later / (time.perf_counter() - began - first_s)
    return 1e3 * cpu_s / later, first_s, rate, sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--batches", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    common = [
        f"data.image_size={arguments.size}", f"data.num_workers={arguments.workers}",
        f"optim.batch_size={arguments.batch}", "optim.warmup_epochs=null", "optim.warmup_steps=1",
    ]  # fmt: skip

    def planned(stream: str) -> tuple[Source, Plan]:
        recipe = load_recipe(
            "mae-tiny", [*common, f"data.stream={stream}"], steps=arguments.batches
        )
        source = open_training(str(arguments.data), recipe)
        return source, resolve(recipe, source.facts, 1)

    ways: dict[str, Callable[[], Iterator[Any]]] = {
        "local": lambda: by_loader(*planned("local")),
        "actors": lambda: by_loader(*planned("ray")),
        "Ray Data": lambda: by_ray_data(*planned("ray")),
    }
    print(f"{os.cpu_count()} CPUs; {arguments.batches} batches of {arguments.batch} pictures of "
          f"{arguments.size} pixels, {arguments.workers} processes")  # fmt: skip
    wanted: list[int] | None = None
    with connected("local"):
        for name, make in ways.items():
            cpu_ms, first_s, rate, sums = measure(make)
            assert wanted is None or sums == wanted, f"{name}: other pictures"
            wanted = sums
            print(
                f"{name:9} {cpu_ms:6.2f} ms of CPU a batch, the first after {first_s:5.1f} s, "
                f"then {rate:5.1f} batches/s"
            )


if __name__ == "__main__":
    main()
