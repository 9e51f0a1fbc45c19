"""Ingest: any pile of pictures becomes a verified, labelled, randomly readable dataset."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from mimray.trainers.cluster import connected
from mimray.trainers.data.account import Account
from mimray.trainers.data.canonical import canonicalise
from mimray.trainers.data.decode import AS_STORED, Note, PictureFile, Reading
from mimray.trainers.data.files import absolute, is_local, join, locate, parent, split_options
from mimray.trainers.data.ingest_plan import IngestPlan, SourcePicture, plan_ingest, read_unit
from mimray.trainers.data.manifest import (
    MANIFEST_NAME,
    REJECTED_NAME,
    SPLITS_NAME,
    Manifest,
    splits_json,
)
from mimray.trainers.data.pages import choose_pages
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
        ("notes", pa.list_(pa.struct([("reason", pa.string()), ("kind", pa.string())]))),
        ("is_first", pa.bool_()),  # false for the later pages of a file
    ]
)


@dataclass(frozen=True)
class Preparation:
    """The treatment of every picture on its way into a dataset.

    Attributes:
        short_side_px: longer short sides are shrunk to this; None keeps every size.
        reading: what to take of pictures that hold more than 8-bit RGB.
        every_page: True takes every page of a TIFF as a picture, False the first.
    """

    short_side_px: int | None = 256
    reading: Reading = AS_STORED
    every_page: bool = False


@dataclass(frozen=True)
class IngestReport:
    """Outcome of an ingest.

    Attributes:
        out: URI of the dataset.
        manifests: contents of the dataset by split, as written to `dataset.json` in the folder of
            each; the key is empty for one without splits, whose files lie in the folder itself.
        account: what was passed over, merged, shortened or reinterpreted.
        label_notes: what people need to know of the labels; see `Labelling`.
    """

    out: str
    manifests: Mapping[str, Manifest]
    account: Account
    label_notes: tuple[str, ...] = ()

    @property
    def manifest(self) -> Manifest:
        """The contents of a dataset without splits."""
        (manifest,) = self.manifests.values()
        return manifest

    @property
    def num_rejected(self) -> int:
        """Pictures left out; `rejected.jsonl` beside the shards lists them."""
        return sum(sum(manifest.rejected.values()) for manifest in self.manifests.values())


def ingest(
    src: str,
    out: str,
    *,
    split: str | None = None,
    label: str | None = None,
    short_side_px: int | None = 256,
    reading: Reading = AS_STORED,
    every_page: bool = False,
    shard_mib: int = 64,
    max_rejected: float = 0.01,
    overwrite: bool = False,
    progress: IngestProgress | None = None,
) -> IngestReport:
    """Make a dataset of Parquet shards from pictures, on Ray (see `connected`).

    Workers read, verify and where needed re-encode pictures (see `canonicalise`); this process
    writes them in a random order that is the same for any number of workers, so that the same
    source always makes the same bytes and no class lies in a stretch of its own. Files are read in
    that order; rows of Parquet are sorted into it by way of files beside the shards
    (`ExternalSort`), for which there must be room. Neither side holds more than a few blocks in
    memory, or 512 MiB for Parquet. Bad pictures are left out and listed with the reason. Splits lie
    in a folder each, which `open_source` and evaluations tell apart.

    Args:
        src: folder of pictures, Parquet, or a text file of paths or URIs; see `plan_ingest`.
        out: URI of the folder to make.
        split: the only split of `src` to take, into `out` itself; None takes all.
        label: column of the labels, as for `open_source`.
        short_side_px: longer short sides are shrunk to this; None keeps every size.
        reading: what to take of pictures that hold more than 8-bit RGB; for all of them alike.
        every_page: True takes every page of a TIFF as a picture, False the first.
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
    _refuse_nested(src, out)
    plans = plan_ingest(src, split, label)
    prepare = Preparation(short_side_px, reading, every_page)
    num_pictures = sum(plan.num_pictures for plan in plans.values())
    rejects_beside = join(parent(out), f"{place.rpartition('/')[2]}.{REJECTED_NAME}")
    with connected(), staged(out, overwrite=overwrite, parts=tuple(plans)) as staging:
        manifests: dict[str, Manifest] = {}
        account = Account()
        num_done = num_rejected = 0

        def report(done: int, rejected: int) -> None:
            if progress is not None:
                progress(num_done + done, num_pictures, num_rejected + rejected)

        for name, plan in plans.items():
            written = _write(plan, staging.part(name), prepare, shard_mib << 20, report)
            rejected = written.rejected.total()
            if rejected > max_rejected * written.num_taken or rejected == written.num_taken:
                staging.filesystem.move(
                    join(staging.part(name).folder, REJECTED_NAME), f"{staging.out}.{REJECTED_NAME}"
                )
                raise _too_many(
                    join(src, name) if name else src, written, max_rejected, rejects_beside
                )
            manifests[name] = written.manifest(plan, prepare)
            account.merge(written.account)
            num_done, num_rejected = num_done + plan.num_pictures, num_rejected + rejected
        # Without its manifests the folder is no dataset, so that they are written last.
        for name, manifest in manifests.items():
            staging.part(name).write(MANIFEST_NAME, manifest.to_json())
        if "" not in manifests:
            staging.write(SPLITS_NAME, splits_json(manifests))
    _remove_stale_rejects(rejects_beside)
    notes = tuple(dict.fromkeys(note for plan in plans.values() for note in plan.label_notes))
    return IngestReport(out, manifests, account, notes)


