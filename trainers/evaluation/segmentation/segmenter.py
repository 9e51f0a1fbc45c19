"""A segmentation head on the encoder it belongs to: to train, to use, to keep as files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import Tensor, nn

from trainers.bundles import FrozenEncoder
from trainers.config.evaluation.segmentation import SegmentationConfig
from trainers.errors import DataError
from trainers.evaluation.encoders import FeatureEncoder, chosen_layers
from trainers.evaluation.geometry import Size
from trainers.evaluation.segmentation.heads import build_head
from trainers.evaluation.segmentation.inference import predict
from trainers.models.normalise import normalise

WEIGHTS, CARD = "head.safetensors", "head.json"


@dataclass(frozen=True)
class Segmenter:
    """An encoder with a trained head.

    Attributes:
        encoder: gives the maps.
        head: from maps to logits.
        class_names: by index.
        layers: whose maps the head takes.
        input_size: (height, width) of a window, pixels.
        scale: pixels of the input to one of the picture; None fits it into one window.
        overlap: least share of a window that the next one covers.
        device: of inputs and head.
    """

    encoder: FeatureEncoder
    head: nn.Module
    class_names: tuple[str, ...]
    layers: tuple[int, ...]
    input_size: Size
    scale: float | None
    overlap: float
    device: str

    def __call__(self, pictures: Sequence[Image.Image], batch_size: int = 8) -> list[np.ndarray]:
        """The class of each pixel, int64 [h, w] at each picture's own resolution.

        Args:
            pictures: upright.
            batch_size: windows encoded at once.
        """
        card = self.encoder.card
        return list(
            predict(
                [self.prepared(picture) for picture in pictures],
                self.logits,
                input_size=self.input_size,
                scale=self.scale,
                overlap=self.overlap,
                batch_size=batch_size,
                interpolation=card.interpolation,
                fill=card.mean,
            )
        )

    def prepared(self, picture: Image.Image) -> Image.Image:
        """A picture with as many channels as the encoder takes."""
        return picture.convert("L") if self.encoder.card.channels == 1 else picture

    def logits(
        self, inputs: Tensor, features: Callable[..., tuple[Tensor, ...]] | None = None
    ) -> Tensor:
        """Logits [B, K, h, w] of inputs uint8 [B, C, H, W].

        Args:
            inputs: as `View.image` gives them.
            features: gives the maps; the encoder's own by default.
        """
        card = self.encoder.card
        images = normalise(inputs.to(self.device), card.mean, card.std)
        maps = (features or self.encoder.features)(images, self.layers, norm=True)
        return self.head(maps)  # type: ignore[no-any-return]

    def files(self, config: SegmentationConfig) -> dict[str, bytes]:
        """What `load_head` reads."""
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        if config.finetune:
            assert isinstance(self.encoder, FrozenEncoder)
            state = self.encoder.encoder.state_dict()
            tensors |= {f"encoder.{name}": value for name, value in state.items()}
        card = {
            "task": "segmentation",
            "class_names": list(self.class_names),
            "encoder": self.encoder.card.name,
            "encoder_sha256": self.encoder.card.weights_sha256,
            "config": config.model_dump(mode="json")
            | {"image_size": list(self.input_size), "layers": list(self.layers)},
        }
        weights = {name: value.cpu().contiguous() for name, value in tensors.items()}
        return {WEIGHTS: save(weights), CARD: json.dumps(card, indent=2).encode()}


def build_segmenter(
    encoder: FeatureEncoder,
    config: SegmentationConfig,
    class_names: tuple[str, ...],
    input_size: Size,
    *,
    device: str,
    seed: int,
) -> Segmenter:
    """A fresh head on an encoder.

    Args:
        encoder: on the device.
        config: of the head; its `image_size` is not looked at.
        class_names: by index.
        input_size: (height, width) of a window, pixels.
        device: of the head.
        seed: of its initialisation; torch's own generator is left as it was.
    """
    layers = chosen_layers(encoder, config.layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head(
            config.head,
            widths=[encoder.widths[layer] for layer in layers],
            strides=[encoder.strides[layer] for layer in layers],
            num_classes=len(class_names),
            head_width=config.head_width,
        )
    return Segmenter(
        encoder=encoder,
        head=head.to(device),
        class_names=class_names,
        layers=layers,
        input_size=input_size,
        scale=config.scale,
        overlap=config.window_overlap,
        device=device,
    )


def load_head(folder: Path, encoder: FeatureEncoder, device: str = "cpu") -> Segmenter:
    """Put a trained head on the encoder that it was trained on.

    Args:
        folder: with `head.safetensors` and `head.json`.
        encoder: the same, in evaluation mode and on the device. A head that was trained together
            with its encoder brings that encoder's weights, which are written into this one.
        device: of the head.

    Raises:
        DataError: the head belongs to another encoder, or there is none.
    """
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text())
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} holds no {CARD}", hint="`mimray evaluate --task segmentation` writes one"
        ) from error
    if card["encoder_sha256"] != encoder.card.weights_sha256:
        raise DataError(
            f"the head in {folder} was trained on {card['encoder']}, not on {encoder.card.name}"
        )
    config = SegmentationConfig.model_validate(card["config"])
    assert config.image_size is not None
    names = tuple(card["class_names"])
    model = build_segmenter(encoder, config, names, config.image_size, device=device, seed=0)
    weights = load_file(folder / WEIGHTS, device=device)
    model.head.load_state_dict(_under("head.", weights))
    if config.finetune:
        assert isinstance(encoder, FrozenEncoder)
        encoder.encoder.load_state_dict(_under("encoder.", weights))
    model.head.eval()
    return model


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
