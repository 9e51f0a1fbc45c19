"""Writing a dataset: row groups of bounded size in shards of bounded size."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from mimray.trainers.data.files import join
from mimray.trainers.data.manifest import (
    CLASS_NAMES_KEY,
    FORMAT_KEY,
    VERSION,
    ShardFacts,
    shard_name,
)

# What one picture costs at most to read at random.
ROW_GROUP_BYTES = 4 << 20
# Label, sizes, offsets and page headers of one row, rounded up.
_ROW_OVERHEAD_BYTES = 64


class Row(NamedTuple):
    """One picture to be written."""

    image: bytes
    sha256: bytes
    label: int | None
    width: int
    height: int
    source: str


class ShardWriter:
    """Writes rows in the order given; equal rows make equal files.

    Pictures are compressed already, so columns are stored plainly. A picture larger than
    `ROW_GROUP_BYTES` has a row group of its own.

    Args:
        filesystem: filesystem to write to.
        folder: an existing folder on it.
        class_names: names of the classes, by label, kept in every shard's schema.
        shard_bytes: size at which a shard is closed.
    """

    def __init__(
        self,
        filesystem: pafs.FileSystem,
        folder: str,
        *,
        class_names: tuple[str, ...],
        shard_bytes: int,
    ) -> None:
        self._filesystem = filesystem
        self._folder = folder
        self._schema = pa.schema(
            [
                ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                ("label", pa.int64()),
                ("width", pa.int32()),
                ("height", pa.int32()),
                ("source", pa.string()),
            ],
            metadata={FORMAT_KEY: str(VERSION), CLASS_NAMES_KEY: "\n".join(class_names)},
        )
        self._shard_bytes = shard_bytes
        self._rows: list[Row] = []
        self._group_bytes = 0
        self._writer: pq.ParquetWriter | None = None
        self._written_rows = 0
        self._written_bytes = 0
        self._digest = hashlib.sha256()
        self.num_rows = 0
        self.image_bytes = 0
        self.shards: list[ShardFacts] = []
        self._digest.update("\n".join(class_names).encode())

    @property
    def fingerprint(self) -> str:
        """Hex sha256 over the class names and every row's picture and label, in order."""
        return self._digest.hexdigest()

    def add(self, row: Row) -> None:
        """Append one row."""
        cost = len(row.image) + 2 * len(row.source.encode()) + _ROW_OVERHEAD_BYTES
        if self._rows and self._group_bytes + cost > ROW_GROUP_BYTES:
            self._write_group()
        self._rows.append(row)
        self._group_bytes += cost
        self._digest.update(row.sha256 + str(row.label).encode())
        self.num_rows += 1
        self.image_bytes += len(row.image)

    def close(self) -> None:
        """Write what is left and finish the last shard."""
        if self._rows:
            self._write_group()
        self._close_shard()

    def abort(self) -> None:
        """Close an open file, whatever is in it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_group(self) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                join(self._folder, shard_name(len(self.shards))),
                self._schema,
                filesystem=self._filesystem,
                compression="none",
                use_dictionary=False,
                write_statistics=["label"],
            )
        rows = self._rows
        table = pa.table(
            {
                "image": [{"bytes": row.image, "path": row.source} for row in rows],
                "label": [row.label for row in rows],
                "width": [row.width for row in rows],
                "height": [row.height for row in rows],
                "source": [row.source for row in rows],
            },
            schema=self._schema,
        )
        self._writer.write_table(table, row_group_size=len(rows))
        self._written_rows += len(rows)
        self._written_bytes += self._group_bytes
        self._rows, self._group_bytes = [], 0
        if self._written_bytes >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        name = shard_name(len(self.shards))
        size = self._filesystem.get_file_info(join(self._folder, name)).size
        self.shards.append(ShardFacts(name, self._written_rows, size))
        self._written_rows = self._written_bytes = 0
