"""The frozen encoder as files: `encoder.safetensors` and `bundle.json`; no pickle, ever.

A bundle knows no method. It carries the recipe it was trained by, and beside the encoder the
rest of the method's weights (`method.safetensors`) and the networks that the method needs beside
it (folders that are bundles themselves) where there are any, all opaque here.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mimray.trainers.config.base import Config
from mimray.trainers.config.model import EncoderConfig
from mimray.trainers.errors import BundleError
from mimray.trainers.models import build_encoder
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.storage import RunDir, storage_errors
from mimray.trainers.types import Features

CARD = "bundle.json"
ENCODER = "encoder.safetensors"
METHOD = "method.safetensors"


class BundleCard(Config):
    """Everything needed to use an encoder, and where it came from.

    Attributes:
        image_size: (height, width) of the input it was trained at, pixels.
        mean: a value a channel, of pixels in [0, 1].
        layers: layers worth asking for, evenly spread over the depth.
        source: where imported weights came from, with the digest of their file.
        scores: headline figures by task, each with its command and data.
    """

    format: Literal[1] = 1
    name: str
    encoder: EncoderConfig
    image_size: tuple[int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    pooling: Literal["mean", "cls"] = "mean"
    layers: tuple[int, ...] = ()
    method: str = ""
    step: int = 0
    samples: int = 0
    plan_hash: str = ""
    data_fingerprint: str = ""
    weights_sha256: str = ""
    method_sha256: str = ""
    created_by: str = ""
    source: str = ""
    recipe: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Any] = Field(default_factory=dict)


class FrozenEncoder(torch.nn.Module):
    """An encoder in evaluation mode that cannot be trained, with its card.

    Calling it gives `Features`; `features(images, layers, norm)` gives maps.
    """

    def __init__(self, encoder: Encoder, card: BundleCard) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.card = card
        self.depth, self.stride = encoder.depth, encoder.stride
        self.strides, self.widths = encoder.strides, encoder.widths

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stays in evaluation mode: frozen features are deterministic."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of normalised pictures, float [B, C, H, W]."""
        features: Features = self.encoder(images)
        if self.card.pooling == "cls":
            return features._replace(pooled=features.prefix[:, 0])
        return features

    @torch.no_grad()
    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Maps [B, D, h, w] after the given layers (the card's by default)."""
        return self.encoder.features(images, layers or self.card.layers, norm)


def spread_layers(depth: int, count: int = 4) -> tuple[int, ...]:
    """Evenly spaced layers ending at the last, e.g. (2, 5, 8, 11) of 12."""
    count = min(count, depth)
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))


