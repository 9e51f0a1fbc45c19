"""Configurations of a Hugging Face repository: several datasets, often of the same pictures."""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from mimray.trainers.data.account import Account
from mimray.trainers.data.files import join, locate, read_bytes
from mimray.trainers.data.splits import split_of_shard, split_role
from mimray.trainers.errors import DataError

CARD_NAME = "README.md"
_FRONT = re.compile(r"---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)


def refuse_several(uri: str, shards: Sequence[str], *, has_card: bool) -> None:
    """Refuse Parquet files that belong to several configurations, rather than add these up.

    Args:
        uri: URI of the folder they lie in.
        shards: their paths relative to it.
        has_card: True if the folder holds a `README.md`, whose YAML may list configurations.

    Raises:
        DataError: naming the configurations, and the folder of each that has one.
    """
    folders = _configuration_folders(shards)
    if len(folders) > 1:
        raise _several(uri, folders, [folder or "." for folder in folders])
    configurations = _card_configurations(uri) if has_card else {}
    found = {
        name: _matched(shards, patterns)
        for name, patterns in configurations.items()
        if _matched(shards, patterns)
    }
    if len(found) > 1:
        alone = (_own_folder(name, found) for name in found)
        raise _several(uri, list(found), [folder for folder in alone if folder])


def count_merged(shards: Sequence[str], account: Account) -> None:
    """Count the folders whose Parquet files are read as one dataset, where there are several."""
    folders = sorted({path.rpartition("/")[0] for path in shards})
    for folder in folders if len(folders) > 1 else ():
        account.add("folders_merged", folder or "the folder itself")


def _several(uri: str, names: Sequence[str], folders: Sequence[str]) -> DataError:
    one = " or ".join(uri if folder == "." else join(uri, folder) for folder in folders[:4])
    return DataError(
        f"{uri} holds several configurations of a dataset: {', '.join(names)}; read together, "
        "their pictures would count several times",
        hint=f"give one of them: {one}" if one else "copy the files of one into a folder",
    )


def _configuration_folders(shards: Sequence[str]) -> list[str]:
    """Folders above files, or folders, that name a split that others name as well."""
    above: dict[str, set[str]] = defaultdict(set)
    for path in shards:
        *folders, _ = path.split("/")
        split = split_of_shard(path)
        if split is None:
            continue
        depth = next((i for i, f in enumerate(folders) if split_role(f)), len(folders))
        kept = [folder for folder in folders[:depth] if "=" not in folder]
        above[split_role(split) or split].add("/".join(kept))
    repeated = [folders for folders in above.values() if len(folders) > 1]
    return sorted(set[str]().union(*repeated))


def _card_configurations(uri: str) -> dict[str, list[str]]:
    """Patterns of the data files of each configuration in the card's YAML.

    Source: https://huggingface.co/docs/hub/datasets-manual-configuration
    """
    import yaml

    filesystem, root = locate(uri)
    text = read_bytes(filesystem, join(root, CARD_NAME)).decode("utf-8-sig", errors="replace")
    match = _FRONT.match(text.replace("\r\n", "\n"))
    if match is None:
        return {}
    try:
        # Everything is text: a date that is none must not hide what else is said.
        front = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}  # A card is prose; only what it says plainly is taken.
    listed = front.get("configs") if isinstance(front, dict) else None
    return {
        str(entry.get("config_name", "default")): list(_patterns(entry))
        for entry in (listed if isinstance(listed, list) else [])
        if isinstance(entry, dict)
    }


def _patterns(entry: dict[str, Any]) -> Iterable[str]:
    folder = "" if _is_null(entry.get("data_dir")) else str(entry["data_dir"]).strip("./")
    files = entry.get("data_files")
    if _is_null(files):
        yield f"{folder}/*" if folder else "*"
        return
    for each in files if isinstance(files, list) else [files]:
        paths = each.get("path", []) if isinstance(each, dict) else each
        for path in paths if isinstance(paths, list) else [paths]:
            yield f"{folder}/{path}" if folder else str(path).removeprefix("./")


def _is_null(value: Any) -> bool:
    return value in (None, "", "~", "null", "Null", "NULL")


def _matched(shards: Sequence[str], patterns: Sequence[str]) -> set[str]:
    patterns = [pattern.replace("**/", "*") for pattern in patterns]
    return {path for path in shards if any(fnmatch.fnmatch(path, p) for p in patterns)}


def _own_folder(name: str, found: dict[str, set[str]]) -> str:
    """The first folder that holds a configuration's files and no other's; empty without one."""
    tops = {path.partition("/")[0] if "/" in path else "" for path in found[name]}
    others = {
        path.partition("/")[0] for other, paths in found.items() if other != name for path in paths
    }
    return tops.pop() if len(tops) == 1 and not tops & others else ""
