"""Bundles: a frozen encoder as `encoder.safetensors` and `bundle.json`, without pickle.

A bundle may also hold the recipe it was trained by, the rest of the method's weights
(`method.safetensors`), and the networks that the method needs (folders that are bundles
themselves). They are opaque here: this module knows no method.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mimray.trainers.config.base import Config
from mimray.trainers.config.model import EncoderConfig, ViTConfig
from mimray.trainers.config.retired import without_retired
from mimray.trainers.errors import BundleError, MissingBundleError
from mimray.trainers.models import build_encoder
from mimray.trainers.models.encoder import Encoder
from mimray.trainers.storage import RunDir, storage_errors
from mimray.trainers.types import Features

CARD = "bundle.json"
ENCODER = "encoder.safetensors"
METHOD = "method.safetensors"


class BundleCard(Config):
    """A bundle's description, bundle.json: how to use the encoder, and its origin.

    Attributes:
        image_size: (height, width) of the input in training, pixels.
        mean: the mean of each channel, of pixels in [0, 1].
        std: the standard deviation of each channel, of pixels in [0, 1].
        layers: layers of the default feature maps, evenly spread over the depth.
        step: updates made.
        samples: pictures seen.
        source: the origin of imported weights, with the digest of their file.
        scores: headline figures by task, each with its command and data.
        adapters: rank, alpha and layers of the low-rank adapters that were trained and are merged
            into the weights; empty for none.
        held_out: the method's own figures over pictures that it was not trained on, such as the
            usage of a codebook, with these pictures' number and place.
        warnings: sentences on what is wrong with the weights.
        weights: `average` for those that `optim.ema` averaged over the training.
        license: the licence of imported weights, and of all that was trained from them or with
            them; identifiers of SPDX where there is one, several joined by ` and `.
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
    # Earlier versions read no card with a key that they do not know.
    adapters: dict[str, Any] = Field(default_factory=dict, exclude_if=lambda found: not found)
    held_out: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    weights: Literal["raw", "average"] = Field(
        default="raw",
        exclude_if=lambda weights: weights == "raw",  # cards without it keep their form
    )
    license: str = Field(default="", exclude_if=lambda found: not found)

    @property
    def for_research_only(self) -> bool:
        """True if the licence forbids a commercial service, such as CC BY-NC."""
        words = re.split(r"[^a-z]+", self.license.lower())
        return "nc" in words or "noncommercial" in "".join(words)

    @property
    def has_class_token(self) -> bool:
        """True if the encoder has a token that stands for the whole picture."""
        return isinstance(self.encoder, ViTConfig) and self.encoder.class_token

    @field_validator("recipe")
    @classmethod
    def _without_retired_keys(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = without_retired(recipe)[0]
        return kept


class FrozenEncoder(torch.nn.Module):
    """An encoder in evaluation mode, without gradients, with its card.

    Calling it returns `Features`; `features(images, layers, norm)` returns maps.
    """

    def __init__(self, encoder: Encoder, card: BundleCard) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False)
        self.card = card
        self.depth, self.stride = encoder.depth, encoder.stride
        self.strides, self.widths = encoder.strides, encoder.widths

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Keep evaluation mode, whatever the argument: frozen features are deterministic."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        """Features of normalised pictures, float [B, C, H, W], pooled as the card says."""
        features: Features = self.encoder(images)
        if self.card.pooling == "cls":
            return features._replace(pooled=features.prefix[:, 0])
        return features

    @torch.no_grad()
    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Feature maps of normalised pictures.

        Args:
            images: float [B, C, H, W], normalised.
            layers: indices of the layers; the card's by default.
            norm: True to apply the final norm to each map of the final width.

        Returns:
            Maps, float [B, D, h, w], one for each layer.
        """
        return self.encoder.features(images, layers or self.card.layers, norm)


def spread_layers(depth: int, count: int = 4) -> tuple[int, ...]:
    """Evenly spaced layers that end with the last, e.g. (2, 5, 8, 11) of 12."""
    count = min(count, depth)
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))


