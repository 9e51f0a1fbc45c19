"""The objectives, by the names recipes give them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from trainers.config.run import Recipe
    from trainers.methods.base import Method


# Heavy imports stay in the leaves: a method's file is read when a recipe names it.
METHODS = {
    "ae": "AE",
    "vae": "VAE",
    "dvae": "DVAE",
    "beit": "BEiT",
    "mae": "MAE",
    "simmim": "SimMIM",
    "maskfeat": "MaskFeat",
}


def method_class(name: str) -> type[Method]:
    """The class of the method a recipe names; configs have checked the name already."""
    module = importlib.import_module(f"trainers.methods.{name}")
    found: type[Method] = getattr(module, METHODS[name])
    return found


def build_method(recipe: Recipe) -> Method:
    """A freshly initialised method; seed torch before for a repeatable one."""
    return method_class(recipe.method.name)(recipe)


def load_method(path: str | Path) -> Method:
    """Load a trained method, decoder and all, to reconstruct with or to train on from.

    Args:
        path: a run's folder, or a bundle's that kept its decoder.

    Returns:
        The method on the CPU in fp32, in evaluation mode.

    Raises:
        BundleError: no bundle there, a damaged one, or one exported without its decoder.
    """
    from trainers.bundles import (
        ENCODER,
        METHOD,
        bundle_folder,
        load_state,
        read_card,
        verify_weights,
    )
    from trainers.config.run import parse_recipe
    from trainers.errors import BundleError

    folder = bundle_folder(path)
    card = read_card(folder)
    if not (folder / METHOD).is_file() or not card.recipe:
        raise BundleError(
            f"{folder} holds the encoder alone", hint="use the run's own folder, or export again"
        )
    for name in (ENCODER, METHOD):
        verify_weights(folder, card, name)
    method = build_method(parse_recipe(card.recipe, f"{folder}/bundle.json"))
    load_state(method, folder / ENCODER, folder / METHOD, prefixes=("encoder.", ""))
    return method.eval()
