"""Weights by whatever name a person has for them: a bundle, a run, a registered name, a checkpoint.

Checkpoints of other libraries are imported on the way, into a folder that lasts as long as the
process; a run keeps its own copy of all that it begins with.
"""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mimray.trainers.bundles import CARD, fetch_bundle
from mimray.trainers.config.names import TIMM
from mimray.trainers.config.run import Recipe
from mimray.trainers.errors import BundleError, MissingBundleError, NoCheckpointError
from mimray.trainers.registry import Registry, registered

logger = logging.getLogger(__name__)

_NUM_LISTED = 5


def fetcher(recipe: Recipe) -> Callable[[str], Path]:
    """The function that finds the bundles that a recipe names.

    Args:
        recipe: a recipe of any method, which says whether weights are taken in part.
    """
    return functools.partial(fetch_weights, partial=recipe.method.init_partial)


def fetch_weights(reference: str, *, partial: bool = False) -> Path:
    """A bundle's folder on this machine.

    Args:
        reference: the path or URI of a bundle or a run; a file or folder that `mimray import`
            takes, or `timm:NAME`; or a registered `NAME[@ALIAS|@vN]`. Paths come before names.
        partial: keep what fits of a checkpoint of another library.

    Raises:
        MissingBundleError: there is nothing of that name.
        NoCheckpointError: a checkpoint is damaged, or a pickle of more than tensors.
        BundleError: a checkpoint is of no encoder of ours.
    """
    path = Path(reference).expanduser()
    if reference.startswith(TIMM) or (path.exists() and not _is_bundle_or_run(path)):
        return _imported(reference, partial)
    if "://" in reference or path.exists():
        return fetch_bundle(reference)
    version = registered(reference)
    if version is None:
        raise MissingBundleError(
            f"no bundle at {reference}, no checkpoint, and no model of that name is registered",
            hint="a path or URI, a name of `mimray models list`, or timm:NAME",
        )
    return Registry.open().fetch(version)


def _is_bundle_or_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (CARD, f"bundle/{CARD}", "plan.json"))


@functools.cache
def _imported(reference: str, partial: bool) -> Path:
    from mimray.trainers.convert import import_weights

    scratch = Path(tempfile.mkdtemp(prefix="mimray-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    try:
        imported = import_weights(reference, scratch / "bundle", partial=partial)
    except NoCheckpointError:
        raise  # which no option of `mimray import` cures
    except BundleError as error:
        raise BundleError(
            str(error.args[0]),
            hint=f"{error.hint + '; ' if error.hint else ''}`mimray import {reference} OUT` takes "
            "further options",
        ) from None
    for note in imported.notes:
        logger.warning("%s: %s", reference, note)
    for what, keys in (("left out", imported.left_out), ("fresh", imported.initialised)):
        if keys:
            more = f" and {len(keys) - _NUM_LISTED} more" if len(keys) > _NUM_LISTED else ""
            shown = ", ".join(keys[:_NUM_LISTED])
            logger.warning("%s: %s: %s%s", reference, what, shown, more)
    return scratch / "bundle"
