"""The endpoint as an OpenAPI 3.1 document; `docs/openapi.json` is what `document` gives."""

from __future__ import annotations

import importlib.metadata
import json
from typing import Any, get_args

from mimray.serving.api.openapi_schemas import Tree, ref, schemas
from mimray.serving.inference.options import PYRAMID_STRIDES, Dtype, Pooling
from mimray.serving.operations.response_formats import (
    ARROW,
    JSON,
    METADATA_HEADER,
    NPY,
    NPZ,
    SAFETENSORS,
)
from mimray.serving.wire.oip_messages import HEADER_LENGTH

_PROBLEM = "application/problem+json"
_BINARY = "application/octet-stream"
_STATUSES = {
    "304": "the client has this answer already: its `If-None-Match` holds the entity tag",
    "400": "the request breaks the protocol or asks for what is not there",
    "401": "no key, or a wrong one",
    "404": "no such model, version or route",
    "405": "the route has no such method",
    "406": "nothing that `Accept` takes can be made",
    "408": "the body came too slowly",
    "409": "the bundle was exported without its decoder",
    "413": "more bytes, pixels or pictures than allowed",
    "415": "a Content-Type or Content-Encoding that is not understood",
    "422": "pictures that cannot be decoded; `pictures` says which and why",
    "429": "the key's own quota is spent; `Retry-After` says until when",
    "500": "the model failed",
    "503": "too much is waiting, or the model is not ready; `Retry-After` says when to come back",
}


def document() -> Tree:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mimray",
            "version": importlib.metadata.version("mimray"),
            "summary": "Features of pictures from frozen encoders",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "security": [{"bearer": []}, {"header": []}, {}],
        "paths": {
            "/": {"get": _home()},
            "/page/{path}": {"get": _page()},
            "/openapi.json": {"get": _json("openapi", "This document", {"type": "object"})},
            "/metrics": {"get": _metrics()},
            "/v1/models": {"get": _json("models", "Models there are", ref("Models"))},
            "/v1/models/{name}": {
                "parameters": [_name()],
                "get": _json("model", "One model", ref("Model"), errors=("400", "404", "503")),
            },
            "/v1/features": {"post": _features()},
            "/v1/embeddings": {"post": _embeddings()},
            "/v1/reconstruct": {"post": _reconstruct()},
            "/v2": {"get": _json("server", "What the server is", {"type": "object"})},
            "/v2/": {"get": _json("server_slash", "What the server is", {"type": "object"})},
            "/v2/health/live": {"get": _json("live", "Whether it runs", {"type": "object"})},
            "/v2/health/ready": {
                "get": _json("ready", "Whether every model answers", {"type": "object"},
                             errors=("503",))
            },
            "/v2/repository/index": {
                "post": _json("index", "Models and their states",
                              {"type": "array", "items": {"type": "object"}})
            },
            **_model_paths("/v2/models/{name}", "", [_name()]),
            **_model_paths(
                "/v2/models/{name}/versions/{version}", "_version", [_name(), _version()]
            ),
        },
        "components": {
            "schemas": schemas(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "responses": {status: _refusal(status) for status in _STATUSES if status != "304"},
        },
    }  # fmt: skip


def _model_paths(base: str, suffix: str, parameters: list[Tree]) -> Tree:
    errors = ("400", "404", "503")
    texts = {
        "": ("metadata", "The protocol's description of a model"),
        "/ready": ("model_ready", "Whether it answers"),
        "/config": ("config", "Triton's model configuration"),
        "/stats": ("stats", "Triton's statistics"),
    }
    paths: Tree = {
        base + path: {
            "parameters": parameters,
            "get": _json(operation + suffix, text, {"type": "object"}, errors=errors),
        }
        for path, (operation, text) in texts.items()
    }
    paths[base + "/infer"] = {"parameters": parameters, "post": _infer("infer" + suffix)}
    return paths


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
            "text/html": {"schema": {"type": "string"}},
            JSON: {"schema": {"type": "object"}},
        },
    }
    return _operation("home", "Where to begin", {"200": answer}, (), security=[{}])


def _page() -> Tree:
    answer = {"description": "a file of the page", "content": {"*/*": {"schema": _bytes()}}}
    parameter = {"name": "path", "in": "path", "required": True, "schema": {"type": "string"}}
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
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    return _operation("metrics", "What to watch", {"200": answer}, ())