def save_bundle(
    folder: Path,
    card: BundleCard,
    encoder: dict[str, Tensor],
    method: dict[str, Tensor] | None = None,
    networks: Mapping[str, Path] | None = None,
) -> BundleCard:
    """Write a bundle; it is whole or not there.

    Args:
        folder: where to; replaced if it is a bundle already.
        card: its description; the checksums are filled in.
        encoder: the encoder's state, fp32, on the host.
        method: the rest of the method's state, to reconstruct or train on with.
        networks: folders of bundles to carry along, by the names they get; those that the method
            needs beside it.

    Returns:
        The card as written.

    Raises:
        BundleError: `folder` holds something else.
        StorageError: it cannot be written.
    """
    if folder.exists() and not (folder / CARD).is_file() and any(folder.iterdir()):
        raise BundleError(f"{folder} exists and is not a bundle", hint="choose another place")
    with storage_errors(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write_tensors(aside / ENCODER, encoder)
            if method:
                _write_tensors(aside / METHOD, method)
            digests = {"weights_sha256": _sha256(aside / ENCODER)}
            if method:
                digests["method_sha256"] = _sha256(aside / METHOD)
            for name, network in (networks or {}).items():
                shutil.copytree(network, aside / name)
            card = card.model_copy(update=digests)
            (aside / CARD).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")
            aside.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return card


def read_card(path: str | Path) -> BundleCard:
    """The card of a bundle, or of the bundle of a run.

    Raises:
        BundleError: there is none, or it is not one of ours.
    """
    folder = bundle_folder(path)
    try:
        tree = json.loads((folder / CARD).read_text(encoding="utf-8"))
        return BundleCard.model_validate(tree)
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise BundleError(f"{folder / CARD} cannot be read: {first}") from None


def load_bundle(path: str | Path, *, verify: bool = True) -> FrozenEncoder:
    """Load a frozen encoder.

    Args:
        path: a bundle's folder, or a run's folder that holds one.
        verify: hold the weights against the card's checksum first.

    Returns:
        The encoder on the CPU in fp32, in evaluation mode, with its card.

    Raises:
        BundleError: no bundle there, weights damaged, or keys that do not fit the card.
    """
    folder = bundle_folder(path)
    card = read_card(folder)
    if verify:
        verify_weights(folder, card, ENCODER)
    encoder = build_encoder(card.encoder, card.image_size, card.channels)
    load_state(encoder, folder / ENCODER)
    return FrozenEncoder(encoder, card)


def verify_weights(folder: Path, card: BundleCard, name: str) -> None:
    """Hold a file of a bundle against its checksum.

    Args:
        folder: the bundle's.
        card: its card.
        name: `ENCODER` or `METHOD`.

    Raises:
        BundleError: the file is missing or damaged.
    """
    file = folder / name
    if not file.is_file():
        raise BundleError(f"{folder} has no {name}", hint="export the run again")
    wanted = {ENCODER: card.weights_sha256, METHOD: card.method_sha256}[name]
    if _sha256(file) != wanted:
        raise BundleError(
            f"{file} does not match its checksum in {CARD}", hint="export the run again"
        )


def load_state(module: torch.nn.Module, *files: Path, prefixes: tuple[str, ...] = ("",)) -> None:
    """Load safetensors into a module, every key and shape accounted for.

    Args:
        module: whose state it is.
        files: one or more files that hold it together.
        prefixes: put before the keys of each file.

    Raises:
        BundleError: a file is damaged, or keys or shapes differ; they are listed.
    """
    state: dict[str, Tensor] = {}
    for file, prefix in zip(files, prefixes, strict=True):
        try:
            state |= {prefix + key: value for key, value in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{file} cannot be read: {error}") from None
    wanted = module.state_dict()
    wrong = sorted(
        [f"missing {k}" for k in wanted.keys() - state.keys()]
        + [f"unexpected {k}" for k in state.keys() - wanted.keys()]
        + [
            f"{k} is {tuple(state[k].shape)}, wanted {tuple(wanted[k].shape)}"
            for k in wanted.keys() & state.keys()
            if state[k].shape != wanted[k].shape
        ]
    )
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise BundleError(f"{files[0].parent} does not fit its architecture: {shown}")
    module.load_state_dict(state)


def bundle_folder(path: str | Path) -> Path:
    """The folder that holds the card: the path itself, or `bundle/` inside a run."""
    path = Path(path).expanduser()
    for folder in (path, path / "bundle"):
        if (folder / CARD).is_file():
            return folder
    if not path.exists():
        raise BundleError(f"no bundle at {path}", hint="a run's or a bundle's folder")
    raise BundleError(
        f"{path} is neither a bundle nor a run that has exported one",
        hint=f"`mimray export {path}` makes one from the newest checkpoint of a run",
    )


def bundle_place(path: str) -> RunDir:
    """The directory of a bundle: the path or URI itself, or `bundle/` inside a run.

    Raises:
        BundleError: there is none.
    """
    if "://" not in path:
        return RunDir(str(bundle_folder(path)))
    place = RunDir(path)
    for folder in (place, place / "bundle"):
        if folder.exists(CARD):
            return folder
    raise BundleError(
        f"no bundle at {path}", hint=f"`mimray export {path}` makes one from a run's checkpoint"
    )


def fetch_bundle(path: str) -> Path:
    """A bundle's folder on this machine; a remote one is copied until the process ends.

    Args:
        path: path or URI of a bundle, or of a run that has one.

    Raises:
        BundleError: there is none.
    """
    place = bundle_place(path)
    if place.local is not None:
        return place.local
    scratch = Path(tempfile.mkdtemp(prefix="mimray-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    place.download(scratch)
    return scratch


def _write_tensors(file: Path, state: dict[str, Tensor]) -> None:
    # Not save_file: its errors do not say that a disk is full.
    file.write_bytes(save({name: value.contiguous() for name, value in state.items()}))


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
