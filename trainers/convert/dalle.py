"""DALL-E's tokenizer, which BEiT was trained with, as a bundle of method `dvae`.

Only its encoder: codes are all that BEiT learns from. It comes as OpenAI's own weights, saved as
plain tensors, or as the copy in transformers' FLAVA (`facebook/flava-image-codebook`).
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from mimray.trainers.bundles import BundleCard, save_bundle, spread_layers
from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.convert.assign_weights import assign_weights
from mimray.trainers.convert.checkpoint import Checkpoint
from mimray.trainers.errors import BundleError
from mimray.trainers.models import build_encoder
from mimray.trainers.models.quantizer import GumbelQuantizer

# Pixels of [0, 1] become 0.8 x + 0.1, away from the ends (`map_pixels`).
MEAN, STD = -0.125, 1.25
_BLOCK = re.compile(
    r"blocks\.group_(?P<group>\d+)(?:\.group)?\.block_(?P<block>\d+)\."
    r"(?:(?P<shortcut>id_path)|res_path(?:\.path)?\.conv_(?P<conv>\d+))\.(?P<kind>.+)"
)
_KINDS = {"w": "weight", "b": "bias"}
_LOGITS = "quantizer.to_logits"


def is_dalle(state: dict[str, Tensor]) -> bool:
    """True if these are weights of DALL-E's encoder."""
    return bool({"blocks.input.w", "blocks.input.weight"} & state.keys())


def import_dalle(
    checkpoint: Checkpoint,
    out: Path,
    *,
    image_size: tuple[int, int],
    name: str,
    origin: str,
    command: str,
) -> BundleCard:
    """Write the tokenizer's bundle.

    Args:
        checkpoint: checkpoint of DALL-E's encoder, see `is_dalle`.
        out: the bundle's folder.
        image_size: (height, width) the tokenizer is shown, pixels.
        name: name of the bundle.
        origin: origin of the weights, for the card.
        command: command line, for the card.

    Raises:
        BundleError: keys are missing, unexpected or of another shape; they are listed.
        StorageError: `out` cannot be written.
    """
    state = {_renamed(key): value for key, value in checkpoint.state.items()}
    recipe = _recipe(state, image_size, origin, command)
    assert isinstance(recipe.method, DVAEConfig)
    modules = nn.ModuleDict(
        {
            "encoder": build_encoder(recipe.encoder, image_size, recipe.data.channels),
            "quantizer": GumbelQuantizer(recipe.method, recipe.encoder.out_width),
        }
    )
    ours = modules.state_dict()
    weights = {k: v.shape for k, v in ours.items() if k.startswith(("encoder.", _LOGITS))}
    found = assign_weights(state, weights)
    if found.problems:
        raise BundleError(
            f"{checkpoint.file} does not fit DALL-E's encoder: {', '.join(found.problems[:20])}"
        )
    # Codes have no vectors here; only the decoder, which is not imported, knows theirs.
    rest = {k: torch.zeros_like(v) for k, v in ours.items() if k not in weights}
    rest |= {k: v for k, v in found.kept.items() if k.startswith(_LOGITS)}
    encoder = {
        k.removeprefix("encoder."): v for k, v in found.kept.items() if k.startswith("encoder.")
    }
    card = BundleCard(
        name=name,
        encoder=recipe.encoder,
        image_size=image_size,
        channels=recipe.data.channels,
        mean=recipe.data.mean,
        std=recipe.data.std,
        layers=spread_layers(recipe.encoder.num_layers),
        method="dvae",
        created_by=command,
        source=origin,
        recipe=recipe.model_dump(mode="json"),
    )
    return save_bundle(out, card, encoder, rest)


def _renamed(key: str) -> str:
    """Our name of a parameter of OpenAI's or FLAVA's; unknown ones keep theirs."""
    for theirs, ours in (
        ("blocks.input.", "encoder.stem."),
        ("blocks.output.conv.", _LOGITS + "."),
    ):
        if key.startswith(theirs):
            kind = key.removeprefix(theirs)
            return ours + _KINDS.get(kind, kind)
    match = _BLOCK.fullmatch(key)
    if match is None:
        return key
    part = "shortcut" if match["shortcut"] else f"convs.{int(match['conv']) - 1}"
    kind = _KINDS.get(match["kind"], match["kind"])
    return f"encoder.groups.{int(match['group']) - 1}.{int(match['block']) - 1}.{part}.{kind}"


def _recipe(
    state: dict[str, Tensor], image_size: tuple[int, int], origin: str, command: str
) -> Recipe:
    places = [
        (int(found[1]), int(found[2]))
        for key in state
        if (found := re.match(r"encoder\.groups\.(\d+)\.(\d+)\.", key))
    ]
    logits = state.get(f"{_LOGITS}.weight")
    if not places or logits is None:
        raise BundleError("these weights of DALL-E's encoder have no groups or no output")
    stem = state["encoder.stem.weight"]
    channels = stem.shape[1]
    return parse_recipe(
        {
            "about": {
                "summary": "Imported codes of DALL-E's tokenizer; it has no decoder here.",
                "command": command,
                "source": origin,
            },
            "encoder": {
                "name": "dalle",
                "width": stem.shape[0],
                "depth": 1 + max(block for _, block in places),
                "num_groups": 1 + max(group for group, _ in places),
            },
            "method": {
                "name": "dvae",
                "quantizer": "gumbel",
                "codebook_size": logits.shape[0],
                "code_dim": 1,
                "decoder_widths": [],
            },
            "data": {
                "image_size": list(image_size),
                "channels": channels,
                "mean": [MEAN] * channels,
                "std": [STD] * channels,
            },
            "optim": {"epochs": 1},
        },
        origin,
    )
