"""The OpenAPI 3.1 document of the endpoint, which `docs/openapi.json` holds.

Paths follow the table of operations, schemas the models of the bodies; parameters and media types
are written by hand.
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

from pydantic.json_schema import models_json_schema

from mimray import __version__
from mimray.serving.inference.options import PYRAMID_STRIDES
from mimray.serving.operations.embeddings import EMBEDDINGS
from mimray.serving.operations.features import FEATURES
from mimray.serving.operations.metadata import DESCRIBE
from mimray.serving.operations.oip import INFER, READY
from mimray.serving.operations.operation import Operation
from mimray.serving.operations.predict import PREDICT, Masks
from mimray.serving.operations.reconstruct import RECONSTRUCT
from mimray.serving.operations.response_formats import (
    ARROW,
    JSON,
    METADATA_HEADER,
    NPY,
    NPZ,
    SAFETENSORS,
)
from mimray.serving.operations.table import OPERATIONS
from mimray.serving.wire import bodies
from mimray.serving.wire.bodies import Dtype, Pooling
from mimray.serving.wire.oip_messages import HEADER_LENGTH

Tree = dict[str, Any]

_TEXT: Tree = {"type": "string"}

_PROBLEM = "application/problem+json"
_BINARY = "application/octet-stream"
_BODIES = (
    bodies.Problem,
    bodies.Model,
    bodies.Models,
    bodies.Features,
    bodies.Embeddings,
    bodies.Predictions,
    bodies.Reconstruction,
    bodies.InferRequest,
    bodies.InferResponse,
)
# Names in generated clients, where they are not the operation's own.
_OPERATION_IDS = {DESCRIBE.name: "model", READY.name: "model_ready"}
_STATUSES = {
    "304": "the client has this answer already: its `If-None-Match` holds the entity tag",
    "400": "the request breaks the protocol or asks for what is not there",
    "401": "no key, or a wrong one",
    "404": "no such model, version or route",
    "405": "the route has no such method",
    "406": "nothing that `Accept` takes can be made",
    "408": "the body came too slowly",
    "409": "the model is served without what was asked for: its decoder, or a trained head",
    "413": "more bytes, pixels or pictures than allowed",
    "415": "a Content-Type or Content-Encoding that is not understood",
    "422": "pictures that cannot be decoded; `pictures` says which and why",
    "429": "the key's own quota is spent; `Retry-After` says until when",
    "500": "the model failed",
    "503": "too much is waiting, or the model is not ready; `Retry-After` says when to come back",
}


def document() -> Tree:
    """The whole document."""
    nothing_more: Tree = {"type": "object"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mimray",
            "version": __version__,
            "summary": "Features of pictures from frozen encoders",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}, {"header": []}, {}],
        "paths": {
            "/": {"get": _home()},
            "/page/{path}": {"get": _page()},
            "/openapi.json": {"get": _json("openapi", "This document", nothing_more)},
            "/metrics": {"get": _metrics()},
            "/v1/models": {"get": _json("models", "Models there are", _ref("Models"))},
            "/v2": {"get": _json("server", "What the server is", nothing_more)},
            "/v2/": {"get": _json("server_slash", "What the server is", nothing_more)},
            "/v2/health/live": {"get": _json("live", "Whether it runs", nothing_more)},
            "/v2/health/ready": {
                "get": _json("ready", "Whether every model answers", nothing_more, ("503",))
            },
            "/v2/repository/index": {
                "post": _json("index", "Models and their states",
                              {"type": "array", "items": {"type": "object"}})
            },
            **{
                path: _model_path(operation, path)
                for operation in OPERATIONS.values()
                for path in operation.paths
            },
        },
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "responses": {status: _refusal(status) for status in _STATUSES if status != "304"},
        },
    }  # fmt: skip


def _schemas() -> Tree:
    """Schemas of the bodies, by name."""
    models: list[tuple[type[bodies.Body], Literal["validation"]]] = [
        (model, "validation") for model in _BODIES
    ]
    _, found = models_json_schema(models, ref_template=_ref("{model}")["$ref"])
    schemas: Tree = _untitled(found["$defs"])
    return schemas


def _untitled(tree: Any) -> Any:
    """A schema without the titles that pydantic makes of names."""
    if isinstance(tree, list):
        return [_untitled(branch) for branch in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        name: _untitled(branch)
        for name, branch in tree.items()
        if not (name == "title" and isinstance(branch, str))
    }


def _ref(name: str) -> Tree:
    return {"$ref": f"#/components/schemas/{name}"}


def _model_path(operation: Operation, path: str) -> Tree:
    """The description of an operation's route."""
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    name = _OPERATION_IDS.get(operation.name, operation.name)
    name += "_version" if "version" in names else ""
    describe = _COMPUTATIONS.get(operation.name, _description)
    method = describe(name, operation.summary)
    parameters = [{"name": part, "in": "path", "required": True, "schema": _TEXT} for part in names]
    return {**({"parameters": parameters} if names else {}), operation.method.lower(): method}