def _features() -> Tree:
    schema = {"schema": _bytes()}
    entity = {"ETag": {"schema": {"type": "string"}}, "Vary": {"schema": {"type": "string"}}}
    answer = {
        "description": "features in the format that `Accept` prefers",
        "headers": {
            **entity,
            METADATA_HEADER: {
                "description": "npy only: the metadata as JSON",
                "schema": {"type": "string"},
            },
        },
        "content": {
            JSON: {"schema": ref("Features")},
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
        {"type": "string"},
        "pooled,tokens",
    )
    return _operation(
        "features",
        "Features of pictures",
        {"200": answer, "304": {"description": _STATUSES["304"], "headers": entity}},
        ("400", "404", "406", "408", "413", "415", "422"),
        parameters=[
            _model(),
            _query("version", "Of the model", {"type": "string"}),
            outputs,
            *_options(),
        ],
        requestBody=_pictures(),
    )


def _reconstruct() -> Tree:
    ratio = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    answer = {"description": "pictures", "content": {JSON: {"schema": ref("Reconstruction")}}}
    return _operation(
        "reconstruct",
        "Hide a part of a picture and predict it",
        {"200": answer, "304": {"description": _STATUSES["304"]}},
        ("400", "404", "408", "409", "413", "415", "422"),
        parameters=[
            _model(),
            _query("version", "Of the model", {"type": "string"}),
            _query("mask_ratio", "Share of patches to hide", ratio),
            _query("seed", "Of the mask", {"type": "integer", "minimum": 0, "maximum": 999999999}),
        ],
        requestBody=_pictures(),
    )


def _embeddings() -> Tree:
    text = {"type": "string", "description": "a data URI, base64, or an https URL where allowed"}
    body = {
        "type": "object",
        "required": ["input"],
        "properties": {
            "model": {"type": "string"},
            "input": {"anyOf": [text, {"type": "array", "items": text, "minItems": 1}]},
            "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": {"type": "integer"},
            "user": {"type": "string"},
            "pooling": {"enum": list(get_args(Pooling))},
            "size": {"type": "string"},
        },
    }
    answer = {"description": "pooled vectors", "content": {JSON: {"schema": ref("Embeddings")}}}
    return _operation(
        "embeddings",
        "Pooled vectors, in the words of OpenAI's API",
        {"200": answer, "304": {"description": _STATUSES["304"]}},
        ("400", "404", "408", "413", "415", "422"),
        requestBody={"required": True, "content": {JSON: {"schema": body}}},
    )


def _infer(name: str) -> Tree:
    length = {
        "name": HEADER_LENGTH,
        "in": "header",
        "description": "Bytes of JSON before the raw tensors; 0 for a body that is one picture",
        "schema": {"type": "integer", "minimum": 0},
    }
    answer = {
        "description": "tensors, as JSON or raw after it",
        "headers": {HEADER_LENGTH: {"schema": {"type": "integer"}}},
        "content": {JSON: {"schema": ref("InferResponse")}, _BINARY: {"schema": _bytes()}},
    }
    body = {JSON: {"schema": ref("InferRequest")}, _BINARY: {"schema": _bytes()}}
    return _operation(
        name,
        "Inference (Open Inference Protocol v2, binary tensor extension)",
        {"200": answer, "304": {"description": _STATUSES["304"]}},
        ("400", "404", "408", "413", "415", "422"),
        parameters=[length],
        requestBody={"required": True, "content": body},
    )


def _pictures() -> Tree:
    listed = {
        "type": "object",
        "required": ["images"],
        "properties": {"images": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
    }
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "contentMediaType": _BINARY}},
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


def _model() -> Tree:
    return _query(
        "model", "Name of the model; may be left out where there is one", {"type": "string"}
    )


def _name() -> Tree:
    return {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}


def _version() -> Tree:
    return {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}


def _bytes() -> Tree:
    return {"type": "string", "contentMediaType": _BINARY}


def _refusal(status: str) -> Tree:
    headers: Tree = {}
    if status in ("429", "503"):
        headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 0}}
    if status == "401":
        headers["WWW-Authenticate"] = {"schema": {"type": "string"}}
    if status == "405":
        headers["Allow"] = {"schema": {"type": "string"}}
    return {
        "description": _STATUSES[status],
        **({"headers": headers} if headers else {}),
        "content": {_PROBLEM: {"schema": ref("Problem")}},
    }


if __name__ == "__main__":
    print(json.dumps(document(), indent=1))
