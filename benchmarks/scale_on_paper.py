"""Figures of docs/scale.md: data, decoding, network and storage of MAE on 8, 64 and 512 GPUs.

    python benchmarks/scale_on_paper.py [--gpus 8,64,512] [--batch 4096] [--json FILE]

Nothing is trained. Rates of GPUs and cores are the inputs below, measured elsewhere; reads of the
dataset are counted by running the real order of samples over the row groups of ImageNet-1k.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mimray.trainers.data.cache import MEMORY_BYTES
from mimray.trainers.data.order import SampleOrder
from mimray.trainers.data.parts import cut_groups

PICTURES = 1_281_167
PICTURE_BYTES = 25_000
"""A JPEG after `mimray data ingest` to a short side of 256 pixels."""
GROUP_ROWS = 168
"""Such pictures in a row group of 4 MiB."""
DECODES_PER_S = 450
"""Of those by a core: decoded, cropped to 224 and masked."""
GROUP_READ_S = 2.5e-3
"""A core's time for a row group that is in the page cache."""
SIZES = (8, 64, 256, 512)
"""Micro batches for which reads are counted."""
PROCESSES_PER_GPU, MICRO_BATCH, SHUFFLE_WINDOW = 10, 64, 8192
"""As the recipes have them."""
GPUS_PER_NODE = 8
NVLINK = 360e9
NETWORKS = {"8 x 400 Gb/s": 320e9, "100 Gb/s": 10e9}
"""Bytes a second of rings through all GPUs, by the network of a node: 80 % of its nominal rate."""
GPU_HOURS_PER_FAILURE = 50_000
"""Llama 3 405B (2024), sec. 3.3.4: 419 unexpected interruptions of 16,384 GPUs in 54 days."""
WRITE_BYTES_PER_S = 0.5e9
"""Of a rank: files to a local disk, and their checksums."""


class Model(NamedTuple):
    """A network to be trained.

    Attributes:
        name: its name.
        trained: elements that the optimiser updates.
        images_per_s: pictures a second of an H200 at micro batches of 256 and more, on tensors.
    """

    name: str
    trained: int
    images_per_s: float


MODELS = (Model("ViT-B", 111_655_680, 4057), Model("ViT-L", 329_239_296, 2181))


