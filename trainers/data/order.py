"""The order in which samples are seen: a pure function of (seed, position).

Row groups are shuffled over the whole dataset, then rows are shuffled inside windows of
consecutive row groups. A window is what is held in memory at a time, so reading stays
sequential a row group while rows still mix widely. The position is one integer, the number of
samples consumed; epochs follow each other without a seam.
"""

from __future__ import annotations

import numpy as np

from mimray.trainers.data.rng import Stream, generator, permutation


class SampleOrder:
    """Maps positions to (epoch, index).

    Args:
        group_rows: rows of each row group, in file order; ones for a folder of single pictures.
        seed: the run's seed.
        window_rows: smallest number of rows to shuffle together.
    """

    def __init__(self, group_rows: np.ndarray, seed: int, window_rows: int) -> None:
        assert len(group_rows)
        self.seed = seed
        self.window_rows = window_rows
        self.num_samples = int(group_rows.sum())
        self._group_rows = group_rows.astype(np.int64)
        self._group_starts = np.concatenate([[0], np.cumsum(self._group_rows)[:-1]])
        self._epoch = -1
        self._windows: list[np.ndarray] = []  # groups of each window, in order
        self._window_starts = np.zeros(1, dtype=np.int64)
        self._window: tuple[int, int] = (-1, -1)
        self._window_rows = np.zeros(0, dtype=np.int64)

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
            groups = self._windows[w]
            rows = np.concatenate(
                [np.arange(self._group_rows[g]) + self._group_starts[g] for g in groups]
            )
            rng = generator(self.seed, Stream.WINDOW_ORDER, epoch, w)
            self._window_rows = rows[permutation(rng, len(rows))]
            self._window = (epoch, w)
        return self._window_rows, int(self._window_starts[w])

    def _lay_out(self, epoch: int) -> None:
        rng = generator(self.seed, Stream.GROUP_ORDER, epoch)
        groups = permutation(rng, len(self._group_rows))
        rows_before = np.concatenate([[0], np.cumsum(self._group_rows[groups])])
        window_of_group = rows_before[:-1] // self.window_rows
        cuts = np.flatnonzero(np.diff(window_of_group)) + 1
        self._windows = np.split(groups, cuts)
        self._window_starts = rows_before[np.concatenate([[0], cuts])]
        self._epoch = epoch
