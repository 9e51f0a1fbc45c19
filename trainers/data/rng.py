"""Counter-based randomness: a generator is made from its purpose and counters when needed.

Draws with the same (seed, stream, a, b, view) are equal on any worker, in any order, after any
restart. Philox is counter-based, so making a generator costs microseconds and no state.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Purposes of randomness; the numbers of different streams are independent."""

    GROUP_ORDER = 1
    WINDOW_ORDER = 2
    VIEW = 3
    MASK = 4
    CODEBOOK = 5
    HEAD_ORDER = 6
    HEAD_DEVICE = 7
    HEAD_VIEW = 8
    PROBE_ORDER = 9
    PROBE_SPLIT = 10
    SCENE = 11
    ERASING = 12
    SEARCH = 13
    INGEST_ORDER = 14
    NUMBERS = 15
    NOISE = 16
    RESAMPLE = 17
    PART = 18
    PATCHES = 19


def generator(seed: int, stream: Stream, a: int, b: int = 0, view: int = 0) -> np.random.Generator:
    """Make the generator of a purpose and its counters.

    Args:
        seed: the run's seed.
        stream: the purpose.
        a: first counter, e.g. the epoch.
        b: second counter, e.g. the sample index.
        view: number of a view of the picture; each has its own stream.
    """
    # Philox itself counts in the two low words.
    key = [seed, int(stream) + (view << 32)]
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, a, b]))


def sample_seeds(seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Seeds of the noise of samples, uint64 [B], by their epochs and indices, int64 [B]."""
    found = [
        generator(seed, Stream.NOISE, int(epoch), int(index)).integers(2**64, dtype=np.uint64)
        for epoch, index in zip(epochs, indices, strict=True)
    ]
    return np.array(found, dtype=np.uint64)


def permutation(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random permutation of n, from uniform draws alone, whose stream numpy keeps stable."""
    return np.argsort(rng.random(n), kind="stable")


@contextmanager
def global_generators(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators for a library that draws from them, from a sample's own.

    These are Python's and NumPy's; their states are restored afterwards.

    Args:
        rng: the sample's own generator; two numbers are drawn from it.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
