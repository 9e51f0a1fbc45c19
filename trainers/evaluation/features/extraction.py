"""Features of a whole dataset as Parquet, by Ray Data; run again, it does what is missing."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs as pafs
from pydantic import Field, ValidationError

from mimray.trainers.config.base import Config
from mimray.trainers.config.evaluation.extract import ExtractSpec
from mimray.trainers.data.sources import Source
from mimray.trainers.errors import MimrayError, RunConflictError, StorageError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.parts import (
    EXTRACTION_KEY,
    SKIPPED_KEY,
    Extraction,
    PartEncoder,
    Skipped,
    describe,
)
from mimray.trainers.evaluation.score import Progress
from mimray.trainers.storage import RunDir, storage_errors

MANIFEST = "extraction.json"
BATCH_SIZE = 64

# Beyond these, more CPUs for one copy of the encoder gain less than another copy would.
_MAX_CPUS_PER_COPY, _MAX_CPUS_PER_GPU = 4, 8


class PartFacts(Config):
    """One file: its name, its rows, its size in bytes."""

    file: str = Field(pattern=r"^part-[\w-]+\.parquet$")
    num_rows: int
    num_bytes: int


class Manifest(Config):
    """`extraction.json`, written last: what a finished extraction holds.

    Attributes:
        extraction: all that determines the features.
        data: URI of the pictures.
        class_names: names of the classes, by label; empty when unlabelled or unnamed.
        num_rows: views in it.
        parts: files, in the order of the pictures.
        skipped: pictures that were left out.
    """

    format: Literal[1] = 1
    extraction: Extraction
    data: str
    class_names: tuple[str, ...]
    num_rows: int
    parts: tuple[PartFacts, ...]
    skipped: tuple[Skipped, ...]

    @property
    def num_bytes(self) -> int:
        """Size of its files together."""
        return sum(part.num_bytes for part in self.parts)


@dataclass(frozen=True)
class Extracted:
    """Outcome of an extraction.

    Attributes:
        out: folder of the features.
        manifest: contents of the folder.
        num_written: parts made this time; the others were there.
    """

    out: RunDir
    manifest: Manifest
    num_written: int


def extract(
    ref: EncoderRef,
    source: Source,
    out: RunDir,
    spec: ExtractSpec,
    *,
    phase: str = "features",
    progress: Progress | None = None,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
) -> Extracted:
    """Write an encoder's features of a dataset; parts that exist are not made again.

    Where this process drives a Ray cluster, Ray Data spreads the parts over its devices. Without
    Ray, and inside a Ray task, which has its share of the cluster already and would wait for
    itself, the work is done here. This process writes the files: no other need see `out`.

    Args:
        ref: the encoder; every node must see its bundle.
        source: the pictures; every node must see them.
        out: folder of the features; new, or with parts of the same extraction.
        spec: views and features to keep.
        phase: name of the work in `progress`.
        progress: called with the number of pictures done, of those that were missing.
        device: `cpu`, `cuda`, …; `auto` takes the GPUs where there are any.
        batch_size: views encoded at once.

    Raises:
        RunConflictError: `out` holds another extraction; what differs is named.
        ConfigError: the encoder does not have what is asked for.
        DataError: a picture cannot be decoded.
        StorageError: `out` cannot be written, or holds a damaged part.
    """
    extraction = describe(ref, source, spec)
    finished = read_manifest(out)
    if finished is not None:
        _check_same(out, finished.extraction, extraction)
        return Extracted(out, finished, num_written=0)
    out.create()
    there = _parts_of(out)
    for name, footer in there.items():
        _check_same(out, _extraction_of(out, name, footer), extraction)
    missing = [p for p in range(extraction.num_parts) if extraction.file_of(p) not in there]
    total = sum(len(extraction.indices_of(part)) for part in missing)
    done = 0
    tell = progress or (lambda phase, done, total: None)
    tell(phase, done, total)
    for part, data in _encoded(ref, source, extraction, missing, device, batch_size):
        out.write(extraction.file_of(part), data)
        done += len(extraction.indices_of(part))
        tell(phase, done, total)
    manifest = _manifest(out, source, extraction)
    out.write(MANIFEST, manifest.model_dump_json(indent=1).encode() + b"\n")
    return Extracted(out, manifest, num_written=len(missing))


def local_device(device: str) -> str:
    """A device of this process: `auto` is its GPU, or the CPU where it has none."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def read_manifest(out: RunDir) -> Manifest | None:
    """The manifest of a finished extraction; None where there is none.

    Raises:
        StorageError: it is damaged.
    """
    if not out.exists(MANIFEST):
        return None
    try:
        return Manifest.model_validate_json(out.read(MANIFEST))
    except ValidationError as error:
        raise StorageError(
            f"{out}/{MANIFEST} is damaged: {str(error).splitlines()[0]}",
            hint="delete the folder and extract again",
        ) from None


def read_columns(out: RunDir, manifest: Manifest, columns: Sequence[str]) -> pa.Table:
    """Columns of all parts together, in the order of the pictures."""
    with storage_errors(out.uri):
        return pa.concat_tables(
            pq.read_table(out.path(part.file), columns=list(columns), filesystem=out.filesystem)
            for part in manifest.parts
        )


