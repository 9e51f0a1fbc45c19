"""The routes without Ray: protocol, limits, keys, and every way to get it wrong."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from serving.app import hash_key, model_app, root_app
from serving.handlers import ModelHandler
from serving.predictor import Options, Predictor, PredictorLimits
from serving.protocol import HEADER_LENGTH, build_request, parse_response

INFER = "/v2/models/alpha/infer"


@pytest.fixture(scope="module")
def handler(bundles: dict[str, Path]) -> ModelHandler:
    limits = PredictorLimits(max_batch_size=4, batch_wait_s=0.01, max_pixels=30_000)
    predictor = Predictor(bundles["alpha"], device="cpu", limits=limits)
    return ModelHandler("alpha", predictor, max_pictures=8)


@pytest.fixture(scope="module")
def client(handler: ModelHandler) -> Iterator[TestClient]:
    with TestClient(model_app(handler, key_hash=None, max_body_bytes=200_000)) as client:
        yield client


def _infer(client: TestClient, image: Any, outputs: list[str], **parameters: Any) -> Any:
    body = build_request({"image": image}, outputs, parameters)
    return client.post(INFER, content=body.content, headers=body.headers)


def test_infer__json_in_and_out(
    client: TestClient, picture: Callable[..., bytes], reference: Callable[..., Any]
) -> None:
    data = picture(1)
    entry = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [1],
        "data": [base64.b64encode(data).decode()],
    }
    response = client.post(INFER, content=json.dumps({"id": "q", "inputs": [entry]}))
    assert response.status_code == 200
    answer = response.json()
    assert answer["id"] == "q"
    assert answer["model_name"] == "alpha"
    assert answer["parameters"] == {"grid": "3,4", "input_size": "48,64"}
    shapes = {output["name"]: output["shape"] for output in answer["outputs"]}
    assert shapes == {"pooled": [1, 64], "tokens": [1, 12, 64]}
    pooled, tokens = reference(data)
    np.testing.assert_allclose(answer["outputs"][0]["data"], pooled, atol=1e-5)
    np.testing.assert_allclose(answer["outputs"][1]["data"], tokens.ravel(), atol=1e-5)


def test_infer__raw_picture_and_gzip(client: TestClient, picture: Callable[..., bytes]) -> None:
    data = picture(1)
    plain = client.post(INFER, content=data, headers={HEADER_LENGTH: "0"})
    packed = client.post(
        INFER,
        content=gzip.compress(data),
        headers={HEADER_LENGTH: "0", "Content-Encoding": "gzip"},
    )
    assert plain.status_code == packed.status_code == 200
    assert plain.content == packed.content


def test_infer__layers_match_tokens_and_norm_matters(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    names = ["layer_2", "tokens", "layer_0", "source_size"]
    response = _infer(client, [picture(1, (90, 70))], names)
    outputs = parse_response(response.content, response.headers[HEADER_LENGTH]).outputs
    assert list(outputs) == names
    assert outputs["source_size"].tolist() == [[70, 90]]
    last = outputs["layer_2"]
    assert last.shape == (1, 64, 3, 4)
    tokens = last.reshape(1, 64, 12).transpose(0, 2, 1)
    np.testing.assert_allclose(tokens, outputs["tokens"], atol=1e-5)
    raw = _infer(client, [picture(1)], ["layer_2"], norm=False)
    raw_last = parse_response(raw.content, raw.headers[HEADER_LENGTH]).outputs["layer_2"]
    assert np.abs(raw_last - last).max() > 1e-2


def test_infer__pixels_equal_the_encoded_picture(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    import io

    from PIL import Image

    data = picture(3)
    pixels = np.asarray(Image.open(io.BytesIO(data)))[None]
    by_bytes, by_pixels = (_infer(client, image, ["pooled"]) for image in ([data], pixels))
    assert by_bytes.content == by_pixels.content


def test_infer__bad_pictures_are_named_and_fail_alone(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    good, jpeg = picture(1), picture(2, format="JPEG")
    bad = [jpeg[: len(jpeg) // 2], picture(1, (1, 1)), b"some text", b"", picture(1, (200, 200))]
    response = _infer(client, [good, *bad], ["pooled"])
    assert response.status_code == 422
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["error"] == problem["detail"]
    assert [p["index"] for p in problem["pictures"]] == [1, 2, 3, 4, 5]
    assert [p["reason"] for p in problem["pictures"]] == [
        "truncated", "too_small", "not_an_image", "empty", "too_large"
    ]  # fmt: skip
    assert _infer(client, [good], ["pooled"]).status_code == 200


def test_predictor__same_numbers_whatever_the_company(
    bundles: dict[str, Path], picture: Callable[..., bytes], reference: Callable[..., Any]
) -> None:
    import asyncio

    async def main() -> None:
        limits = PredictorLimits(max_batch_size=8, batch_wait_s=0.02)
        predictor = Predictor(bundles["alpha"], device="cpu", limits=limits)
        pictures = [picture(seed, (60 + seed, 80)) for seed in range(11)]
        together = await asyncio.gather(
            *(predictor.predict([data], Options()) for data in pictures),
            predictor.predict([b"broken"], Options()),
            return_exceptions=True,
        )
        assert isinstance(together[-1], Exception)
        for data, result in zip(pictures, together, strict=False):
            assert not isinstance(result, BaseException)
            pooled, tokens = reference(data)
            np.testing.assert_allclose(result[0].pooled, pooled, rtol=0, atol=1e-5)
            assert result[0].tokens is not None
            np.testing.assert_allclose(result[0].tokens, tokens, rtol=0, atol=1e-5)
        await predictor.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"outputs": [{"name": "nose"}]}, 400),
        ({"outputs": [{"name": "layer_3"}]}, 400),
        ({"outputs": [{"name": "pooled"}, {"name": "pooled"}]}, 400),
        ({"parameters": {"dtype": "FP8"}}, 400),
        ({"parameters": {"norm": "yes"}}, 400),
        ({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["aGk="]}]}, 400),
        ({"inputs": [{"name": "image", "datatype": "FP32", "shape": [1], "data": [1.0]}]}, 400),
        ({"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1], "data": [1]}]}, 400),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [0], "data": []}]}, 400),
        (
            {
                "inputs": [
                    {"name": "image", "datatype": "BYTES", "shape": [9], "data": ["aGk="] * 9}
                ]
            },
            413,
        ),
        (
            {
                "inputs": [
                    {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 1], "data": [0] * 4}
                ]
            },
            422,
        ),
    ],
)
def test_infer__refusals(client: TestClient, changes: dict[str, Any], status: int) -> None:
    entry = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGk="]}
    response = client.post(INFER, content=json.dumps({"inputs": [entry], **changes}))
    assert response.status_code == status
    assert response.json()["error"]


def test_infer__large_bodies(client: TestClient) -> None:
    assert client.post(INFER, content=bytes(200_001)).status_code == 413
    chunks = (bytes(50_000) for _ in range(5))  # no Content-Length
    assert client.post(INFER, content=chunks).status_code == 413
    bomb = gzip.compress(bytes(5_000_000))
    assert len(bomb) < 200_000
    response = client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 413
    response = client.post(INFER, content=b"x", headers={"Content-Encoding": "br"})
    assert response.status_code == 415


def test_model_app__versions_and_unknown_routes(client: TestClient) -> None:
    assert client.get("/v2/models/alpha/versions/1/ready").status_code == 200
    for path, status in [
        ("/v2/models/alpha/versions/2", 404),
        ("/v2/models/alpha/nothing", 404),
        (INFER, 405),
    ]:
        response = client.get(path)
        assert response.status_code == status
        assert response.json()["error"]


def test_guard__asks_for_the_key(handler: ModelHandler) -> None:
    app = model_app(handler, key_hash=hash_key("secret"), max_body_bytes=1000)
    with TestClient(app) as client:
        for headers in ({}, {"X-API-Key": "Secret"}, {"Authorization": "Basic secret"}):
            response = client.get("/v2/models/alpha", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]
        for headers in ({"X-API-Key": "secret"}, {"Authorization": "bearer secret"}):
            assert client.get("/v2/models/alpha", headers=headers).status_code == 200


def test_root_app__readiness_is_that_of_all_models() -> None:
    states = {"a": True, "b": False}

    async def models() -> dict[str, bool]:
        return states

    with TestClient(root_app(models, version="9", key_hash=hash_key("secret"))) as client:
        assert client.get("/v2/health/live").status_code == 200
        waiting = client.get("/v2/health/ready")
        assert waiting.status_code == 503
        assert waiting.headers["retry-after"] == "1"
        assert "b" in waiting.json()["error"]
        states["b"] = True
        assert client.get("/v2/health/ready").status_code == 200
        assert client.get("/").status_code == 401
        client.headers["X-API-Key"] = "secret"
        assert [m["name"] for m in client.get("/").json()["models"]] == ["a", "b"]
        unknown = client.post("/v2/models/c/infer", content=b"{}")
        assert unknown.status_code == 404
        assert "models here: a, b" in unknown.json()["error"]
