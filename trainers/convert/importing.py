"""Imports public weights as a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from mimray.trainers.bundles import BundleCard, save_bundle, spread_layers
from mimray.trainers.config.base import Config
from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.composition import check_size
from mimray.trainers.config.data import DataConfig
from mimray.trainers.config.explain import explain
from mimray.trainers.config.model import EncoderConfig, SwinConfig
from mimray.trainers.config.names import TIMM
from mimray.trainers.config.recipes import override
from mimray.trainers.config.run import Recipe, key_owners, known_keys, parse_recipe
from mimray.trainers.convert.assign_weights import (
    Assignment,
    assign_weights,
    encoder_shapes,
    method_shapes,
)
from mimray.trainers.convert.checkpoint import Checkpoint, read_checkpoint
from mimray.trainers.convert.dalle import import_dalle, is_dalle
from mimray.trainers.convert.foreign_weights import ForeignWeights
from mimray.trainers.convert.from_timm import download_timm, from_timm
from mimray.trainers.convert.from_transformers import from_transformers
from mimray.trainers.convert.official import from_official
from mimray.trainers.convert.shapes import encoder_section, method_section
from mimray.trainers.errors import BundleError, ConfigError
from mimray.trainers.models import build_encoder
from mimray.trainers.models.resize import for_size, resized

# What BEiT shows its tokenizer beside pictures of 224 pixels.
DALLE_SIZE = (112, 112)
# Networks compute them themselves.
_BUFFERS = (
    "relative_position_index",
    "attn_mask",
    "relative_coords_table",
    ".periods",
    "freqs_cos",
    "freqs_sin",
    ".bias_mask",
)
# What is put on an encoder, and is no part of one.
_HEADS = (
    "head.",
    "head_dist.",
    "fc_norm.",
    "classifier.",
    "pooler.",
    "embeddings.mask_token",
    "mask_token",
    "lm_head.",
    "attn_pool.",
    "local_cls_norm.",
)
_NUM_LISTED = 20

_Kind = TypeVar("_Kind", bound=Config)


class Imported(NamedTuple):
    """Outcome of an import.

    Attributes:
        card: card of the bundle.
        complete: True if the bundle holds the whole method, to load and train on.
        left_out: parameters of the checkpoint that are not in the bundle.
        initialised: parameters of the bundle that were not in the checkpoint.
        notes: sentences for people.
    """

    card: BundleCard
    complete: bool
    left_out: tuple[str, ...]
    initialised: tuple[str, ...]
    notes: tuple[str, ...]


class _Input(Config):
    """The section of a recipe that is known before the encoder is."""

    data: DataConfig


class _Model(_Input):
    """The sections of a recipe that every encoder has."""

    encoder: EncoderConfig


def import_weights(
    source: str,
    out: Path,
    *,
    architecture: str | None = None,
    image_size: tuple[int, int] | None = None,
    overrides: Sequence[str] = (),
    partial: bool = False,
    name: str = "",
    license: str = "",
    command: str = "",
) -> Imported:
    """Turn a checkpoint of another library into a bundle.

    Known are the official checkpoints of MAE, BEiT, SimMIM, MaskFeat, DINOv2, DINOv3 and EVA-02;
    timm's vit, beit, eva and swin; transformers' vit_mae, beit, swin, vit, dinov2 (with registers
    or without), dinov3_vit and siglip; the encoder of DALL-E's tokenizer. Where the weights hold
    the method's head, so does the bundle.

    Args:
        source: a file, a folder, or `timm:NAME` for what timm fetches itself.
        out: the bundle's folder.
        architecture: timm's name of the model, for a bare file of its weights.
        image_size: (height, width) wanted, pixels; by default the weights' own.
        overrides: `a.b=c` for what the weights do not show, as in a recipe; they speak of the
            weights as they are.
        partial: keep what fits, where keys are missing, unexpected or of another shape. Missing
            parts of the encoder are initialised afresh; an incomplete head is left out.
        name: name of the encoder; that of the source by default.
        license: licence of the weights, as in SPDX; what the source tells by default.
        command: command line, for the card.

    Raises:
        BundleError: no checkpoint, not plain tensors, no model of ours, or keys that do not fit.
        ConfigError: an override that is not allowed.
        StorageError: `out` cannot be written.
    """
    if not source.startswith(TIMM) and not architecture:
        checkpoint = read_checkpoint(Path(source).expanduser())
        if is_dalle(checkpoint.state):
            return _tokenizer(checkpoint, out, image_size, name or _name_of(source), command)
    found, origin = _read(source, architecture)
    license = license or found.license
    if license:
        found.notes.append(f"the weights are under the licence {license}")
    tree = _recipe_sections(found, overrides)
    model = _model(found, tree, source)
    encoder, method = _assign(found, model, tree.get("method", {}))
    if not partial:
        _check_assigned(model, encoder.problems + (method.problems if method else ()), source)

    size = model.data.image_size
    wanted = image_size or size
    target = _Model(
        encoder=for_size(model.encoder, size, wanted),
        data=model.data.model_copy(update={"image_size": wanted}),
    )
    change = (model.encoder, size), (target.encoder, wanted)
    state = resized(_completed(encoder, model), *change)
    rest = resized(method.kept, *change) if method and not method.missing else {}
    recipe = _recipe(target, found.method, tree["method"], origin, command) if rest else None
    card = BundleCard(
        name=name or _name_of(source),
        encoder=target.encoder,
        image_size=wanted,
        channels=target.data.channels,
        mean=target.data.mean,
        std=target.data.std,
        interpolation=target.data.interpolation,
        pooling=found.pooling,
        layers=spread_layers(target.encoder.num_layers),
        method=tree.get("method", {}).get("name", ""),
        created_by=command,
        source=origin,
        recipe=recipe.model_dump(mode="json") if recipe else {},
        license=license,
    )
    if recipe and isinstance(recipe.method, BEiTConfig):
        found.notes.append("its tokenizer is not in the checkpoint; head and codes fit no other")
    if wanted != size:
        found.notes.append(_resizing(model, target))
    return Imported(
        card=save_bundle(out, card, state, rest),
        complete=bool(rest),
        left_out=tuple(k for k in found.encoder if _is_head(k))
        + encoder.left_out
        + (method.left_out if rest and method else tuple(found.method)),
        initialised=encoder.missing,
        notes=tuple(found.notes),
    )


def _tokenizer(
    checkpoint: Checkpoint, out: Path, image_size: tuple[int, int] | None, name: str, command: str
) -> Imported:
    card = import_dalle(
        checkpoint,
        out,
        image_size=image_size or DALLE_SIZE,
        name=name,
        origin=f"{checkpoint.file.name} sha256:{checkpoint.sha256}",
        command=command,
    )
    note = "a tokenizer without its decoder: BEiT can learn from it, and its codes are not drawn"
    return Imported(card, complete=True, left_out=(), initialised=(), notes=(note,))


def _read(source: str, architecture: str | None) -> tuple[ForeignWeights, str]:
    """Read a checkpoint: its contents and its origin."""
    if source.startswith(TIMM):
        return download_timm(source.removeprefix(TIMM)), source
    path = Path(source).expanduser()
    checkpoint = read_checkpoint(path)
    state, config = checkpoint.state, checkpoint.config
    if architecture:
        found = from_timm(state, architecture)
    elif "model_type" in config:
        found = from_transformers(state, config, checkpoint.preprocessor)
    elif "architecture" in config:
        found = from_timm(state, f"local-dir:{path}")
    elif config:
        raise BundleError(
            f"{path / 'config.json'} is neither timm's nor transformers'",
            hint="name the file of weights itself",
        )
    else:
        found = from_official(state, checkpoint.settings)
    return found, f"{checkpoint.file.name} sha256:{checkpoint.sha256}"


def _name_of(source: str) -> str:
    if source.startswith(TIMM):
        return source.removeprefix(TIMM)
    path = Path(source)
    return path.name if path.is_dir() else path.stem


def _recipe_sections(found: ForeignWeights, overrides: Sequence[str]) -> dict[str, Any]:
    """Sections of a recipe, as far as the source and the person tell them."""
    data = found.tree.get("data", {})
    # A library's mean and deviation are of three channels, whatever a model has.
    known = {k: v for k, v in data.items() if k not in ("mean", "std") or len(v) == found.channels}
    if "image_size" in known:
        known["image_size"] = _whole_patches(found, known["image_size"])
    tree: dict[str, Any] = (
        {"encoder": {}} | found.tree | {"data": known | {"channels": found.channels}}
    )
    sections = ["encoder", "data"] + (["method"] if found.method else [])
    for assignment in overrides:
        if assignment.partition(".")[0] not in sections:
            raise ConfigError(
                f"--set {assignment} says nothing of these weights",
                hint=f"sections are {', '.join(sections)}",
            )
    return override(tree, overrides)


def _whole_patches(found: ForeignWeights, size: Any) -> Any:
    """The source's size without the rest that no patch covers, such as SigLIP's 384 of 14s."""
    if any(key.startswith("layers.") for key in found.encoder):
        return size  # the stages of a swin
    side = found.encoder["patch_embed.proj.weight"].shape[2]
    height, width = (size, size) if isinstance(size, int) else size
    covered = height // side * side, width // side * side
    if covered != (height, width) and min(covered):
        found.notes.append(
            f"pictures are of {covered[0]}x{covered[1]} pixels: the source takes {height}x{width}, "
            f"of which patches of {side} cover no more"
        )
        return covered
    return size


def _model(found: ForeignWeights, tree: Mapping[str, Any], source: str) -> _Model:
    """The encoder and the input that the weights were made for."""
    data = _checked(_Input, {"data": tree["data"]}, source).data
    size = data.image_size if "image_size" in tree["data"] else None
    encoder, size = encoder_section(found.encoder, tree["encoder"], size)
    data = data.model_copy(update={"image_size": size})
    model = _checked(_Model, {"encoder": encoder, "data": data}, source)
    try:
        check_size(model.encoder, size)
    except ValueError as error:
        raise BundleError(str(error), hint="--set data.image_size=[H,W]") from None
    return model


def _checked(kind: type[_Kind], tree: Mapping[str, Any], source: str) -> _Kind:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise explain(error, tree, source, keys=known_keys(), owners=key_owners()) from None


def _is_head(key: str) -> bool:
    return key.startswith(_HEADS)


def _assign(
    found: ForeignWeights, model: _Model, trained_by: Mapping[str, Any]
) -> tuple[Assignment, Assignment | None]:
    """Assign the weights to the encoder and, where they hold more, to the method."""
    weights = {
        k: v for k, v in found.encoder.items() if not _is_head(k) and not k.endswith(_BUFFERS)
    }
    size = model.data.image_size
    encoder = assign_weights(weights, encoder_shapes(model.encoder, size, model.data.channels))
    if not found.method:
        return encoder, None
    recipe = _recipe(model, found.method, trained_by)
    return encoder, assign_weights(found.method, method_shapes(recipe))


def _check_assigned(model: _Model, problems: Sequence[str], source: str) -> None:
    if problems:
        more = len(problems) - _NUM_LISTED
        raise BundleError(
            f"{source} does not fit {model.encoder.name}: {', '.join(problems[:_NUM_LISTED])}"
            + (f" and {more} more" if more > 0 else ""),
            hint="--partial keeps what fits",
        )


def _completed(encoder: Assignment, model: _Model) -> dict[str, Tensor]:
    """An encoder's whole state; what is missing is initialised afresh, always alike."""
    if not encoder.missing:
        return encoder.kept
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = build_encoder(model.encoder, model.data.image_size, model.data.channels)
    return fresh.state_dict() | encoder.kept


def _recipe(
    model: _Model,
    weights: Mapping[str, Tensor],
    trained_by: Mapping[str, Any],
    origin: str = "",
    command: str = "",
) -> Recipe:
    """A recipe that the method can be made from; how it was trained is not known."""
    about = {
        "summary": "Imported weights; `optim` stands in for what they were trained by.",
        "command": command,
        "source": origin,
    }
    tree = {
        "about": about,
        "encoder": model.encoder.model_dump(),
        "method": method_section(weights, trained_by, model.encoder, model.data),
        "data": model.data.model_dump(),
        "optim": {"epochs": 1},
    }
    return parse_recipe(tree, origin or "import")


def _resizing(old: _Model, new: _Model) -> str:
    sizes = ["x".join(map(str, model.data.image_size)) for model in (old, new)]
    line = f"positions interpolated from {sizes[0]} to {sizes[1]} pixels"
    if isinstance(old.encoder, SwinConfig) and isinstance(new.encoder, SwinConfig):
        windows = old.encoder.window_size, new.encoder.window_size
        if windows[0] != windows[1]:
            line += f", windows from {windows[0]} to {windows[1]} tokens"
    return line
