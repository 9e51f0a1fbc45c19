"""A served encoder with a bundle's interface, so that heads train on features over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mimray.serving.client import FeatureClient
from mimray.serving.wire.codecs import Array
from mimray.trainers.bundles import BundleCard
from mimray.trainers.models.normalise import denormalise
from mimray.trainers.types import Features


class RemoteEncoder:
    """A served encoder with the interface of a bundle's.

    Pictures are sent as uint8 pixels, so that a normalised input must come from such; features come
    back as float32. The client batches requests and retries refused ones.

    Args:
        url: the endpoint's URL.
        model: the model's name.
        api_key: the endpoint's key; `MIMRAY_API_KEY` by default.

    Attributes:
        card: the model's description, from the endpoint's metadata.
        depth: the number of layers.
        stride: pixels between neighbouring output tokens.
        strides: stride of each layer's map, pixels.
        widths: channels of each layer's map.

    Raises:
        EndpointError: the endpoint has no such model, or refuses the key.
    """

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        self._client = FeatureClient(url, api_key, timeout_s=120.0, deadline_s=600.0)
        self._model = model
        metadata = self._client.metadata(model)
        facts = metadata["parameters"]
        known = {name: facts[name] for name in BundleCard.model_fields if name in facts}
        self.card = BundleCard(**{**known, "name": model})
        self.strides: tuple[int, ...] = tuple(facts["strides"])
        self.stride: int = facts["patch_size"]
        self.depth = len(self.strides)
        shapes = {output["name"]: output["shape"] for output in metadata["outputs"]}
        self.widths: tuple[int, ...] = tuple(shapes[f"layer_{i}"][1] for i in range(self.depth))

    def __call__(self, images: Tensor) -> Features:
        """Features of normalised pictures, float [B, C, H, W].

        Tokens that stand for no place are not served, so `prefix` is empty.
        """
        found = self._ask(images, ("pooled", "tokens"), norm=True)
        tokens = torch.from_numpy(found["tokens"]).to(images.device)
        pooled = torch.from_numpy(found["pooled"]).to(images.device)
        grid = images.shape[2] // self.stride, images.shape[3] // self.stride
        return Features(tokens, tokens[:, :0], pooled, grid)

    def features(
        self, images: Tensor, layers: Sequence[int] | None = None, norm: bool = True
    ) -> tuple[Tensor, ...]:
        """Maps [B, D, h, w] of layers, the card's by default."""
        wanted = [layer % self.depth for layer in layers or self.card.layers]
        names = [f"layer_{layer}" for layer in dict.fromkeys(wanted)]
        found = self._ask(images, names, norm=norm)
        maps = {name: torch.from_numpy(found[name]).to(images.device) for name in names}
        return tuple(maps[f"layer_{layer}"] for layer in wanted)

    def _ask(self, images: Tensor, names: Sequence[str], *, norm: bool) -> dict[str, Array]:
        pixels = denormalise(images, self.card.mean, self.card.std).permute(0, 2, 3, 1).cpu()
        size = images.shape[2], images.shape[3]
        # B H W C
        return self._client.outputs(list(pixels.numpy()), self._model, names, norm=norm, size=size)
