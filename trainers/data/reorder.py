"""An external sort: rows put in the order of their places, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from mimray.trainers.data.files import join
from mimray.trainers.data.manifest import run_name

MEMORY_BYTES = 256 << 20
# Rows handed on at a time.
_SLICE_ROWS = 256


class ExternalSort:
    """Takes rows in any order and gives them back in the order of their places.

    Columns of bytes come back as `large_binary`: what is sorted at once may be more than the 2 GiB
    that an array of `binary` holds.

    Up to `memory_bytes` of rows stay in memory. Beyond that they lie in files, each sorted and cut
    at the same places, so that one cut of every file is one stretch of the result. Memory holds a
    file's worth of rows twice at most, while they are sorted.

    Args:
        filesystem: filesystem of the files.
        folder: an existing folder on it.
        num_places: places are 0 to this less one; rows of the same place keep their order.
        num_bytes: estimate of the bytes of all rows together; decides how finely files are cut.
        memory_bytes: bytes of rows to hold before they are written to a file.
    """

    def __init__(
        self,
        filesystem: pafs.FileSystem,
        folder: str,
        *,
        num_places: int,
        num_bytes: int,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._filesystem = filesystem
        self._folder = folder
        self._memory_bytes = memory_bytes
        num_cuts = -(-num_bytes // memory_bytes)
        self._cuts = np.linspace(0, num_places, max(num_cuts, 1) + 1).round().astype(np.int64)
        self._held: list[pa.Table] = []
        self._held_bytes = 0
        self._files: list[str] = []

    def add(self, rows: pa.Table, places: np.ndarray) -> None:
        """Take rows.

        Args:
            rows: rows of one schema, the same in each call.
            places: int64 [len(rows)], their places.
        """
        rows = rows.cast(_large(rows.schema))
        self._held.append(rows.append_column("place", pa.array(places, pa.int64())))
        self._held_bytes += rows.nbytes
        if self._held_bytes >= self._memory_bytes:
            self._write_held()

    def rows(self) -> Iterator[pa.Table]:
        """Give all rows back in the order of their places, some at a time."""
        if not self._files:
            yield from _slices(_sorted(self._held))
            return
        if self._held:
            self._write_held()
        for cut in range(len(self._cuts) - 1):
            yield from _slices(_sorted([self._read(path, cut) for path in self._files]))
        for path in self._files:
            self._filesystem.delete_file(path)

    def _write_held(self) -> None:
        rows = _sorted(self._held)
        self._held, self._held_bytes = [], 0
        path = join(self._folder, run_name(len(self._files)))
        ends = np.searchsorted(rows["place"].to_numpy(), self._cuts)
        with (
            self._filesystem.open_output_stream(path) as sink,
            pa.ipc.new_file(sink, rows.schema) as writer,
        ):
            for start, end in pairwise(ends.tolist()):
                batches = rows.slice(start, end - start).combine_chunks().to_batches()
                writer.write_batch(
                    batches[0] if batches else pa.RecordBatch.from_pylist([], schema=rows.schema)
                )
        self._files.append(path)

    def _read(self, path: str, cut: int) -> pa.Table:
        with self._filesystem.open_input_file(path) as file:
            return pa.Table.from_batches([pa.ipc.open_file(file).get_batch(cut)])


def _large(schema: pa.Schema) -> pa.Schema:
    for number, field in enumerate(schema):
        if pa.types.is_binary(field.type):
            schema = schema.set(number, field.with_type(pa.large_binary()))
    return schema


def _sorted(tables: list[pa.Table]) -> pa.Table:
    rows = pa.concat_tables(tables) if tables else pa.table({"place": pa.array([], pa.int64())})
    return rows.take(np.argsort(rows["place"].to_numpy(), kind="stable"))


def _slices(rows: pa.Table) -> Iterator[pa.Table]:
    for start in range(0, len(rows), _SLICE_ROWS):
        yield rows.slice(start, _SLICE_ROWS).drop_columns(["place"])
