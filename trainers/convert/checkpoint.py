"""Checkpoints of other libraries, read without ever running what a pickle says."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mimray.trainers.bundles import CARD
from mimray.trainers.errors import BundleError, NoCheckpointError

# How the files of torch.save begin: a zip archive, or a bare pickle of earlier versions.
_PICKLES = (b"PK", b"\x80")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Where training scripts put the weights: MAE, BEiT, SimMIM; DeepSpeed; SlowFast; others.
_NESTED = ("model", "module", "model_state", "state_dict")
# What official scripts save beside the weights: their arguments. Both become plain data.
_SETTINGS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]


class Checkpoint(NamedTuple):
    """Contents of a checkpoint.

    Attributes:
        state: tensors by name, floating ones in fp32.
        config: `config.json` of a folder; empty for a file.
        preprocessor: `preprocessor_config.json` of a folder; empty where there is none.
        settings: all else that a file holds, such as the arguments of its training.
        sha256: hex digest of the file of weights.
    """

    file: Path
    state: dict[str, Tensor]
    config: dict[str, Any]
    preprocessor: dict[str, Any]
    settings: Mapping[str, Any]
    sha256: str


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a file of weights, or a folder of one with its `config.json`.

    Args:
        path: `.safetensors`, `.pth`, `.pyth`, `.pt` or `.bin`, or a timm or transformers folder.

    Raises:
        NoCheckpointError: nothing there, damaged, or a pickle of more than tensors and plain data.
        BundleError: the folder is a bundle.
    """
    if not path.exists():
        raise NoCheckpointError(
            f"no checkpoint at {path}", hint="a file of weights or a model's folder"
        )
    config: dict[str, Any] = {}
    preprocessor: dict[str, Any] = {}
    file = path
    if path.is_dir():
        if (path / CARD).is_file():
            raise BundleError(f"{path} is a bundle already")
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not found or not (path / "config.json").is_file():
            raise NoCheckpointError(
                f"{path} is no model's folder: it needs config.json and "
                f"{' or '.join(_WEIGHT_FILES)}",
                hint="name the file of weights itself",
            )
        file = found[0]
        config = _read_json(path / "config.json")
        if (path / "preprocessor_config.json").is_file():
            preprocessor = _read_json(path / "preprocessor_config.json")
    state, settings = _read_weights(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Checkpoint(file, state, config, preprocessor, settings, digest)


def _read_weights(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    settings: Mapping[str, Any] = {}
    if file.suffix == ".safetensors":
        try:
            loaded: Any = load_file(file)
        except (SafetensorError, OSError) as error:
            raise NoCheckpointError(f"{file} cannot be read: {error}") from None
    else:
        loaded = settings = _read_pickle(file)
        for key in _NESTED:
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
                break
    state = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
    if not state:
        raise NoCheckpointError(f"{file} holds no tensors by name")
    if all(k.startswith("module.") for k in state):  # of a data-parallel wrapper
        state = {k.removeprefix("module."): v for k, v in state.items()}
    floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    return floats, settings


def _read_pickle(file: Path) -> Mapping[str, Any]:
    with file.open("rb") as stream:
        head = stream.read(4)
    if not head.startswith(_PICKLES):
        raise NoCheckpointError(
            f"{file} is no checkpoint: neither safetensors nor a file of torch.save"
        )
    try:
        with torch.serialization.safe_globals(_SETTINGS):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise NoCheckpointError(
            f"{file} is a pickle that is not plain tensors, which may run any code; not loaded",
            hint="where you trust it, save its state dict alone, best as .safetensors",
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NoCheckpointError(f"{file} cannot be read: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise NoCheckpointError(f"{file} holds a {type(loaded).__name__}, not tensors by name")
    return loaded


def _read_json(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NoCheckpointError(f"{file} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise NoCheckpointError(f"{file} must hold an object, got {type(tree).__name__}")
    return tree