@functools.cache
def reads(num_processes: int, micro_batch: int) -> float:
    """Times that a row group is read in an epoch, by all decode processes of a training together.

    Args:
        num_processes: decode processes of all workers; micro batches go round among them.
        micro_batch: pictures of a micro batch.
    """
    rows = np.full(PICTURES // GROUP_ROWS, GROUP_ROWS)
    sizes = rows * PICTURE_BYTES
    order = SampleOrder(rows, 0, SHUFFLE_WINDOW, cut_groups(rows, sizes, spread=False).open_parts)
    room = MEMORY_BYTES // int(sizes[0])
    kept: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_processes)]
    num_reads = 0
    count = len(rows) * GROUP_ROWS // micro_batch
    for number in range(count):
        cache = kept[number % num_processes]
        _, indices = order.take(number * micro_batch, micro_batch)
        for group in np.unique(indices // GROUP_ROWS).tolist():
            num_reads += group not in cache
            cache[group] = None
            cache.move_to_end(group)
            while len(cache) > room:
                cache.popitem(last=False)
    return num_reads / len(rows)


def sent(zero_stage: int, accumulation: int) -> float:
    """Bytes that one of many GPUs sends in an update, over those of all gradients in fp32.

    A ring's all-reduce sends them twice, a reduce-scatter and an all-gather once each; which of
    them DeepSpeed makes is counted by `zero_memory.py`. Stages 0 and 1 reduce gradients once an
    update, stages 2 and 3 with every micro batch.

    Args:
        zero_stage: the ZeRO stage.
        accumulation: micro batches of an update.
    """
    by_stage = (2, 2 + 1, 2 * accumulation + 1, (1 + 1) * accumulation)
    return float(by_stage[zero_stage])


def data(model: Model, gpus: int, batch: int) -> dict[str, Any]:
    """Pictures and the cores that make them; the times are those of computation alone."""
    images_per_s = model.images_per_s * gpus
    micro_batch = min(MICRO_BATCH, batch // gpus)
    again = reads(gpus * PROCESSES_PER_GPU, micro_batch)
    reading = model.images_per_s * again / GROUP_ROWS * GROUP_READ_S
    return {
        "model": model.name,
        "GPUs": gpus,
        "pictures/s": f"{images_per_s:,.0f}",
        "ImageNet-1k, 1600 epochs": f"{1600 * PICTURES / images_per_s / 3600:,.1f} h",
        "read once, GB/s": f"{images_per_s * PICTURE_BYTES / 1e9:.1f}",
        "micro batch": micro_batch,
        "reads of a row group": f"{again:.0f}",
        "cores a GPU to decode": f"{model.images_per_s / DECODES_PER_S:.1f}",
        "to read": f"{reading:.1f}",
    }


def network(model: Model, gpus: int, batch: int) -> dict[str, Any]:
    """Milliseconds of an update: computation, and communication that is not behind it."""
    own = batch // gpus
    accumulation = max(1, own // MICRO_BATCH)
    rates = [NVLINK] if gpus <= GPUS_PER_NODE else list(NETWORKS.values())
    row: dict[str, Any] = {
        "model": model.name,
        "GPUs": gpus,
        "pictures of a GPU": own,
        "computation, ms": f"{own / model.images_per_s * 1e3:,.0f}",
    }
    for stage in range(4):
        num_bytes = (gpus - 1) / gpus * 4 * model.trained * sent(stage, accumulation)
        times = " or ".join(f"{num_bytes / rate * 1e3:,.0f}" for rate in rates)
        row[f"ZeRO {stage}"] = f"{num_bytes / 1e9:.1f} GB, {times} ms"
    return row


def checkpoint(model: Model, gpus: int, batch: int) -> dict[str, Any]:
    """Size, time and interval of checkpoints at ZeRO 1.

    Source: Young 1974, "A first order approximation to the optimum checkpoint interval".
    """
    weights, states = 4 * model.trained, 12 * model.trained
    largest = weights + states / gpus  # rank 0 writes the weights
    writing_s = largest / WRITE_BYTES_PER_S
    between_s = 3600 * GPU_HOURS_PER_FAILURE / gpus
    interval_s = math.sqrt(2 * writing_s * between_s)
    lost = writing_s / interval_s + interval_s / 2 / between_s
    return {
        "model": model.name,
        "GPUs": gpus,
        "all files, GB": f"{(weights + states) / 1e9:.1f}",
        "rank 0's, GB": f"{largest / 1e9:.2f}",
        "written in": f"{writing_s:.1f} s",
        "a failure every": f"{between_s / 3600:,.0f} h",
        "best interval": f"{interval_s / 60:,.0f} min",
        "time lost": f"{100 * lost:.2f} %",
        "1000 updates": f"{1000 * batch / gpus / model.images_per_s / 60:,.1f} min",
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of equal keys as Markdown."""
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row.values()))} |" for row in rows)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", default="8,64,512", help="with commas between them")
    parser.add_argument("--batch", type=int, default=4096, help="global batch")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    numbers = [int(number) for number in arguments.gpus.split(",")]
    found = {
        part.__name__: [part(m, n, arguments.batch) for m in MODELS for n in numbers]
        for part in (data, network, checkpoint)
    }
    found["reads"] = [
        {"decode processes": count, **{str(size): f"{reads(count, size):.0f}" for size in SIZES}}
        for count in (1, 10, 80, 640)
    ]
    for title, rows in found.items():
        print(f"{title}\n\n{table(rows)}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
