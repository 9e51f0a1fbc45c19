"""Schemas of what the endpoint's bodies hold, for its OpenAPI document."""

from __future__ import annotations

from typing import Any

Tree = dict[str, Any]

_NUMBERS = {"type": "array", "items": {"type": "number"}}
_SIDES = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
_MATRIX = {"type": "array", "items": _NUMBERS, "minItems": 3, "maxItems": 3}


def ref(name: str) -> Tree:
    """A schema by its name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Tree, **optional: Tree) -> Tree:
    return {"type": "object", "required": list(required), "properties": {**required, **optional}}


def schemas() -> Tree:
    """By name, as the document's components hold them."""
    text, whole, flag = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
    anything: Tree = {}
    geometry = {
        "source_size": _SIDES,
        "input_size": _SIDES,
        "grid": _SIDES,
        "stride": _SIDES,
        "transform": _MATRIX,
        "inverse": _MATRIX,
        "valid_region": {**_NUMBERS, "minItems": 4, "maxItems": 4},
    }
    tensor = _object({"name": text, "datatype": text, "shape": {"type": "array", "items": whole}},
                     parameters={"type": "object"}, data=anything)  # fmt: skip
    output = _object({"name": text}, parameters={"type": "object"})
    picture = {"type": ["string", "null"]}
    return {
        "Problem": _object(
            {
                "type": text,
                "title": text,
                "status": whole,
                "code": text,
                "detail": text,
                "error": text,
            },
            pictures={
                "type": "array",
                "items": _object({"index": whole, "reason": text, "message": text}),
            },
        ),
        "Model": _object(
            {
                "id": text,
                "object": {"const": "model"},
                "created": whole,
                "owned_by": text,
                "ready": flag,
            },
        ),
        "Models": _object(
            {"object": {"const": "list"}, "data": {"type": "array", "items": ref("Model")}}
        ),
        "Features": _object(
            {
                "model": text,
                "version": text,
                "metadata": {"type": "object"},
                "data": {
                    "type": "array",
                    "items": _object({"index": whole, "pooled": _NUMBERS, **geometry}),
                },
            }
        ),
        "Embeddings": _object(
            {
                "object": {"const": "list"},
                "model": text,
                "data": {
                    "type": "array",
                    "items": _object(
                        {
                            "object": {"const": "embedding"},
                            "index": whole,
                            "embedding": {"anyOf": [_NUMBERS, text]},
                        }
                    ),
                },
                "usage": {"type": "object"},
            }
        ),
        "Reconstruction": _object(
            {
                "mask_ratio": {"type": ["number", "null"]},
                "grid": _SIDES,
                "mask": {"type": ["array", "null"], "items": {"enum": [0, 1]}},
                "masked": picture,
                "reconstruction": picture,
                "raw": picture,
                "panels": {"type": "array", "items": _object({"title": text, "image": text})},
            }
        ),
        "InferRequest": _object(
            {"inputs": {"type": "array", "items": tensor, "minItems": 1}},
            id=text,
            parameters={"type": "object"},
            outputs={"type": "array", "items": output},
        ),
        "InferResponse": _object(
            {
                "model_name": text,
                "model_version": text,
                "outputs": {"type": "array", "items": tensor},
            },
            id=text,
            parameters={"type": "object"},
        ),
    }