def _encoded(
    ref: EncoderRef,
    source: Source,
    extraction: Extraction,
    parts: list[int],
    device: str,
    batch_size: int,
) -> Iterator[tuple[int, bytes]]:
    """The parts' files, as they are ready."""
    if not parts:
        return
    import ray

    if ray.is_initialized() and ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        yield from _on_cluster(ref, source, extraction, parts, device, batch_size)
        return
    device = local_device(device)
    encode = PartEncoder(
        ref,
        source,
        extraction,
        device=device,
        batch_size=batch_size,
        num_threads=torch.get_num_threads(),
    )
    for part in parts:
        yield part, encode(part)


def _on_cluster(
    ref: EncoderRef,
    source: Source,
    extraction: Extraction,
    parts: list[int],
    device: str,
    batch_size: int,
) -> Iterator[tuple[int, bytes]]:
    import ray.data

    pool = _pool(use_gpus=device != "cpu")
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_arrow([pa.table({"part": [part]}) for part in parts]).map_batches(
            _Worker,
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(pool.num_copies, len(parts))),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            fn_constructor_args=(ref, source, extraction),
            fn_constructor_kwargs={
                "device": "cuda" if pool.num_gpus else "cpu",
                "batch_size": batch_size,
                "num_threads": max(1, pool.num_cpus),
            },
        )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in table.to_pylist():
            if row["error"] is not None:
                raise pickle.loads(row["error"])
            yield row["part"], row["data"]


class _Worker:
    """A `PartEncoder` in an actor of Ray Data, from tables of numbers to tables of files."""

    def __init__(self, *args: Any, num_threads: int, **kwargs: Any) -> None:
        torch.set_num_threads(num_threads)
        self._encode = PartEncoder(*args, num_threads=num_threads, **kwargs)

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        for part in parts["part"].to_pylist():
            row: dict[str, Any] = {"part": part, "data": None, "error": None}
            try:
                row["data"] = self._encode(part)
            except MimrayError as error:  # told to the user as it is, not as a failed task
                row["error"] = pickle.dumps(error)
            yield pa.Table.from_pylist([row], schema=_ENCODED)


_ENCODED = pa.schema([("part", pa.int64()), ("data", pa.large_binary()), ("error", pa.binary())])


class _Pool(NamedTuple):
    """Copies of the encoder, and the resources of each."""

    num_copies: int
    num_cpus: int
    num_gpus: int


def _pool(*, use_gpus: bool) -> _Pool:
    """One copy of the encoder a GPU; without GPUs, as many as the CPUs feed."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpus = [node for node in nodes if node.get("GPU")] if use_gpus else []
    if with_gpus:
        num_gpus = sum(int(node["GPU"]) for node in with_gpus)
        cpus_per_gpu = min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus)
        return _Pool(num_gpus, min(cpus_per_gpu, _MAX_CPUS_PER_GPU), 1)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU")]
    if not cpus:
        return _Pool(1, 0, 0)
    # Small copies on small machines, so that one is at work even where another job has a CPU.
    per_copy = max(1, min(_MAX_CPUS_PER_COPY, min(cpus) // 4))
    return _Pool(sum(count // per_copy for count in cpus), per_copy, 0)


def _parts_of(out: RunDir) -> dict[str, pq.FileMetaData]:
    """Footers of the parts in a folder, by name, in the order of the pictures."""
    with storage_errors(out.uri):
        found = out.filesystem.get_file_info(pafs.FileSelector(out.root))
    names = sorted(f.base_name for f in found if f.base_name.startswith("part-"))
    footers = {}
    for name in names:
        try:
            with storage_errors(out.uri):
                footers[name] = pq.read_metadata(out.path(name), filesystem=out.filesystem)
        except pa.ArrowInvalid as error:
            raise StorageError(
                f"{out}/{name} is damaged: {error}", hint="delete it and run the same command again"
            ) from None
    return footers


def _extraction_of(out: RunDir, name: str, footer: pq.FileMetaData) -> Extraction:
    text = (footer.metadata or {}).get(EXTRACTION_KEY)
    if text is None:
        raise RunConflictError(f"{out}/{name} is not a part of an extraction", hint="another OUT")
    try:
        return Extraction.model_validate_json(text)
    except ValidationError:
        raise RunConflictError(
            f"{out}/{name} was extracted by another version of mimray", hint="another OUT"
        ) from None


def _check_same(out: RunDir, there: Extraction, wanted: Extraction) -> None:
    """Refuse to mix two extractions in one folder, naming what differs."""
    if there.key == wanted.key:
        return
    old, new = _flat(there), _flat(wanted)
    differs = [f"{k}: {old.get(k)} there, {new.get(k)} asked for" for k in new if old[k] != new[k]]
    raise RunConflictError(
        f"{out} holds another extraction ({'; '.join(differs)})", hint="another OUT, or delete it"
    )


def _flat(extraction: Extraction) -> dict[str, str]:
    tree = extraction.model_dump(mode="json", exclude={"encoder"})
    return {k: str(v) for k, v in (tree.pop("spec") | tree).items()}


def _manifest(out: RunDir, source: Source, extraction: Extraction) -> Manifest:
    footers = _parts_of(out)
    assert len(footers) == extraction.num_parts, "a part was lost on the way"
    return Manifest(
        extraction=extraction,
        data=source.facts.uri,
        class_names=source.facts.class_names,
        num_rows=sum(footer.num_rows for footer in footers.values()),
        parts=tuple(
            PartFacts(file=name, num_rows=footer.num_rows, num_bytes=out.size(name) or 0)
            for name, footer in footers.items()
        ),
        skipped=tuple(
            Skipped.model_validate(item)
            for footer in footers.values()
            for item in json.loads(footer.metadata[SKIPPED_KEY])
        ),
    )
