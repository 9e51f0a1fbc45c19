"""The tokenizer a recipe names: held against the recipe before a run starts, and kept with it.

A tokenizer is a bundle of method `dvae`. Only its card and checksums are looked at here;
`methods.attach_tokenizer` makes a network of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mimray.trainers.bundles import (
    CARD,
    ENCODER,
    METHOD,
    TOKENIZER,
    BundleCard,
    bundle_place,
    fetch_bundle,
    read_card,
    verify_weights,
)
from mimray.trainers.config.method import BEiTConfig, DVAEConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.storage import RunDir


def with_tokenizer(recipe: Recipe) -> Recipe:
    """Hold a recipe against the tokenizer it names, and write down which one that is.

    Args:
        recipe: of any method.

    Returns:
        The recipe with `method.tokenizer_sha256` and, where it leaves that out,
        `method.vocab_size` filled in; as it was where the method wants no tokenizer.

    Raises:
        ConfigError: it names no tokenizer, or one that does not fit.
        BundleError: what it names is no bundle, is damaged, or is no tokenizer.
    """
    method = recipe.method
    if not isinstance(method, BEiTConfig):
        return recipe
    if not method.tokenizer:
        raise ConfigError(
            "method.tokenizer names no tokenizer",
            hint="train one with `mimray pretrain dvae-tiny`, "
            "then --set method.tokenizer=runs/dvae-tiny",
        )
    folder = fetch_bundle(method.tokenizer)
    card = read_card(folder)
    if card.method != "dvae":
        raise ConfigError(
            f"method.tokenizer {method.tokenizer} is no tokenizer: its method is {card.method!r}",
            hint="`mimray pretrain dvae-tiny` trains one",
        )
    for name in (ENCODER, METHOD):
        verify_weights(folder, card, name)
    if method.tokenizer_sha256:
        check_digest(folder, method.tokenizer_sha256)
    theirs = parse_recipe(card.recipe, f"{folder / CARD}")
    assert isinstance(theirs.method, DVAEConfig)
    _check_fit(recipe, method, theirs, theirs.method.codebook_size)
    found = {"tokenizer_sha256": tokenizer_digest(card), "vocab_size": theirs.method.codebook_size}
    return recipe.model_copy(update={"method": method.model_copy(update=found)})


def keep_tokenizer(recipe: Recipe, run: RunDir) -> None:
    """Copy the tokenizer of a recipe into `tokenizer/` of its run, where every worker finds it.

    Args:
        recipe: of any method; nothing happens where it wants no tokenizer.
        run: the run's directory.

    Raises:
        BundleError: it is no longer where it was.
        StorageError: it cannot be written.
    """
    if not isinstance(recipe.method, BEiTConfig):
        return
    folder, place = fetch_bundle(recipe.method.tokenizer), run / TOKENIZER
    place.create()
    if place.local is not None and place.local.samefile(folder):
        return
    for name in (ENCODER, METHOD, CARD):  # the card last: it makes a folder a bundle
        place.upload(folder / name, name)


def tokenizer_within(recipe: Recipe, run: RunDir) -> bool:
    """Whether the tokenizer a recipe names lies inside a run's directory, and dies with it."""
    if not isinstance(recipe.method, BEiTConfig):
        return False
    return run.holds(bundle_place(recipe.method.tokenizer))


def check_digest(folder: Path, wanted: str) -> None:
    """Refuse a tokenizer that is not the one a plan was made with.

    Args:
        folder: the tokenizer's bundle.
        wanted: `method.tokenizer_sha256` of the plan.

    Raises:
        BundleError: it is another one.
    """
    found = tokenizer_digest(read_card(folder))
    if found != wanted:
        raise BundleError(
            f"the tokenizer in {folder} ({found[:12]}) is not the one of the plan ({wanted[:12]})",
            hint="name the same one with --set method.tokenizer=…",
        )


def tokenizer_digest(card: BundleCard) -> str:
    """What tells one tokenizer from another: a digest of all its weights, hex."""
    return hashlib.sha256(f"{card.weights_sha256}{card.method_sha256}".encode()).hexdigest()


def _check_fit(recipe: Recipe, method: BEiTConfig, theirs: Recipe, num_codes: int) -> None:
    data = theirs.data
    if data.channels != recipe.data.channels:
        raise ConfigError(
            f"method.tokenizer {method.tokenizer} reads {data.channels} channels, "
            f"data.channels is {recipe.data.channels}",
            hint=f"--set data.channels={data.channels}, or a tokenizer of {recipe.data.channels}",
        )
    if data.image_size != method.tokenizer_image_size:
        raise ConfigError(
            f"method.tokenizer {method.tokenizer} was trained at {_by(data.image_size)} pixels, "
            f"method.tokenizer_image_size is {_by(method.tokenizer_image_size)}",
            hint=f"--set method.tokenizer_image_size={_yaml(data.image_size)}, "
            "or train a tokenizer at the other size",
        )
    if theirs.grid != recipe.grid:
        ours_px = [side * recipe.encoder.stride for side in theirs.grid]
        theirs_px = [side * theirs.encoder.stride for side in recipe.grid]
        raise ConfigError(
            f"method.tokenizer {method.tokenizer} makes {_by(theirs.grid)} codes of "
            f"{_by(data.image_size)} pixels, the encoder {_by(recipe.grid)} tokens of "
            f"{_by(recipe.data.image_size)}",
            hint=f"--set data.image_size={_yaml(ours_px)}, "
            f"or a tokenizer trained at {_by(theirs_px)} pixels",
        )
    if "vocab_size" in method.model_fields_set and method.vocab_size != num_codes:
        raise ConfigError(
            f"method.tokenizer {method.tokenizer} has {num_codes} codes, "
            f"method.vocab_size is {method.vocab_size}",
            hint=f"--set method.vocab_size={num_codes}",
        )


def _by(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _yaml(size: Iterable[int]) -> str:
    return f"[{','.join(map(str, size))}]"
