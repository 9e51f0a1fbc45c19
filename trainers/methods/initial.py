"""Weights to begin with: what of a recipe follows from them, what of them fits, and loading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mimray.trainers.bundles import ENCODER, METHOD, BundleCard, read_card
from mimray.trainers.config.composition import check_size
from mimray.trainers.config.model import EncoderConfig, ViTConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import BundleError, ConfigError, MimrayError
from mimray.trainers.models import build_encoder
from mimray.trainers.models.resize import for_size, resized

if TYPE_CHECKING:
    from mimray.trainers.methods.base import Method

# Keys in which two encoders may differ and still take each other's weights.
_FREE = {"name", "init", "drop_path"}
# Of pixels, what the weights were trained on.
_PIXELS = ("mean", "std", "interpolation")
_NUM_LISTED = 3


class Beginning(NamedTuple):
    """The weights that a method begins with.

    Attributes:
        encoder: the encoder's weights that fit, at its own size.
        rest: the method's other weights that fit, by their names in the method.
        fresh: names, in the method, of what is initialised afresh.
        problems: a line, with both shapes, for each weight of the method's rest that does not fit
            where the bundle has one.
    """

    encoder: dict[str, Tensor]
    rest: dict[str, Tensor]
    fresh: tuple[str, ...]
    problems: tuple[str, ...]


def has_rest(recipe: Recipe, card: BundleCard) -> bool:
    """True if a bundle holds the head or decoder of a recipe's own method.

    What learnt from another network, such as the codes of another tokenizer, is another head.
    """
    method = recipe.method
    theirs = card.recipe.get("method", {})
    return (
        method.begins_with_rest
        and bool(card.method_sha256)
        and card.method == method.name
        and all(
            theirs.get(f"{key}_sha256") == getattr(method, f"{key}_sha256") for key in method.places
        )
    )


def begin(method: Method, folder: Path) -> None:
    """Load the weights that a method begins with.

    Args:
        method: the method, freshly built.
        folder: the folder of the bundle, verified.

    Raises:
        BundleError: the weights cannot be read, or do not fit and are not taken in part.
    """
    found = beginning(method, folder)
    method.begin_with(found.encoder, found.rest)
    if method.recipe.method.holds_start:
        method.hold_start()


def beginning(method: Method, folder: Path) -> Beginning:
    """The weights of a bundle that a method begins with.

    Args:
        method: the method, which may be on the meta device.
        folder: the folder of the bundle, verified.

    Raises:
        BundleError: the weights cannot be read, or the encoder's do not fit and are not taken in
            part.
    """
    recipe, card = method.recipe, read_card(folder)
    encoder = _encoder_weights(recipe, card, folder, method.encoder)
    names = _trained(method, ("encoder.", "averages."))
    rest: dict[str, Tensor] = {}
    problems: tuple[str, ...] = ()
    if has_rest(recipe, card):
        theirs = _as_trained(method, _read(folder / METHOD))
        theirs = resized(theirs, *_change(recipe, card))
        rest = {k: theirs[k] for k in names if k in theirs and theirs[k].shape == names[k].shape}
        problems = tuple(_misfits(theirs, {k: v.shape for k, v in names.items()}))
        if problems and not recipe.method.init_partial:
            rest = {}  # half a decoder is no decoder
    own = (f"encoder.{k}" for k in _trained(method.encoder) if k not in encoder)
    return Beginning(
        encoder, rest, fresh=(*own, *(k for k in names if k not in rest)), problems=problems
    )


def follow(recipe: Recipe, folder: Path) -> Recipe:
    """Complete a recipe by the weights it begins with, and refuse those that do not fit.

    Keys of the encoder that the recipe leaves out are those of the weights; keys that it names must
    agree. So do the mean, deviation and interpolation of the pictures. Positions that were trained
    stay so.

    Args:
        recipe: the recipe, whose method names the weights.
        folder: the folder of the bundle, verified.

    Raises:
        ConfigError: the weights are of other channels, of another architecture, or do not go with
            the method; or nothing of them fits.
        BundleError: the weights cannot be read or are not those of the bundle's card.
    """
    card, partial = read_card(folder), recipe.method.init_partial
    named = _named(recipe)
    ours, theirs = recipe.encoder, _their_encoder(recipe, card)
    if type(ours) is not type(theirs):
        raise ConfigError(
            f"{named} has another encoder than the recipe: {ours.name}, there {theirs.name}",
            hint=f"an encoder: section for {theirs.name}, or other weights",
        )
    data = recipe.data
    if card.channels != data.channels and not partial:
        raise ConfigError(
            f"{named} reads {card.channels} channels, data.channels is {data.channels}",
            hint=f"--set data.channels={card.channels}, or --partial for all but the patches",
        )
    given = ours.model_fields_set
    follows = {
        key: value
        for key, value in vars(theirs).items()
        if key not in _FREE and (key not in given or _were_trained(key, ours, theirs))
    }
    pixels = {
        key: getattr(card, key)
        for key in _PIXELS
        if key not in data.model_fields_set and card.channels == data.channels
    }
    encoder = ours.model_copy(update=follows)
    wrong = [
        key
        for key, value in vars(theirs).items()
        if key not in _FREE
        and getattr(encoder, key) != value
        and not _may_differ(key, encoder, card.encoder)
    ]
    shapes = _shapes(encoder, recipe)
    if wrong and not partial:
        raise _another_encoder(recipe, encoder, theirs, wrong, _read(folder / ENCODER), shapes)
    changes = {"encoder": encoder, "data": data.model_copy(update=pixels)}
    recipe = _checked(recipe, recipe.model_copy(update=changes), named)
    taken = _fitting(recipe, card, _read(folder / ENCODER), shapes)
    missing = [key for key in shapes if key not in taken]
    if not taken or (missing and not partial):
        raise BundleError(
            f"{named} does not fit {encoder.name}: "
            + (_listed(_misfits(_read(folder / ENCODER), shapes)) or "nothing of it"),
            hint="other weights" if not taken else "--partial takes what fits",
        )
    _check_adapted(recipe, missing, named)
    return recipe


def _check_adapted(recipe: Recipe, missing: list[str], named: str) -> None:
    """Refuse adapters on an encoder of which a part is fresh, and would stay as it is."""
    lora = recipe.lora
    if lora is None:
        return
    fixed = [k for k in missing if not any(fnmatchcase(k, pattern) for pattern in lora.trained)]
    if fixed:
        raise ConfigError(
            f"lora fixes what the encoder begins with, and {named} has nothing that fits "
            f"{_listed(tuple(fixed))}",
            hint="--set lora.trained=[…] with their names, or lora=null",
        )


def trainable_encoder(card: BundleCard, image_size: tuple[int, int]) -> EncoderConfig:
    """The architecture that takes a bundle's weights and can train all of them.

    Args:
        card: the bundle's description, bundle.json.
        image_size: (height, width) of the pictures to train on.

    Raises:
        BundleError: the encoder does not fit the size.

    Source: official MAE code, `models_vit.py`: fixed sin-cos positions become trained ones.
        Official BEiT code, `run_class_finetuning.py`: relative positions that all blocks share
        become those of each block.
    """
    encoder = for_size(card.encoder, card.image_size, image_size)
    changed = {}
    if isinstance(encoder, ViTConfig) and encoder.positions == "sincos":
        changed["positions"] = "learned"
    if _shares(encoder):
        changed["rel_pos_bias"] = "per_block"
    return encoder.model_copy(update=changed)


def described(method: Method, folder: Path, asked: Recipe) -> list[str]:
    """Sentences for people on the weights that a run begins with.

    Args:
        method: the method of the completed recipe, on the meta device.
        folder: the folder of the bundle.
        asked: the recipe before it was completed.
    """
    recipe, card = method.recipe, read_card(folder)
    found = beginning(method, folder)
    parts = sorted({key.partition(".")[0] for key in found.rest})
    origin = ", ".join(
        word for word in (card.method, f"{card.step} steps" if card.step else card.source) if word
    )
    lines = [
        f"begins with {' and '.join(['the encoder', *([', '.join(parts)] if parts else [])])} of "
        f"{getattr(recipe.method, recipe.method.init_key)} "
        f"({origin + ', ' if origin else ''}sha256 {card.weights_sha256[:12]})"
    ]
    if follows := list(_followed(asked, recipe)):
        lines.append(f"of the weights, as the recipe does not say: {', '.join(follows)}")
    if isinstance(recipe.encoder, ViTConfig) and isinstance(card.encoder, ViTConfig):
        positions = recipe.encoder.positions
        if positions == "learned" and not recipe.method.trains_positions:
            lines.append("positions are those of the weights, and trained")
        if positions != "none" and card.image_size != recipe.data.image_size:
            sizes = ("x".join(map(str, size)) for size in (card.image_size, recipe.data.image_size))
            lines.append(f"positions are interpolated from {' to '.join(sizes)} pixels")
    if found.problems and not recipe.method.init_partial:
        lines.append(
            f"its {card.method} head or decoder does not fit ({_listed(found.problems)}) and is "
            "fresh; --partial takes what fits"
        )
    if found.fresh:
        lines.append(f"fresh: {_listed(found.fresh)}")
    return lines


def _followed(asked: Recipe, recipe: Recipe) -> Iterator[str]:
    for section, before, after in (
        ("encoder", asked.encoder, recipe.encoder),
        ("data", asked.data, recipe.data),
    ):
        old = vars(before)
        for key, value in vars(after).items():
            if (section == "encoder" or key in _PIXELS) and value != old.get(key):
                yield f"{section}.{key} {value}"


def _named(recipe: Recipe) -> str:
    key = recipe.method.init_key
    return f"method.{key} {getattr(recipe.method, key)}"


def _their_encoder(recipe: Recipe, card: BundleCard) -> EncoderConfig:
    """The weights' architecture at the recipe's size, where it goes with that."""
    size = recipe.data.image_size
    if recipe.encoder.stride != card.encoder.stride:
        return card.encoder  # refused for its stride, or taken in part
    if recipe.method.trains_positions:
        return trainable_encoder(card, size)
    return for_size(card.encoder, card.image_size, size)


def _were_trained(key: str, ours: EncoderConfig, theirs: EncoderConfig) -> bool:
    """True of positions that the recipe would compute and the weights hold."""
    return (
        key == "positions"
        and isinstance(ours, ViTConfig)
        and isinstance(theirs, ViTConfig)
        and (ours.positions, theirs.positions) == ("sincos", "learned")
    )


def _may_differ(key: str, ours: EncoderConfig, theirs: EncoderConfig) -> bool:
    """True of positions that are trained from fixed ones on, and of relative ones.

    Those that all blocks share may stay so, or become those of each block.
    """
    value = getattr(ours, key)
    if key == "rel_pos_bias":
        return _shares(theirs) and value in ("shared", "per_block")
    return key == "positions" and value == "learned" and getattr(theirs, key) == "sincos"


def _shares(encoder: EncoderConfig) -> bool:
    """True if one table of relative positions serves all blocks."""
    return isinstance(encoder, ViTConfig) and encoder.rel_pos_bias == "shared"


def _another_encoder(
    recipe: Recipe,
    ours: EncoderConfig,
    theirs: EncoderConfig,
    wrong: list[str],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
) -> ConfigError:
    keys = ", ".join(
        f"encoder.{k} {getattr(ours, k)!r}, there {getattr(theirs, k)!r}" for k in wrong
    )
    weights = _listed(_misfits(state, shapes))
    cure = [f"--set encoder.{k}={_word(getattr(theirs, k))}" for k in wrong]
    try:
        check_size(theirs, recipe.data.image_size)
    except ValueError:
        sides = (max(1, side // theirs.stride) * theirs.stride for side in recipe.data.image_size)
        cure.append(f"--set data.image_size={_word(tuple(sides))}")
    return ConfigError(
        f"{_named(recipe)} has another encoder than the recipe: {keys}"
        + (f"; {weights}" if weights else ""),
        hint=f"{' '.join(cure)}, or --partial for the weights that fit",
    )


def _checked(asked: Recipe, recipe: Recipe, named: str) -> Recipe:
    """The recipe, checked as a whole if something of it followed from the weights."""
    if recipe == asked:
        return asked
    try:
        return parse_recipe(recipe.model_dump())
    except MimrayError as error:
        reason = str(error.args[0]).removeprefix("recipe: ")
        raise ConfigError(f"the encoder of {named} does not go with the recipe: {reason}") from None


def _shapes(encoder: EncoderConfig, recipe: Recipe) -> dict[str, torch.Size]:
    with torch.device("meta"):
        built = build_encoder(encoder, recipe.data.image_size, recipe.data.channels)
    return {key: value.shape for key, value in built.state_dict().items()}


def _encoder_weights(
    recipe: Recipe, card: BundleCard, folder: Path, encoder: nn.Module
) -> dict[str, Tensor]:
    shapes = {key: value.shape for key, value in encoder.state_dict().items()}
    state = _read(folder / ENCODER)
    found = _fitting(recipe, card, state, shapes)
    if len(found) < len(shapes) and not recipe.method.init_partial:
        raise BundleError(f"{folder} does not fit the encoder: {_listed(_misfits(state, shapes))}")
    return found


def _fitting(
    recipe: Recipe,
    card: BundleCard,
    state: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
) -> dict[str, Tensor]:
    """An encoder's weights, at the recipe's size, whose names and shapes are wanted."""
    state = resized(state, *_change(recipe, card))
    if _shares(card.encoder) and not _shares(recipe.encoder):
        from mimray.trainers.models.rel_pos import spread_over_blocks

        assert isinstance(card.encoder, ViTConfig)
        state = spread_over_blocks(state, card.encoder.depth)
    return {key: value for key, value in state.items() if shapes.get(key) == value.shape}


def _change(
    recipe: Recipe, card: BundleCard
) -> tuple[tuple[EncoderConfig, tuple[int, int]], tuple[EncoderConfig, tuple[int, int]]]:
    return (card.encoder, card.image_size), (recipe.encoder, recipe.data.image_size)


def _trained(module: nn.Module, apart: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Trained parameters and buffers by name; what is fixed is computed, not learnt."""
    fixed = {name for name, value in module.named_parameters() if not value.requires_grad}
    return {
        name: value
        for name, value in module.state_dict().items()
        if name not in fixed and not name.startswith(apart)
    }


def _as_trained(method: Method, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A method's rest as it is trained, from its moving averages where those are its result."""
    if method.averages is None or not method.result.startswith("averages."):
        return dict(state)
    moved = {
        key.removeprefix("averages."): value
        for key, value in state.items()
        if key.startswith(tuple(f"averages.{name}." for name in method.averages.names))
    }
    return {**state, **moved}


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, torch.Size]) -> Iterator[str]:
    for key, shape in wanted.items():
        if key not in state:
            yield f"{key} is missing"
        elif state[key].shape != shape:
            yield f"{key} is {tuple(state[key].shape)}, wanted {tuple(shape)}"


def _listed(lines: Iterator[str] | tuple[str, ...]) -> str:
    found = list(lines)
    more = len(found) - _NUM_LISTED
    return ", ".join(found[:_NUM_LISTED]) + (f" and {more} more" if more > 0 else "")


def _word(value: object) -> str:
    """A value as `--set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _read(file: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from None
    return weights
