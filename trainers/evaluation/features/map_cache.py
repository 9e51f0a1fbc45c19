"""Feature maps of frozen encoders, computed once and kept on disk under digests of their inputs.

Heads see the same views of the same pictures epoch after epoch; the encoder, which costs most and
never changes, need not see them twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from mimray.trainers.bundles import BundleCard
from mimray.trainers.data.cache import user_cache
from mimray.trainers.evaluation.features.encoders import FeatureEncoder
from mimray.trainers.types import Features

logger = logging.getLogger(__name__)

CACHE_GIB = 16.0
# What must stay free on the disk, whatever the bound says.
SPARE_GIB = 4.0
_GIB = 2**30


class CachedEncoder:
    """An encoder whose maps are kept on disk; with the interface of the encoder.

    A file a picture holds the maps of all layers asked for, in float16, under a digest of the
    picture's pixels, the encoder's identity and what was asked. It appears by a rename, so it is
    whole or absent, and several processes may share a folder. Before the first write the files
    unread for longest make room; after that the bound is held by no longer writing, since in
    training every file is read once an epoch.

    Args:
        encoder: encoder that computes maps, in evaluation mode.
        identity: tells encoders with different weights apart.
        folder: folder of the files; one in the user's cache by default.
        cache_gib: bound of what this process writes, and of what it leaves of earlier files.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        identity: str,
        folder: Path | None = None,
        cache_gib: float = CACHE_GIB,
    ) -> None:
        self._encoder = encoder
        self._identity = identity
        self._folder = folder or user_cache("maps")
        self._most_bytes = self._left_bytes = cache_gib * _GIB
        self.card: BundleCard = encoder.card
        self.depth, self.stride = encoder.depth, encoder.stride
        self.strides, self.widths = encoder.strides, encoder.widths
        self.hits = self.misses = 0

    def __call__(self, images: Tensor) -> Features:
        """Features of normalised pictures; these are not kept."""
        return self._encoder(images)

    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Maps of layers [B, D, h, w], float32 rounded to float16; only new pictures are encoded.

        Args:
            images: normalised pictures, float [B, C, H, W].
            layers: the card's by default.
            norm: apply the final norm.
        """
        wanted = tuple(layers or self.card.layers)
        files = [self._file(picture, wanted, norm) for picture in images.cpu()]
        kept = [_read(file) for file in files]
        missing = [i for i, maps in enumerate(kept) if maps is None]
        self.hits += len(files) - len(missing)
        self.misses += len(missing)
        if missing:
            fresh = self._encoder.features(images[missing], wanted, norm)
            # Rounded whether or not they are kept: a score must not depend on a cache's state.
            # In one layout, too: a convolution adds up in another order over another.
            halves = [maps.to(torch.float16).contiguous().cpu().numpy() for maps in fresh]
            for place, index in enumerate(missing):
                kept[index] = [maps[place] for maps in halves]
                self._write(files[index], kept[index] or [])
        return tuple(
            torch.from_numpy(np.stack([maps[number] for maps in kept if maps is not None]))
            .to(images.device)
            .float()
            for number in range(len(wanted))
        )

    def _file(self, picture: Tensor, layers: tuple[int, ...], norm: bool) -> Path:
        digest = hashlib.blake2b(digest_size=20)
        asked = (self._identity, tuple(picture.shape), layers, norm)
        digest.update(repr(asked).encode())
        digest.update(np.ascontiguousarray(picture.numpy()).tobytes())
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name[2:]}.npz"

    def _write(self, file: Path, maps: list[np.ndarray]) -> None:
        if self._left_bytes == self._most_bytes:
            _trim(self._folder, self._most_bytes)
        num_bytes = sum(part.nbytes for part in maps)
        if num_bytes > self._left_bytes:
            return
        self._left_bytes -= num_bytes
        file.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(file.parent).free < SPARE_GIB * _GIB + num_bytes:
            logger.warning("%s is nearly full: no more feature maps are kept", self._folder)
            self._left_bytes = 0
            return
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as aside:
            np.savez(aside, *maps)
        os.replace(aside.name, file)


def _read(file: Path) -> list[np.ndarray] | None:
    try:
        os.utime(file)
        with np.load(file) as kept:
            return [kept[name] for name in kept.files]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        logger.warning("the cached maps %s are damaged and made again: %s", file, error)
        return None


def _trim(folder: Path, most_bytes: float) -> None:
    """Delete the files unread for longest until the rest fit."""
    found = [(file.stat().st_mtime, file.stat().st_size, file) for file in folder.glob("*/*.npz")]
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= most_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size
