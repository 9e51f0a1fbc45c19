"""`dataset.json`: the file that makes a folder of shards a complete, ingested dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs as pafs

from mimray.trainers.data.files import join, read_bytes
from mimray.trainers.errors import DataError

MANIFEST_NAME = "dataset.json"
REJECTED_NAME = "rejected.jsonl"
SPLITS_NAME = "splits.json"
UNFINISHED_NAME = "unfinished.json"
FORMAT = "mimray-dataset"
_SPLITS_FORMAT, _UNFINISHED_FORMAT = "mimray-splits", "mimray-unfinished"
VERSION = 1

# In the schema metadata of every shard that ingest writes.
FORMAT_KEY = b"mimray_format"
CLASS_NAMES_KEY = b"class_names"

_SHARD_NAME = re.compile(r"shard-\d{5,}\.parquet")
_RUN_NAME = re.compile(r"rows-\d{5,}\.arrow")


def shard_name(number: int) -> str:
    """File name of a shard, by its number."""
    return f"shard-{number:05d}.parquet"


def is_shard_name(name: str) -> bool:
    """True if a file has the name of a shard of ours."""
    return _SHARD_NAME.fullmatch(name) is not None


def run_name(number: int) -> str:
    """File name of sorted rows that lie in the folder while a dataset is written."""
    return f"rows-{number:05d}.arrow"


def is_run_name(name: str) -> bool:
    """True if a file has the name of such sorted rows."""
    return _RUN_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardFacts:
    """One shard: its file name, its rows, its size in bytes."""

    file: str
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class Manifest:
    """Contents of an ingested dataset; nothing of where and when it was made.

    Attributes:
        num_samples: pictures in it.
        labelled: True if pictures have labels.
        class_names: names of the classes, by label; empty when unlabelled or unnamed.
        fingerprint: sha256 over every picture and label in order, and the class names.
        image_bytes: size of the encoded pictures together.
        short_side_px: the bound that pictures were shrunk to; None keeps their size.
        num_reencoded: pictures whose stored bytes differ from the source's.
        account: what was passed over, merged, shortened or reinterpreted, as `Account.to_json`.
        rejected: pictures left out, counted by reason.
        shards: shards, in reading order.
        permuted: True if rows lie in random order, as ingest writes them; datasets of earlier
            versions lie in the order of their paths.
    """

    num_samples: int
    labelled: bool
    class_names: tuple[str, ...]
    fingerprint: str
    image_bytes: int
    short_side_px: int | None
    num_reencoded: int
    account: tuple[dict[str, Any], ...]
    rejected: dict[str, int]
    shards: tuple[ShardFacts, ...]
    permuted: bool = False

    def to_json(self) -> str:
        """The manifest as JSON text; equal manifests give equal text."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"


def splits_json(names: Iterable[str]) -> str:
    """`splits.json`, which lies above the folders of splits that were written together."""
    return json.dumps({"format": _SPLITS_FORMAT, "splits": list(names)}, indent=1) + "\n"


def read_splits(filesystem: pafs.FileSystem, folder: str) -> tuple[str, ...]:
    """The splits that a folder's `splits.json` names; none where there is none of ours."""
    return _named_splits(filesystem, join(folder, SPLITS_NAME), _SPLITS_FORMAT) or ()


def unfinished_json(names: Iterable[str]) -> str:
    """`unfinished.json`, which lies in a folder while a dataset is written into it in place."""
    return json.dumps({"format": _UNFINISHED_FORMAT, "splits": list(names)}, indent=1) + "\n"


def read_unfinished(filesystem: pafs.FileSystem, folder: str) -> tuple[str, ...] | None:
    """The splits that an unfinished dataset has folders of; None where there is no such dataset."""
    return _named_splits(filesystem, join(folder, UNFINISHED_NAME), _UNFINISHED_FORMAT)


def _named_splits(
    filesystem: pafs.FileSystem, path: str, expected_format: str
) -> tuple[str, ...] | None:
    try:
        content = json.loads(read_bytes(filesystem, path))
    except (FileNotFoundError, ValueError):
        return None
    ours = isinstance(content, dict) and content.get("format") == expected_format
    return tuple(filter(_is_folder_name, content["splits"])) if ours else None


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name


def read_manifest(filesystem: pafs.FileSystem, folder: str) -> Manifest | None:
    """Read a folder's `dataset.json`; None where there is none or it is another program's.

    Raises:
        DataError: when it is damaged or written by a newer version.
    """
    path = join(folder, MANIFEST_NAME)
    try:
        text = read_bytes(filesystem, path)
    except FileNotFoundError:
        return None
    try:
        content: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}", hint="ingest the data again") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        return None
    if (version := content.pop("version")) != VERSION:
        raise DataError(
            f"{path} has version {version}; this mimray reads version {VERSION}",
            hint="upgrade mimray, or ingest the data again",
        )
    content.pop("num_ignored", None)  # before there was an account
    content["account"] = tuple(content.get("account", ()))
    content["class_names"] = tuple(content["class_names"])
    content["shards"] = tuple(ShardFacts(**shard) for shard in content["shards"])
    return Manifest(**content)
