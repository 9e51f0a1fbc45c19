"""The order in which samples are seen: a pure function of (seed, position).

A dataset may be sorted, by class or by camera, and so its row groups are drawn from everywhere at
once. It is cut into strata, as many as row groups can be open at a time, that follow each other
and have about equal numbers of rows. Each epoch shuffles the groups of each stratum, and goes
through all strata at once, each at its own pace, so that all end with the epoch: one group of each
is open at a time. Rows are then shuffled inside windows. A group is opened once an epoch, and what
is open at a time comes from all over the dataset. Where all groups can be open, an epoch is a
random permutation.

The position is one integer, the number of samples consumed; epochs follow each other without a
seam.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from mimray.trainers.data.rng import Stream, generator, permutation


class SampleOrder:
    """Maps positions to (epoch, index).

    Args:
        group_rows: rows of each row group, in file order; ones for a folder of single pictures.
        seed: the run's seed.
        window_rows: number of rows to shuffle together, where not all groups can be open; no more
            than are open.
        open_groups: number of row groups that may be open at a time; None for all.
    """

    def __init__(
        self,
        group_rows: np.ndarray,
        seed: int,
        window_rows: int,
        open_groups: int | None = None,
    ) -> None:
        assert group_rows.sum()
        self.seed = seed
        self._group_starts = np.cumsum(group_rows) - group_rows
        self.num_samples = int(group_rows.sum())
        # Empty groups are in the way of nothing, but of a modulus.
        self._groups = np.flatnonzero(group_rows)
        self._rows = group_rows[self._groups].astype(np.int64)
        self._strides = np.array([_stride(rows) for rows in self._rows.tolist()])
        all_open = open_groups is None or open_groups >= len(self._groups)
        num_strata = 1 if open_groups is None or all_open else open_groups
        # A window of more rows than are open would open groups again for its rows.
        open_rows = max(self.num_samples * num_strata // len(self._groups), 1)
        self._num_windows = 1 if all_open else -(-self.num_samples // min(window_rows, open_rows))
        middles = np.cumsum(self._rows) - self._rows / 2
        stratum = (middles * num_strata / self.num_samples).astype(np.int64)
        # A group that is larger than a stratum leaves the next one empty.
        self._stratum = np.unique(stratum, return_inverse=True)[1]
        self._stratum_rows = np.bincount(self._stratum, self._rows).astype(np.int64)
        self._epoch = -1
        self._window: tuple[int, int] = (-1, -1)

    def take(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions position .. position + count - 1.

        Returns:
            Epochs and indices, both int64 [count].
        """
        epochs, indices = [], []
        while count:
            epoch, offset = divmod(position, self.num_samples)
            rows, start = self._rows_around(epoch, offset)
            part = rows[offset - start : offset - start + count]
            epochs.append(np.full(len(part), epoch, dtype=np.int64))
            indices.append(part)
            position += len(part)
            count -= len(part)
        return np.concatenate(epochs), np.concatenate(indices)

    def _rows_around(self, epoch: int, offset: int) -> tuple[np.ndarray, int]:
        """The shuffled rows of the window that holds `offset`, and where the window starts."""
        if epoch != self._epoch:
            self._lay_out(epoch)
        w = int(np.searchsorted(self._window_starts, offset, side="right")) - 1
        if self._window != (epoch, w):
            rows = self._rows_between(self._progress(w), self._progress(w + 1))
            rng = generator(self.seed, Stream.WINDOW_ORDER, epoch, w)
            self._window_rows = rows[permutation(rng, len(rows))]
            self._window = (epoch, w)
        return self._window_rows, int(self._window_starts[w])

    def _lay_out(self, epoch: int) -> None:
        """Draw the turns of the groups, where each begins, and the pace of the strata."""
        rng = generator(self.seed, Stream.GROUP_ORDER, epoch)
        self._turns = np.argsort(self._stratum + rng.random(len(self._rows)), kind="stable")
        self._turn_ends = np.cumsum(self._rows[self._turns])
        self._offsets = (rng.random(len(self._rows)) * self._rows).astype(np.int64)
        # Strata of equal size would all give a row to one window, and none to the next.
        phases = rng.random(len(self._stratum_rows)) * self._num_windows
        self._phases = phases.astype(np.int64)
        starts = [self._progress(w).sum() for w in range(self._num_windows + 1)]
        self._window_starts = np.array(starts, dtype=np.int64)
        self._epoch = epoch

    def _progress(self, window: int) -> np.ndarray:
        """Rows that each stratum has given before a window, int64 [S]."""
        return (self._stratum_rows * window + self._phases) // self._num_windows

    def _rows_between(self, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Indices of the rows that strata give from one progress to another, int64."""
        counts = end - begin
        starts = np.cumsum(self._stratum_rows) - self._stratum_rows + begin
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        places = np.repeat(starts, counts) + within  # among all rows, by the turns of the groups
        turn = np.searchsorted(self._turn_ends, places, side="right")
        group = self._turns[turn]
        rows = self._rows[group]
        nth = places - self._turn_ends[turn] + rows
        row = (nth * self._strides[group] + self._offsets[group]) % rows
        indices: np.ndarray = self._group_starts[self._groups[group]] + row
        return indices


@cache
def _stride(num_rows: int) -> int:
    """A step that visits each row of a group once, neighbours in time being far apart.

    It is the number prime to `num_rows` next above the golden section, so that any few rows in
    turn are spread evenly, over the classes too that may follow each other in a group.
    """
    stride = round(num_rows * (math.sqrt(5) - 1) / 2)
    while math.gcd(stride, num_rows) != 1:
        stride += 1
    return stride
