"""Ingest: any pile of pictures becomes a verified, labelled, randomly readable dataset."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from mimray.trainers.data.canonical import canonicalise
from mimray.trainers.data.files import absolute, join, locate, parent, split_options
from mimray.trainers.data.ingest_plan import IngestPlan, plan_ingest, read_unit
from mimray.trainers.data.manifest import MANIFEST_NAME, REJECTED_NAME, Manifest
from mimray.trainers.data.parquet import Layout
from mimray.trainers.data.reorder import ExternalSort
from mimray.trainers.data.shards import Row, ShardWriter
from mimray.trainers.data.staging import Staging, staged
from mimray.trainers.errors import DataError, EmptyDatasetError, ImageError, TooManyRejectedError

IngestProgress = Callable[[int, int, int], None]

# A worker hands its pictures over in tables of about this size.
_TABLE_BYTES = 8 << 20
# Enough files a task to outweigh its start, enough tasks for every core of a large cluster.
_MIN_UNITS_PER_TASK, _MAX_TASKS = 32, 2000

_OUTPUT = pa.schema(
    [
        ("image", pa.binary()),
        ("sha256", pa.binary()),
        ("label", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("source", pa.string()),
        ("reencoded", pa.bool_()),
        ("reason", pa.string()),  # null for an accepted picture
        ("message", pa.string()),
    ]
)


@dataclass(frozen=True)
class IngestReport:
    """Outcome of an ingest.

    Attributes:
        out: URI of the dataset.
        manifest: contents of the dataset, as written to `dataset.json`.
        num_rejected: pictures left out; `rejected.jsonl` in the dataset lists them.
        label_notes: what people need to know of the labels; see `Labelling`.
    """

    out: str
    manifest: Manifest
    num_rejected: int
    label_notes: tuple[str, ...] = ()


def ingest(
    src: str,
    out: str,
    *,
    split: str | None = None,
    label: str | None = None,
    short_side_px: int | None = 256,
    shard_mib: int = 64,
    max_rejected: float = 0.01,
    overwrite: bool = False,
    progress: IngestProgress | None = None,
) -> IngestReport:
    """Make a dataset of Parquet shards from pictures, on the current Ray cluster.

    Workers read, verify and where needed re-encode pictures (see `canonicalise`); this process
    writes them in a random order that is the same for any number of workers, so that the same
    source always makes the same bytes and no class lies in a stretch of its own. Files are read in
    that order; rows of Parquet are sorted into it by way of files beside the shards
    (`ExternalSort`), for which there must be room. Neither side holds more than a few blocks in
    memory, or 512 MiB for Parquet. Bad pictures are left out and listed with the reason.

    Args:
        src: folder of pictures, Parquet, or a text file of paths or URIs; see `plan_ingest`.
        out: URI of the folder to make.
        split: split of `src` to take where there are several; None takes `train`.
        label: column of the labels, as for `open_source`.
        short_side_px: longer short sides are shrunk to this; None keeps every size.
        shard_mib: size of a shard.
        max_rejected: largest allowed fraction of rejected pictures, 0 to 1.
        overwrite: replace a complete dataset at `out`.
        progress: called with (pictures done, pictures in all, rejected so far).

    Raises:
        DataError: when `src` is unusable or `out` is taken.
        EmptyDatasetError: when no picture is left.
        TooManyRejectedError: when too many were rejected; the list then lies beside `out`.
        StorageError: when `out` cannot be written.
    """
    src, out = absolute(src).rstrip("/"), absolute(out).rstrip("/")
    place = split_options(out)[0].rstrip("/")
    if f"{place}/".startswith(f"{split_options(src)[0].rstrip('/')}/"):
        raise DataError(f"{out} lies in {src}, which is read", hint="write somewhere else")
    plan = plan_ingest(src, split, label)
    rejects_beside = join(parent(out), f"{place.rpartition('/')[2]}.{REJECTED_NAME}")
    with staged(out, overwrite=overwrite) as staging:
        writer = ShardWriter(
            staging.filesystem,
            staging.folder,
            class_names=plan.class_names,
            shard_bytes=shard_mib << 20,
        )
        try:
            rejected, num_reencoded = _write(plan, staging, writer, short_side_px, progress)
        except BaseException:
            writer.abort()
            raise
        num_rejected = rejected.total()
        if num_rejected > max_rejected * plan.num_pictures or not writer.num_rows:
            staging.filesystem.move(
                join(staging.folder, REJECTED_NAME), f"{staging.out}.{REJECTED_NAME}"
            )
            raise _too_many(src, rejected, plan.num_pictures, max_rejected, rejects_beside)
        manifest = Manifest(
            num_samples=writer.num_rows,
            labelled=plan.labelled,
            class_names=plan.class_names,
            fingerprint=writer.fingerprint,
            image_bytes=writer.image_bytes,
            short_side_px=short_side_px,
            num_reencoded=num_reencoded,
            num_ignored=plan.num_ignored,
            rejected=dict(sorted(rejected.items())),
            shards=tuple(writer.shards),
            permuted=True,
        )
        staging.write(MANIFEST_NAME, manifest.to_json())
    _remove_stale_rejects(rejects_beside)
    return IngestReport(out, manifest, num_rejected, plan.label_notes)


def _write(
    plan: IngestPlan,
    staging: Staging,
    writer: ShardWriter,
    short_side_px: int | None,
    progress: IngestProgress | None,
) -> tuple[Counter[str], int]:
    """Write all shards and `rejected.jsonl`; returns rejects by reason and the re-encoded."""
    rejected: Counter[str] = Counter()
    num_read = num_reencoded = 0
    sort = None
    if plan.places is not None:
        sort = ExternalSort(
            staging.filesystem,
            staging.folder,
            num_places=plan.num_pictures,
            num_bytes=plan.num_bytes,
        )

    def report() -> None:
        # A picture that is sorted is done when it was read and written.
        num_written = writer.num_rows + rejected.total()
        num_done = num_read if sort is None else (num_read + num_written) // 2
        if progress is not None:
            progress(num_done, plan.num_pictures, rejected.total())

    with staging.filesystem.open_output_stream(join(staging.folder, REJECTED_NAME)) as rejects:
        for table in _process(plan, short_side_px):
            accepted = pc.is_null(table["reason"]).to_numpy()
            for row in table.select(["source", "reason", "message"]).filter(~accepted).to_pylist():
                rejected[row["reason"]] += 1
                rejects.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
            num_reencoded += pc.sum(table["reencoded"]).as_py() or 0
            rows = table.select(Row._fields).filter(accepted)
            if sort is None:
                _add(writer, rows)
            else:
                assert plan.places is not None
                sort.add(rows, plan.places[num_read : num_read + len(table)][accepted])
            num_read += len(table)
            report()
    assert num_read == plan.num_pictures, "a picture was lost on the way"
    if sort is not None:
        for rows in sort.rows():
            _add(writer, rows)
            report()
    writer.close()
    return rejected, num_reencoded


def _add(writer: ShardWriter, rows: pa.Table) -> None:
    for row in rows.to_pylist():
        writer.add(Row(**row))


def _process(plan: IngestPlan, short_side_px: int | None) -> Iterator[pa.Table]:
    """Run the workers; tables of schema `_OUTPUT` arrive in the order of the plan."""
    import ray.data

    units = plan.units
    step = max(-(-len(units) // _MAX_TASKS), _MIN_UNITS_PER_TASK if plan.layout is None else 1)
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 2 * _TABLE_BYTES
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_arrow(
            [units.slice(start, step) for start in range(0, len(units), step)]
        ).map_batches(
            _process_units,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"layout": plan.layout, "short_side_px": short_side_px},
        )
    # The dataset keeps the context it was made in; the caller gets his own back at once.
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _process_units(
    units: pa.Table, *, layout: Layout | None, short_side_px: int | None
) -> Iterator[pa.Table]:
    """Read and canonicalise the pictures of some units, in a worker."""
    rows: list[dict[str, object]] = []
    num_bytes = 0
    for unit in units.to_pylist():
        for source, label, data, reason, message in read_unit(unit, layout):
            row: dict[str, object] = {"source": source, "label": label}
            if data is None:
                row |= {"reason": reason, "message": message}
            else:
                try:
                    picture = canonicalise(data, short_side_px)
                except ImageError as error:
                    row |= {"reason": error.reason, "message": str(error)}
                else:
                    row |= {
                        "image": picture.data,
                        "sha256": hashlib.sha256(picture.data).digest(),
                        "width": picture.width,
                        "height": picture.height,
                        "reencoded": picture.reencoded,
                    }
                    num_bytes += len(picture.data)
            rows.append(row)
            if num_bytes >= _TABLE_BYTES:
                yield pa.Table.from_pylist(rows, schema=_OUTPUT)
                rows, num_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=_OUTPUT)


def _too_many(
    src: str, rejected: Counter[str], num_pictures: int, max_rejected: float, listed_in: str
) -> DataError:
    num_rejected = rejected.total()
    by_reason = ", ".join(f"{count} {reason}" for reason, count in rejected.most_common())
    if num_rejected == num_pictures:
        return EmptyDatasetError(
            f"none of the {num_pictures} pictures in {src} can be used: {by_reason}",
            hint=f"{listed_in} lists them",
        )
    return TooManyRejectedError(
        f"{num_rejected} of {num_pictures} pictures in {src} cannot be used"
        f" ({num_rejected / num_pictures:.1%}, allowed are {max_rejected:.1%}): {by_reason};"
        f" {listed_in} lists them",
        hint="repair or remove them, or allow more with --max-rejected",
    )


def _remove_stale_rejects(uri: str) -> None:
    """Remove the list that an earlier, refused ingest left beside the dataset."""
    filesystem, path = locate(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.File:
        filesystem.delete_file(path)
