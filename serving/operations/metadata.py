"""Descriptions of a model and of the features in an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mimray.serving.inference.heads import Head
from mimray.serving.inference.options import EncoderInfo, Options, pyramid_source
from mimray.serving.inference.placement import described
from mimray.serving.inference.predictor import Prediction
from mimray.serving.operations.operation import Description, Model

COLOR = "RGB"


def public(model: Model) -> dict[str, Any]:
    """The members of a model's description that features depend on; none of its data or plan."""
    card, info, limits = model.card, model.info, model.limits
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
        "depth": info.depth,
        "width": info.width,
        "patch_size": info.stride,
        "strides": list(info.strides),
        "widths": list(info.widths),
        "can_reconstruct": model.reconstructor.available,
        "heads": {name: described_head(head) for name, head in model.predictor.heads.items()},
        "max_pictures": limits.pictures,
        "max_pixels": limits.picture_pixels,
        "max_input_pixels": limits.input_pixels,
    }


def described_head(head: Head) -> dict[str, Any]:
    """A head as descriptions of its model and answers have it, a `HeadCard`."""
    return {
        "task": head.task,
        "class_names": list(head.class_names),
        "input_size": list(head.input_size),
        "sha256": head.sha256,
    }


def _describe(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "mimray",
        "ready": True,
        "version": model.version,
        "versions": list(model.versions),
        **public(model),
    }


DESCRIBE = Description(
    name="describe", path="/v1/models/{name}", summary="One model", describe=_describe
)


def answer_metadata(
    model: Model, options: Options, predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """The members beside an answer's tensors, the geometry of each picture included."""
    card, info = model.card, model.info
    return {
        "model": model.name,
        "version": model.version,
        "weights_sha256": card.weights_sha256,
        "dtype": options.dtype,
        "pooling": options.pooling,
        "mean": list(card.mean),
        "std": list(card.std),
        "interpolation": card.interpolation,
        "color": COLOR if card.channels == 3 else "gray",
        "outputs": [_described(name, info, options) for name in options.names],
        "pictures": [described(p.placement, info.stride) for p in predictions],
    }


def _described(name: str, info: EncoderInfo, options: Options) -> dict[str, Any]:
    kind, _, number = name.partition("_")
    if kind == "layer":
        layer = int(number)
        stride = info.strides[layer]
        return {"name": name, "layer": layer, "norm": options.norm, "stride": [stride, stride]}
    if kind == "pyramid":
        from mimray.serving.inference.outputs import resampling

        assert options.pyramid is not None
        stride = int(number)
        layer = pyramid_source(stride, options.pyramid, info.strides)
        how = resampling(info.strides[layer], stride)
        return {
            "name": name,
            "layer": layer,
            "norm": options.norm,
            "stride": [stride, stride],
            "kind": f"parameter-free: {how} from layer {layer}",
        }
    return {"name": name, "norm": True}