def _refuse_nested(src: str, out: str) -> None:
    inner, outer = _place(out), _place(src)
    if inner.is_relative_to(outer):
        raise DataError(f"{out} lies in {src}, which is read", hint="write somewhere else")
    if outer.is_relative_to(inner):
        raise DataError(f"{src}, which is read, lies in {out}", hint="write somewhere else")


def _place(uri: str) -> PurePath:
    """A URI as a path to compare; a local one without links."""
    filesystem, path = locate(uri)
    if is_local(filesystem):
        return Path(path).resolve()
    return PurePosixPath(split_options(uri)[0])


@dataclass
class _Written:
    """Counts of one split while it is written."""

    writer: ShardWriter
    account: Account = field(default_factory=Account)
    rejected: Counter[str] = field(default_factory=Counter)
    num_reencoded: int = 0

    @property
    def num_taken(self) -> int:
        return self.writer.num_rows + self.rejected.total()

    def manifest(self, plan: IngestPlan, prepare: Preparation) -> Manifest:
        return Manifest(
            num_samples=self.writer.num_rows,
            labelled=plan.labelled,
            class_names=plan.class_names,
            fingerprint=self.writer.fingerprint,
            image_bytes=self.writer.image_bytes,
            short_side_px=prepare.short_side_px,
            num_reencoded=self.num_reencoded,
            account=tuple(self.account.to_json()),
            rejected=dict(sorted(self.rejected.items())),
            shards=tuple(self.writer.shards),
            permuted=True,
        )


def _write(
    plan: IngestPlan,
    staging: Staging,
    prepare: Preparation,
    shard_bytes: int,
    report: Callable[[int, int], None],
) -> _Written:
    """Write all shards and `rejected.jsonl` of one split."""
    writer = ShardWriter(
        staging.filesystem, staging.folder, class_names=plan.class_names, shard_bytes=shard_bytes
    )
    written = _Written(writer)
    written.account.merge(plan.account)
    try:
        _fill(written, plan, staging, prepare, report)
    except BaseException:
        writer.abort()
        raise
    written.account.drop_few_dark()
    return written


