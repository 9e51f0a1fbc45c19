"""Bundles that lie elsewhere, brought to this machine."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from trainers.bundles import CARD, bundle_folder
from trainers.errors import BundleError
from trainers.storage import RunDir


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