def save_bundle(
    folder: Path,
    card: BundleCard,
    encoder: dict[str, Tensor],
    method: dict[str, Tensor] | None = None,
    networks: Mapping[str, Path] | None = None,
) -> BundleCard:
    """Write a bundle atomically.

    Args:
        folder: the bundle's folder; replaced if it is a bundle already.
        card: the bundle's description, bundle.json; the checksums are filled in.
        encoder: the encoder's state, in fp32, on the host.
        method: the rest of the method's state, to reconstruct or to train further.
        networks: folders of bundles to include, which the method needs, by their names in the
            bundle.

    Returns:
        The card as written.

    Raises:
        BundleError: the folder exists and is no bundle.
        StorageError: the bundle cannot be written.
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
    """Read the card of a bundle, or of a run's bundle.

    Raises:
        BundleError: there is no bundle, or its card cannot be read.
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
        path: the folder of a bundle, or of a run that has one.
        verify: True to verify the weights against the card's checksum first.

    Returns:
        The encoder on the CPU in fp32, in evaluation mode, with its card.

    Raises:
        BundleError: there is no bundle, its weights are damaged, or do not fit its card.
    """
    folder = bundle_folder(path)
    card = read_card(folder)
    if verify:
        verify_weights(folder, card, ENCODER)
    encoder = build_encoder(card.encoder, card.image_size, card.channels)
    load_state(encoder, folder / ENCODER)
    return FrozenEncoder(encoder, card)


def verify_weights(folder: Path, card: BundleCard, name: str) -> None:
    """Verify a file of a bundle against its checksum.

    Args:
        folder: the bundle's folder.
        card: the bundle's description, bundle.json.
        name: the file's name, `ENCODER` or `METHOD`.

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
    """Load safetensors into a module; every key and shape must match.

    Args:
        module: the module to load into.
        files: files that together hold the module's state.
        prefixes: a prefix for the keys of each file.

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
    """The folder of a bundle: the path itself, or `bundle/` inside a run.

    Raises:
        BundleError: there is no bundle.
    """
    path = Path(path).expanduser()
    for folder in (path, path / "bundle"):
        if (folder / CARD).is_file():
            return folder
    if not path.exists():
        raise MissingBundleError(f"no bundle at {path}", hint="a run's or a bundle's folder")
    raise MissingBundleError(
        f"{path} is neither a bundle nor a run that has exported one",
        hint=f"`mimray export {path}` makes one from the newest checkpoint of a run",
    )


def bundle_place(path: str) -> RunDir:
    """The directory of a bundle: the path or URI itself, or `bundle/` inside a run.

    Raises:
        BundleError: there is no bundle.
    """
    if "://" not in path:
        return RunDir(str(bundle_folder(path)))
    place = RunDir(path)
    for folder in (place, place / "bundle"):
        if folder.exists(CARD):
            return folder
    raise MissingBundleError(
        f"no bundle at {path}", hint=f"`mimray export {path}` makes one from a run's checkpoint"
    )


def fetch_bundle(path: str) -> Path:
    """A bundle's folder on this machine; a remote one is copied until the process ends.

    Args:
        path: the path or URI of a bundle, or of a run that has one.

    Raises:
        BundleError: there is no bundle.
    """
    return _fetched(bundle_place(path))


def fetch_folder(path: str) -> Path:
    """A folder on this machine; a remote one is copied until the process ends.

    Args:
        path: the path or URI of the folder.

    Raises:
        StorageError: it cannot be read.
    """
    return _fetched(RunDir(path))


def _fetched(place: RunDir) -> Path:
    if place.local is not None:
        return place.local
    scratch = Path(tempfile.mkdtemp(prefix="mimray-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    place.download(scratch)
    return scratch


def _write_tensors(file: Path, state: dict[str, Tensor]) -> None:
    # Not `save_file`, whose errors do not say that a disk is full.
    file.write_bytes(save({name: value.contiguous() for name, value in state.items()}))


def folder_sha256(folder: Path) -> str:
    """Digest of the files in a folder, in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
