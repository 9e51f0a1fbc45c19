"""The objectives, by the names recipes give them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from mimray.trainers.config.run import Recipe
    from mimray.trainers.methods.base import Method


# Heavy imports stay in the leaves: a method's file is read when a recipe names it.
METHODS = {
    "ae": "AE",
    "vae": "VAE",
    "dvae": "DVAE",
    "beit": "BEiT",
    "mae": "MAE",
    "simmim": "SimMIM",
    "maskfeat": "MaskFeat",
    "finetune": "Finetune",
}


def method_class(name: str) -> type[Method]:
    """The class of the method a recipe names; configs have checked the name already."""
    module = importlib.import_module(f"mimray.trainers.methods.{name}")
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
        The method on the CPU in fp32, in evaluation mode, with its tokenizer if it has one.

    Raises:
        BundleError: no bundle there, a damaged one, or one exported without its decoder.
    """
    from mimray.trainers.bundles import (
        ENCODER,
        METHOD,
        TOKENIZER,
        bundle_folder,
        load_state,
        read_card,
        verify_weights,
    )
    from mimray.trainers.config.run import parse_recipe
    from mimray.trainers.errors import BundleError

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
    if (folder / TOKENIZER).is_dir():
        attach_tokenizer(method, folder / TOKENIZER)
    return method.eval()


def attach_tokenizer(method: Method, path: str | Path) -> None:
    """Give a BEiT the tokenizer it learns from.

    Args:
        method: a BEiT, which neither owns nor trains it.
        path: a bundle's folder of method dvae, or the folder of a run that has one.

    Raises:
        BundleError: no tokenizer there, a damaged one, or not the one of the method's plan.
    """
    from mimray.trainers.bundles import bundle_folder
    from mimray.trainers.errors import BundleError
    from mimray.trainers.methods.beit import BEiT, Tokenizer
    from mimray.trainers.tokenizers import check_digest

    assert isinstance(method, BEiT)
    folder = bundle_folder(path)
    if method.config.tokenizer_sha256:
        check_digest(folder, method.config.tokenizer_sha256)
    tokenizer = load_method(folder)
    if not isinstance(tokenizer, Tokenizer):
        raise BundleError(f"{folder} is no tokenizer", hint="a bundle of method dvae")
    method.attach(tokenizer)
