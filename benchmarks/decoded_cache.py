"""Claim: an epoch is faster with the cache of decoded pictures than without it.

    python benchmarks/decoded_cache.py DATA [--pictures 2000] [--rounds 3] [--size 32]

Samples of MAE's recipe (random crop, flip, mask) are made in this process, one after the other,
with data.decoded_cache_mib off and on, taking turns in one run. Prints pictures a second of the
first epoch, in which the cache is filled, and of the later ones, and the speed-up of each (median
of the pairs, least and most); then the same of the pictures alone, without crop and mask. Seconds
are CPU time of this process, which depends little on other load. With and without the cache the
samples must have the same pixels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.data.decoded import decoded_bytes, release
from mimray.trainers.data.loader import Place, Samples
from mimray.trainers.data.selection import Selection
from mimray.trainers.data.sources import open_source
from mimray.trainers.methods.catalogue import inputs_of


def samples(views: Samples, epoch: int) -> int:
    """Make every sample of an epoch; returns the sum of their pixels."""
    places = (Place(epoch, index) for index in range(len(views.source)))
    return sum(int(views[place].inputs["images"].sum(dtype=np.int64)) for place in places)


def pictures(views: Samples, epoch: int) -> int:
    """Decode every whole picture; returns the sum of their widths."""
    size = views.recipe.data.image_size
    return sum(views.pictures[index].decoded(size).shape[1] for index in range(len(views.source)))


def compare(off: Samples, on: Samples, make: Callable[[Samples, int], int], epoch: int) -> float:
    """Speed-up of an epoch by the cache.

    Args:
        off: samples without the cache.
        on: samples with the cache.
        make: goes through an epoch and returns a sum to compare.
        epoch: number of the epoch.
    """
    seconds, sums = [], []
    for views in (off, on):
        began = time.process_time()
        sums.append(make(views, epoch))
        seconds.append(time.process_time() - began)
    assert sums[0] == sums[1], "the cache changed a sample"
    a, b = (len(off.source) / s for s in seconds)
    print(
        f"{make.__name__}, epoch {epoch}: {a:.0f}/s decoding, {b:.0f}/s with the cache", flush=True
    )
    return seconds[0] / seconds[1]


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a dataset: Parquet or a folder of pictures")
    parser.add_argument("--pictures", type=int, default=2000, help="the first N of it")
    parser.add_argument("--rounds", type=int, default=5, help="later epochs")
    parser.add_argument("--size", type=int, default=32, help="of the encoder's input, pixels")
    arguments = parser.parse_args()
    whole = open_source(arguments.data)
    source = Selection(whole, np.arange(min(arguments.pictures, len(whole))))
    mib = decoded_bytes(source) // (1 << 20) * 4 // 3 + 16
    settings = [f"data.image_size={arguments.size}", "data.num_workers=0"]
    release(source.facts.fingerprint)
    off, on = (
        Samples(
            source,
            load_recipe("mae-tiny", [*settings, f"data.decoded_cache_mib={bound}"]),
            inputs_of(load_recipe("mae-tiny", [*settings, f"data.decoded_cache_mib={bound}"])),
        )
        for bound in (0, mib)
    )
    off[Place(0, 0)]  # warm-up: imports, the first row group
    try:
        first = compare(off, on, samples, 0)
        later = [compare(off, on, samples, 1 + n) for n in range(arguments.rounds)]
        pictures(on, 0)  # fills the cache at the scale of whole pictures, which crops may not need
        alone = [compare(off, on, pictures, 1 + n) for n in range(arguments.rounds)]
    finally:
        release(source.facts.fingerprint)
    print(
        f"{arguments.data}, {len(source)} pictures, input {arguments.size}: first epoch "
        f"{first:.2f} x, later {spread(later)}, pictures alone {spread(alone)}"
    )


if __name__ == "__main__":
    main()
