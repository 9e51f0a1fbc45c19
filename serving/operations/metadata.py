"""What every answer says about itself, and what a model says about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mimray.serving.inference.options import EncoderFacts, Options, pyramid_source
from mimray.serving.inference.placement import described
from mimray.serving.inference.predictor import Prediction, PredictorLimits

if TYPE_CHECKING:
    from mimray.trainers.bundles import BundleCard

COLOR = "RGB"


@dataclass(frozen=True)
class Identity:
    """Which encoder answers.

    Attributes:
        name: of the model on this server.
        version: of it.
        card: of its bundle.
        facts: of its encoder.
        limits: of its predictor.
        max_pictures: most pictures in one request.
        can_reconstruct: whether the bundle holds its decoder.
        created_s: when the bundle was made, seconds since 1970.
    """

    name: str
    version: str
    card: BundleCard
    facts: EncoderFacts
    limits: PredictorLimits
    max_pictures: int
    can_reconstruct: bool = False
    created_s: int = 0

    def public(self) -> dict[str, Any]:
        """What a client may know: all that features depend on, nothing of the data or the plan."""
        card, facts = self.card, self.facts
        return {
            "encoder": card.encoder.model_dump(mode="json"),
            "method": card.method,
            "weights_sha256": card.weights_sha256,
            "image_size": list(card.image_size),
            "channels": card.channels,
            "mean": list(card.mean),
            "std": list(card.std),
            "interpolation": card.interpolation,
            "color": COLOR if card.channels == 3 else "gray",
            "pooling": card.pooling,
            "layers": list(card.layers),
            "depth": facts.depth,
            "width": facts.width,
            "patch_size": facts.stride,
            "strides": list(facts.strides),
            "widths": list(facts.widths),
            "can_reconstruct": self.can_reconstruct,
            "max_pictures": self.max_pictures,
            "max_pixels": self.limits.pictures.max_pixels,
            "max_input_pixels": self.limits.pictures.max_input_pixels,
        }


def answer_metadata(
    identity: Identity, options: Options, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """What an answer carries beside its tensors, geometry of each picture included."""
    card = identity.card
    return {
        "model": identity.name,
        "version": identity.version,
        "weights_sha256": card.weights_sha256,
        "dtype": options.dtype,
        "pooling": options.pooling,
        "mean": list(card.mean),
        "std": list(card.std),
        "interpolation": card.interpolation,
        "color": COLOR if card.channels == 3 else "gray",
        "outputs": [_described(name, identity.facts, options) for name in options.names],
        "pictures": [described(p.placement, identity.facts.stride) for p in predictions],
    }


def _described(name: str, facts: EncoderFacts, options: Options) -> dict[str, Any]:
    kind, _, number = name.partition("_")
    if kind == "layer":
        layer = int(number)
        stride = facts.strides[layer]
        return {"name": name, "layer": layer, "norm": options.norm, "stride": [stride, stride]}
    if kind == "pyramid":
        from mimray.serving.inference.outputs import resampling

        assert options.pyramid is not None
        stride = int(number)
        layer = pyramid_source(stride, options.pyramid, facts.strides)
        how = resampling(facts.strides[layer], stride)
        return {
            "name": name,
            "layer": layer,
            "norm": options.norm,
            "stride": [stride, stride],
            "kind": f"parameter-free: {how} from layer {layer}",
        }
    return {"name": name, "norm": True}