def _operation(
    name: str, summary: str, responses: Tree, errors: tuple[str, ...], **more: Any
) -> Tree:
    known = {status: {"$ref": f"#/components/responses/{status}"} for status in errors}
    return {
        "operationId": name,
        "summary": summary,
        **more,
        "responses": {
            **responses,
            **known,
            "401": {"$ref": "#/components/responses/401"},
            "405": {"$ref": "#/components/responses/405"},
            "429": {"$ref": "#/components/responses/429"},
            "500": {"$ref": "#/components/responses/500"},
            "503": {"$ref": "#/components/responses/503"},
        },
    }


def _json(name: str, summary: str, schema: Tree, errors: tuple[str, ...] = ()) -> Tree:
    answer = {"description": summary, "content": {JSON: {"schema": schema}}}
    return _operation(name, summary, {"200": answer}, errors)


def _home() -> Tree:
    answer = {
        "description": "the page for browsers, a summary for others",
        "content": {
            "text/html": {"schema": _TEXT},
            JSON: {"schema": {"type": "object"}},
        },
    }
    return _operation("home", "Where to begin", {"200": answer}, (), security=[{}])


def _page() -> Tree:
    answer = {"description": "a file of the page", "content": {"*/*": {"schema": _bytes()}}}
    parameter = {"name": "path", "in": "path", "required": True, "schema": _TEXT}
    return _operation(
        "page",
        "Files of the page",
        {"200": answer},
        ("404",),
        parameters=[parameter],
        security=[{}],
    )


def _metrics() -> Tree:
    answer = {
        "description": "Prometheus' text format",
        "content": {"text/plain": {"schema": _TEXT}},
    }
    return _operation("metrics", "What to watch", {"200": answer}, ())


def _description(name: str, summary: str) -> Tree:
    schema = _ref("Model") if name == "model" else {"type": "object"}
    return _json(name, summary, schema, ("400", "404", "503"))


def _features(name: str, summary: str) -> Tree:
    schema = {"schema": _bytes()}
    entity = {"ETag": {"schema": _TEXT}, "Vary": {"schema": _TEXT}}
    answer = {
        "description": "features in the format that `Accept` prefers",
        "headers": {
            **entity,
            METADATA_HEADER: {
                "description": "npy only: the metadata as JSON",
                "schema": _TEXT,
            },
        },
        "content": {
            JSON: {"schema": _ref("Features")},
            NPY: schema,
            NPZ: schema,
            "application/zip": schema,
            ARROW: schema,
            SAFETENSORS: schema,
            "application/x-safetensors": schema,
        },
    }
    outputs = _query(
        "outputs",
        "Comma-separated: pooled, tokens, layer_<i>, pyramid_<stride>. Pooled by default.",
        _TEXT,
        "pooled,tokens",
    )
    return _operation(
        name,
        summary,
        {"200": answer, "304": {"description": _STATUSES["304"], "headers": entity}},
        ("400", "404", "406", "408", "413", "415", "422"),
        parameters=[
            *_model_parameters(),
            outputs,
            *_options(),
        ],
        requestBody=_picture_body(),
    )


def _reconstruct(name: str, summary: str) -> Tree:
    ratio = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    options = [
        _query("mask_ratio", "Share of patches to hide", ratio),
        _query("seed", "Of the mask", {"type": "integer", "minimum": 0, "maximum": 999999999}),
    ]
    return _of_pictures(name, summary, "pictures", "Reconstruction", options)


def _predict(name: str, summary: str) -> Tree:
    options = [
        _query("heads", "Comma-separated; all by default", _TEXT),
        _query("masks", "Form of masks; `map` is of segmentation alone",
               {"enum": list(get_args(Masks)), "default": "rle"}),
        _query("min_score", "Objects and classes below it are left out", {"type": "number"}),
        _query("top", "Most objects, and most classes with a score",
               {"type": "integer", "minimum": 1, "maximum": 999999}),
    ]  # fmt: skip
    return _of_pictures(name, summary, "predictions", "Predictions", options)


