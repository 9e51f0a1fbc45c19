"""A trained head as files: `head.safetensors` and `head.json`; no pickle, ever."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor, nn

from mimray.trainers.bundles import BundleCard, FrozenEncoder
from mimray.trainers.config.base import Config
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import FeatureEncoder

WEIGHTS, CARD = "head.safetensors", "head.json"


def head_files(
    task: str,
    tensors: Mapping[str, Tensor],
    encoder: BundleCard,
    config: Config,
    class_names: Sequence[str],
) -> dict[str, bytes]:
    """Files of a trained head, by name.

    Args:
        task: the head's.
        tensors: the weights, by name.
        encoder: card of the encoder that the head was trained on.
        config: options from which the head can be built again, nothing left to defaults that depend
            on data.
        class_names: names of the classes, by label.
    """
    card = {
        "task": task,
        "class_names": list(class_names),
        "encoder": encoder.name,
        "encoder_sha256": encoder.weights_sha256,
        "config": config.model_dump(mode="json"),
    }
    weights = {name: value.cpu().contiguous() for name, value in tensors.items()}
    return {WEIGHTS: save(weights), CARD: json.dumps(card, indent=2).encode() + b"\n"}


def weights_of(head: nn.Module, encoder: FeatureEncoder, *, finetune: bool) -> dict[str, Tensor]:
    """The tensors that `load_weights` reads.

    Args:
        head: trained head.
        encoder: encoder that it was trained on.
        finetune: True if the encoder was trained with it, whose weights then go along.
    """
    tensors = {f"head.{name}": value for name, value in head.state_dict().items()}
    if finetune:
        assert isinstance(encoder, FrozenEncoder)
        state = encoder.encoder.state_dict()
        tensors |= {f"encoder.{name}": value for name, value in state.items()}
    return tensors


def read_card(folder: Path, task: str, encoder: FeatureEncoder) -> dict[str, Any]:
    """Read `head.json`: `class_names` and `config`.

    Args:
        folder: folder of the files.
        task: task that the head must be for.
        encoder: encoder that the head must have been trained on.

    Raises:
        DataError: there is none, or it is for another task or encoder.
    """
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {CARD}", hint=f"`mimray evaluate --task {task}` writes one"
        ) from None
    if card["task"] != task:
        raise DataError(f"the head in {folder} is for {card['task']}, not for {task}")
    if card["encoder_sha256"] != encoder.card.weights_sha256:
        raise DataError(
            f"the head in {folder} was trained on {card['encoder']}, not on {encoder.card.name}"
        )
    return card


def load_weights(folder: Path, head: nn.Module, encoder: FeatureEncoder) -> None:
    """Load a head's weights, and the encoder's where they were trained with it.

    Args:
        folder: folder of the files.
        head: head built as `head.json` says; left in evaluation mode.
        encoder: encoder of the head; its weights are overwritten where the files hold some.
    """
    weights = load_file(folder / WEIGHTS)
    head.load_state_dict(_under("head.", weights))
    head.eval()
    trained = _under("encoder.", weights)
    if trained:
        assert isinstance(encoder, FrozenEncoder)
        encoder.encoder.load_state_dict(trained)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
