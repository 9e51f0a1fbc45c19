"""The encoder that a fine-tuning begins with: checked before the run, kept with it.

Only the first step needs its weights, but every start of a worker builds the method anew, so they
lie in `initial/` of the run, where all of them find them.
"""

from __future__ import annotations

from safetensors import SafetensorError
from safetensors.torch import load_file

from mimray.trainers.bundles import (
    CARD,
    ENCODER,
    BundleCard,
    bundle_place,
    fetch_bundle,
    read_card,
    verify_weights,
)
from mimray.trainers.config.method import FinetuneConfig
from mimray.trainers.config.model import EncoderConfig, ViTConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.convert.resize import for_size, resized
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.finetune import Finetune
from mimray.trainers.storage import RunDir

INITIAL = "initial"

# What two encoders may differ in and still take each other's weights.
_FREE = {"name", "init", "drop_path"}


def with_initial(recipe: Recipe) -> Recipe:
    """Hold a recipe against the bundle it begins with, and write down which one that is.

    Args:
        recipe: of any method.

    Returns:
        The recipe with `method.bundle_sha256` filled in; as it was where it begins with none.

    Raises:
        ConfigError: the encoder of the recipe is not that of the bundle.
        BundleError: there is no such bundle, it is damaged, or another one than the digest says.
    """
    method = recipe.method
    if not isinstance(method, FinetuneConfig) or not method.bundle:
        return recipe
    folder = fetch_bundle(method.bundle)
    card = read_card(folder)
    verify_weights(folder, card, ENCODER)
    if method.bundle_sha256:
        _check_digest(method.bundle, card, method.bundle_sha256)
    _check_fit(recipe, method.bundle, card)
    found = {"bundle_sha256": card.weights_sha256}
    return recipe.model_copy(update={"method": method.model_copy(update=found)})


def trainable_encoder(card: BundleCard, image_size: tuple[int, int]) -> EncoderConfig:
    """The architecture that takes a bundle's weights and trains all of them.

    Args:
        card: of the bundle.
        image_size: (height, width) of the pictures to train on.

    Raises:
        BundleError: it does not fit that size.

    Source: official MAE code, `models_vit.py`: fixed sin-cos positions become trained ones.
    """
    encoder = for_size(card.encoder, card.image_size, image_size)
    if isinstance(encoder, ViTConfig) and encoder.positions == "sincos":
        return encoder.model_copy(update={"positions": "learned"})
    return encoder


def keep_initial(recipe: Recipe, run: RunDir) -> None:
    """Copy the bundle a recipe begins with into `initial/` of its run.

    Args:
        recipe: of any method; nothing happens where it begins with none.
        run: the run's directory.

    Raises:
        BundleError: it is no longer where it was.
        StorageError: it cannot be written.
    """
    if not isinstance(recipe.method, FinetuneConfig) or not recipe.method.bundle:
        return
    folder, place = fetch_bundle(recipe.method.bundle), run / INITIAL
    place.create()
    for name in (ENCODER, CARD):  # the card last: it makes a folder a bundle
        place.upload(folder / name, name)


def initial_within(recipe: Recipe, run: RunDir) -> bool:
    """Whether the bundle a recipe begins with lies inside a run's directory, and dies with it."""
    if not isinstance(recipe.method, FinetuneConfig) or not recipe.method.bundle:
        return False
    return run.holds(bundle_place(recipe.method.bundle))


def load_initial(method: Method, run: RunDir) -> None:
    """Give a method the weights it begins with, at its own size of input.

    Args:
        method: of any kind; nothing happens to one that begins with no bundle.
        run: the run's directory, which keeps them.

    Raises:
        BundleError: they are damaged, or others than those of the plan.
    """
    if not isinstance(method, Finetune) or not method.config.bundle:
        return
    recipe = method.recipe
    folder = fetch_bundle((run / INITIAL).uri)
    card = read_card(folder)
    verify_weights(folder, card, ENCODER)
    _check_digest(str(folder), card, method.config.bundle_sha256)
    try:
        state = load_file(folder / ENCODER)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{folder / ENCODER} cannot be read: {error}") from None
    theirs = card.encoder, card.image_size
    method.begin_with(resized(state, theirs, (recipe.encoder, recipe.data.image_size)))


def _check_digest(place: str, card: BundleCard, wanted: str) -> None:
    if card.weights_sha256 != wanted:
        raise BundleError(
            f"the encoder in {place} ({card.weights_sha256[:12]}) is not the one of the plan "
            f"({wanted[:12]})",
            hint="name the same one with --set method.bundle=…",
        )


def _check_fit(recipe: Recipe, place: str, card: BundleCard) -> None:
    if card.channels != recipe.data.channels:
        raise ConfigError(
            f"method.bundle {place} reads {card.channels} channels, data.channels is "
            f"{recipe.data.channels}",
            hint=f"--set data.channels={card.channels}",
        )
    ours = recipe.encoder.model_dump(exclude=_FREE)
    theirs = trainable_encoder(card, recipe.data.image_size).model_dump(exclude=_FREE)
    wrong = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if wrong:
        listed = ", ".join(f"encoder.{key} {ours.get(key)!r}" for key in wrong)
        wanted = " ".join(f"--set encoder.{key}={theirs.get(key)}" for key in wrong)
        raise ConfigError(
            f"method.bundle {place} has another encoder than the recipe, which has {listed}",
            hint=wanted
            if isinstance(recipe.encoder, type(card.encoder))
            else f"an encoder: section for {card.encoder.name}",
        )