def _of_pictures(name: str, summary: str, text: str, schema: str, options: list[Tree]) -> Tree:
    """An operation from pictures to JSON, which a model may be served without."""
    answer = {"description": text, "content": {JSON: {"schema": _ref(schema)}}}
    return _operation(
        name,
        summary,
        {"200": answer, "304": {"description": _STATUSES["304"]}},
        ("400", "404", "408", "409", "413", "415", "422"),
        parameters=[*_model_parameters(), *options],
        requestBody=_picture_body(),
    )


def _embeddings(name: str, summary: str) -> Tree:
    text = {"type": "string", "description": "a data URI, base64, or an https URL where allowed"}
    body = {
        "type": "object",
        "required": ["input"],
        "properties": {
            "model": _TEXT,
            "input": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}]},
            "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": {"type": "integer"},
            "user": _TEXT,
            "pooling": {"enum": list(get_args(Pooling))},
            "size": _TEXT,
        },
    }
    answer = {"description": "pooled vectors", "content": {JSON: {"schema": _ref("Embeddings")}}}
    return _operation(
        name,
        summary,
        {"200": answer, "304": {"description": _STATUSES["304"]}},
        ("400", "404", "408", "413", "415", "422"),
        requestBody={"required": True, "content": {JSON: {"schema": body}}},
    )


def _infer(name: str, summary: str) -> Tree:
    length = {
        "name": HEADER_LENGTH,
        "in": "header",
        "description": "Bytes of JSON before the raw tensors; 0 for a body that is one picture",
        "schema": {"type": "integer", "minimum": 0},
    }
    answer = {
        "description": "tensors, as JSON or raw after it",
        "headers": {HEADER_LENGTH: {"schema": {"type": "integer"}}},
        "content": {JSON: {"schema": _ref("InferResponse")}, _BINARY: {"schema": _bytes()}},
    }
    body = {JSON: {"schema": _ref("InferRequest")}, _BINARY: {"schema": _bytes()}}
    return _operation(
        name,
        summary,
        {"200": answer, "304": {"description": _STATUSES["304"]}},
        ("400", "404", "408", "413", "415", "422"),
        parameters=[length],
        requestBody={"required": True, "content": body},
    )


_COMPUTATIONS = {
    FEATURES.name: _features,
    EMBEDDINGS.name: _embeddings,
    PREDICT.name: _predict,
    RECONSTRUCT.name: _reconstruct,
    INFER.name: _infer,
}


def _picture_body() -> Tree:
    listed = {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
    }
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {
                "description": "files, under any names; answers follow their order",
                "type": "array",
                "items": _bytes(),
                "minItems": 1,
            }
        },
    }
    content = {
        "image/*": {"schema": _bytes()},
        _BINARY: {"schema": _bytes()},
        "multipart/form-data": {"schema": form},
        JSON: {"schema": listed},
    }
    return {"required": True, "content": content}


def _options() -> list[Tree]:
    levels = ", ".join(map(str, PYRAMID_STRIDES))
    return [
        _query("layers", "Layers whose maps are wanted, counted from 0, negative from the end",
               {"type": "string"}, "2,5,8,11"),
        _query("pooling", "How tokens become one vector", {"enum": list(get_args(Pooling))}),
        _query("norm", "Apply the final norm to maps", {"type": "boolean"}),
        _query("pyramid", f"Maps of strides {levels}, without parameters", {"type": "boolean"}),
        _query("size", "Of the model's input: 224; 448,640 (rows,columns); keep; keep:1024; native",
               {"type": "string"}, "keep:448"),
        _query("dtype", "Of every output", {"enum": list(get_args(Dtype))}),
    ]  # fmt: skip


def _query(name: str, text: str, schema: Tree, example: str | None = None) -> Tree:
    found: Tree = {"name": name, "in": "query", "description": text, "schema": schema}
    if example is not None:
        found["example"] = example
    return found


def _model_parameters() -> list[Tree]:
    return [
        _query("model", "Name of the model; may be left out where there is one", _TEXT),
        _query("version", "Of the model", _TEXT),
    ]


def _bytes() -> Tree:
    return {"type": "string", "contentMediaType": _BINARY}


def _refusal(status: str) -> Tree:
    headers: Tree = {}
    if status in ("429", "503"):
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 0}}
    if status == "401":
        headers["WWW-Authenticate"] = {"schema": _TEXT}
    if status == "405":
        headers["Allow"] = {"schema": _TEXT}
    return {
        "description": _STATUSES[status],
        **({"headers": headers} if headers else {}),
        "content": {_PROBLEM: {"schema": _ref("Problem")}},
    }


if __name__ == "__main__":
    print(json.dumps(document(), indent=1))
