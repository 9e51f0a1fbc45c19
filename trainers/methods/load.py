"""Loading of a trained method from a bundle."""

from __future__ import annotations

from pathlib import Path

from mimray.trainers.bundles import (
    ENCODER,
    METHOD,
    bundle_folder,
    load_state,
    read_card,
    verify_weights,
)
from mimray.trainers.config.run import parse_recipe
from mimray.trainers.errors import BundleError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import supply


def load_method(path: str | Path) -> Method:
    """Load a whole trained method, its decoder included, to reconstruct or to train further.

    Args:
        path: the folder of a run, or of a bundle that has its decoder.

    Returns:
        The method on the CPU in fp32, in evaluation mode, with the networks it needs; those of
        training alone if the bundle is a run's, which keeps them.

    Raises:
        BundleError: there is no bundle, it is damaged, or was exported without its decoder.
    """
    folder = bundle_folder(path)
    card = read_card(folder)
    if not (folder / METHOD).is_file() or not card.recipe:
        raise BundleError(
            f"{folder} holds the encoder alone", hint="use the run's own folder, or export again"
        )
    for name in (ENCODER, METHOD):
        verify_weights(folder, card, name)
    method = build_method(parse_recipe(card.recipe, f"{folder}/bundle.json"))
    load_state(method, folder / ENCODER, folder / METHOD, prefixes=(f"{method.result}.", ""))
    run = folder.parent if (folder.parent / "plan.json").is_file() else None
    for need in method.needs():
        place = folder if need.exported else run
        if need.called and place is not None and (place / need.folder).is_dir():
            supply(method, need.folder, place / need.folder)
    return method.eval()
