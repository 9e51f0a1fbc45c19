"""A segmentation head on the encoder it belongs to: to train, to use, to keep as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mimray.trainers.config.evaluation.segmentation import SegmentationConfig
from mimray.trainers.data.geometry import Size
from mimray.trainers.evaluation.features.encoders import FeatureEncoder, chosen_layers
from mimray.trainers.evaluation.heads.head_files import (
    head_files,
    load_weights,
    read_card,
    weights_of,
)
from mimray.trainers.evaluation.segmentation.heads import build_head
from mimray.trainers.evaluation.segmentation.inference import predict
from mimray.trainers.models.normalise import normalise


@dataclass(frozen=True)
class Segmenter:
    """An encoder with a trained head.

    Attributes:
        encoder: source of the maps.
        head: network from maps to logits.
        class_names: names of the classes, by index.
        layers: layers whose maps the head takes.
        input_size: (height, width) of a window, pixels.
        scale: pixels of the input to one of the picture; None fits it into one window.
        overlap: least share of a window that the next one covers.
        device: device of inputs and head.
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
            inputs: inputs, as `View.image` gives them.
            features: function that gives the maps; the encoder's own by default.
        """
        card = self.encoder.card
        images = normalise(inputs.to(self.device), card.mean, card.std)
        maps = (features or self.encoder.features)(images, self.layers, norm=True)
        return self.head(maps)  # type: ignore[no-any-return]

    def files(self, config: SegmentationConfig) -> dict[str, bytes]:
        """The files that `load_head` reads."""
        settled = {"image_size": self.input_size, "layers": self.layers}
        config = config.model_copy(update=settled)
        weights = weights_of(self.head, self.encoder, finetune=config.finetune)
        return head_files("segmentation", weights, self.encoder.card, config, self.class_names)


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
        encoder: source of the maps, on the device.
        config: options of the head; `image_size` is ignored.
        class_names: names of the classes, by index.
        input_size: (height, width) of a window, pixels.
        device: device of the head, as torch names it.
        seed: seed of the initialisation; torch's own generator keeps its state.
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
        folder: folder of `head.safetensors` and `head.json`.
        encoder: the same, in evaluation mode and on the device. A head that was trained together
            with its encoder brings that encoder's weights, which are written into this one.
        device: device of the head, as torch names it.

    Raises:
        DataError: the head belongs to another encoder, or there is none.
    """
    card = read_card(folder, "segmentation", encoder)
    config = SegmentationConfig.model_validate(card["config"])
    assert config.image_size is not None
    names = tuple(card["class_names"])
    model = build_segmenter(encoder, config, names, config.image_size, device=device, seed=0)
    load_weights(folder, model.head, encoder)
    return model