def _fill(
    written: _Written,
    plan: IngestPlan,
    staging: Staging,
    prepare: Preparation,
    report: Callable[[int, int], None],
) -> None:
    writer, rejected = written.writer, written.rejected
    num_read = 0
    sort = None
    if plan.places is not None:
        sort = ExternalSort(
            staging.filesystem,
            staging.folder,
            num_places=plan.num_pictures,
            num_bytes=plan.num_bytes,
        )

    def report_done() -> None:
        # A picture that is sorted is done when it was read and written.
        num_written = min(written.num_taken, plan.num_pictures)
        report(num_read if sort is None else (num_read + num_written) // 2, rejected.total())

    with staging.filesystem.open_output_stream(join(staging.folder, REJECTED_NAME)) as rejects:
        for table in _process(plan, prepare):
            accepted = pc.is_null(table["reason"]).to_numpy()
            for row in table.select(["source", "reason", "message"]).filter(~accepted).to_pylist():
                rejected[row["reason"]] += 1
                rejects.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
            _count(table["notes"], written.account)
            written.num_reencoded += pc.sum(table["reencoded"]).as_py() or 0
            rows = table.select(Row._fields).filter(accepted)
            is_first = table["is_first"].to_numpy()
            if sort is None:
                _add(writer, rows)
            else:
                assert plan.places is not None
                numbers = num_read + np.cumsum(is_first) - 1
                sort.add(rows, plan.places[numbers][accepted])
            num_read += int(is_first.sum())
            report_done()
    assert num_read == plan.num_pictures, "a picture was lost on the way"
    if sort is not None:
        for rows in sort.rows():
            _add(writer, rows)
            report_done()
    writer.close()


def _count(notes: pa.ChunkedArray, account: Account) -> None:
    for note in pc.list_flatten(notes).to_pylist():
        account.add(note["reason"], note["kind"])


def _add(writer: ShardWriter, rows: pa.Table) -> None:
    for row in rows.to_pylist():
        writer.add(Row(**row))


def _process(plan: IngestPlan, prepare: Preparation) -> Iterator[pa.Table]:
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
            fn_kwargs={"layout": plan.layout, "prepare": prepare},
        )
    # The dataset keeps the context it was made in; the caller gets his own back at once.
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def _process_units(
    units: pa.Table, *, layout: Layout | None, prepare: Preparation
) -> Iterator[pa.Table]:
    """Read and canonicalise the pictures of some units, in a worker."""
    rows: list[dict[str, object]] = []
    num_bytes = 0
    for unit in units.to_pylist():
        for picture in read_unit(unit, layout):
            for row in _rows(picture, prepare):
                rows.append(row)
                num_bytes += len(row.get("image", b""))
                if num_bytes >= _TABLE_BYTES:
                    yield pa.Table.from_pylist(rows, schema=_OUTPUT)
                    rows, num_bytes = [], 0
    if rows:
        yield pa.Table.from_pylist(rows, schema=_OUTPUT)


def _rows(found: SourcePicture, prepare: Preparation) -> Iterator[dict[str, Any]]:
    """The rows of schema `_OUTPUT` of one file: one, or one a page."""
    row: dict[str, Any] = {"source": found.source, "label": found.label, "is_first": True}
    if found.data is None:
        yield row | {"reason": found.reason, "message": found.message, "notes": []}
        return
    file = PictureFile(found.data)
    pages, notes = choose_pages(file, every_page=prepare.every_page)
    for page in pages:
        if len(pages) > 1:
            row["source"] = f"{found.source}#page={page + 1}"
        yield row | _stored(file, page, notes, prepare)
        row["is_first"], notes = False, ()


def _stored(
    file: PictureFile, page: int, notes: tuple[Note, ...], prepare: Preparation
) -> dict[str, Any]:
    try:
        reading = replace(prepare.reading, page=page)
        picture = canonicalise(file, prepare.short_side_px, reading)
    except ImageError as error:
        return {"reason": error.reason, "message": str(error), "notes": []}
    return {
        "image": picture.data,
        "sha256": hashlib.sha256(picture.data).digest(),
        "width": picture.width,
        "height": picture.height,
        "reencoded": picture.reencoded,
        "notes": [note._asdict() for note in (*notes, *picture.notes)],
    }


def _too_many(src: str, written: _Written, max_rejected: float, listed_in: str) -> DataError:
    rejected, num_pictures = written.rejected, written.num_taken
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
