"""Row groups that are open at a time, and the parts that they are kept in.

The order of training follows from both, so they follow from the dataset alone, and not from the
machine or its caches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mimray.trainers.data.cache import MEMORY_BYTES

# Of a dataset that may be sorted, so much is open at a time, on local disk.
OPEN_BYTES = 4 << 30
# A cache of this size reads each part once an epoch: what follows is read while the rest is in use.
CACHE_BYTES = 2 * OPEN_BYTES
# Twice as many as ImageNet has classes, so that two are within each class of a sorted copy.
MIN_OPEN_PARTS = 2048


class Cut(NamedTuple):
    """Row groups cut into parts.

    Attributes:
        num_parts: int64 [G], parts of each row group, of equal numbers of rows; each part costs a
            read of the row group an epoch.
        open_parts: number of parts to keep open at a time.
    """

    num_parts: np.ndarray
    open_parts: int


def cut_groups(group_rows: np.ndarray, group_bytes: np.ndarray, *, spread: bool) -> Cut:
    """Cut row groups so that enough of them can be open at a time.

    Args:
        group_rows: int64 [G], rows of each row group.
        group_bytes: int64 [G], their sizes.
        spread: True where rows may be sorted and are drawn from everywhere at once. Row groups
            are then open on local disk; where `OPEN_BYTES` do not hold them all, they are cut so
            finely that `MIN_OPEN_PARTS` parts fit in. False where rows lie in random order: row
            groups stay whole, and a third of a process's memory for them is open, since a window
            may reach over two generations of them.
    """
    open_bytes = OPEN_BYTES if spread else MEMORY_BYTES // 3
    num_bytes = max(int(group_bytes.sum()), 1)
    num_parts = np.ones(len(group_rows), dtype=np.int64)
    if spread and num_bytes > open_bytes:
        fine = -(-group_bytes * MIN_OPEN_PARTS // OPEN_BYTES)
        num_parts = np.clip(fine, 1, np.maximum(group_rows, 1))
    return Cut(num_parts, max(open_bytes * int(num_parts.sum()) // num_bytes, 1))
