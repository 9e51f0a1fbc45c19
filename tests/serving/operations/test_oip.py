"""The Open Inference Protocol without Ray: tensors both ways, and every way to get it wrong."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from mimray.serving.wire.oip_messages import HEADER_LENGTH, build_request, parse_response

INFER = "/v2/models/alpha/infer"


@pytest.fixture(scope="module")
def client(application: Callable[..., Any]) -> Iterator[TestClient]:
    limits = {"body_mib": 1, "pictures": 8, "picture_pixels": 30_000, "input_pixels": 60_000}
    with TestClient(application(gateway={"limits": limits}, max_batch_size=4)) as client:
        yield client


def _infer(client: TestClient, image: Any, outputs: list[str], **parameters: Any) -> Any:
    body = build_request({"image": image}, outputs, parameters)
    return client.post(INFER, content=body.content, headers=body.headers)


def _outputs(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return parse_response(response.content, response.headers.get(HEADER_LENGTH)).outputs


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
    assert (answer["model_name"], answer["model_version"]) == ("alpha", "1")
    assert (answer["parameters"]["grid"], answer["parameters"]["input_size"]) == ("3,4", "48,64")
    shapes = {output["name"]: output["shape"] for output in answer["outputs"]}
    assert shapes == {"pooled": [1, 64], "tokens": [1, 12, 64]}
    pooled, tokens = reference(data)
    np.testing.assert_allclose(answer["outputs"][0]["data"], pooled, atol=1e-5)
    np.testing.assert_allclose(answer["outputs"][1]["data"], tokens.ravel(), atol=1e-5)


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_infer__raw_picture_and_compressed(
    client: TestClient, picture: Callable[..., bytes], pack: Callable[[bytes], bytes]
) -> None:
    data = picture(1)
    plain = client.post(INFER, content=data, headers={HEADER_LENGTH: "0"})
    encoding = "gzip" if pack is gzip.compress else "deflate"
    headers = {HEADER_LENGTH: "0", "Content-Encoding": encoding}
    packed = client.post(INFER, content=pack(data), headers=headers)
    assert plain.status_code == packed.status_code == 200
    assert plain.content == packed.content


def test_infer__layers_match_tokens_and_norm_matters(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    names = ["layer_2", "tokens", "layer_0", "source_size", "transform", "valid_region"]
    outputs = _outputs(_infer(client, [picture(1, (90, 70))], names))
    assert list(outputs) == names
    assert outputs["source_size"].tolist() == [[70, 90]]
    assert outputs["valid_region"].tolist() == [[0, 0, 64, 48]]
    np.testing.assert_allclose(outputs["transform"][0] @ [90, 70, 1], [64, 48, 1])
    last = outputs["layer_2"]
    assert last.shape == (1, 64, 3, 4)
    tokens = last.reshape(1, 64, 12).transpose(0, 2, 1)
    np.testing.assert_allclose(tokens, outputs["tokens"], atol=1e-5)
    raw = _outputs(_infer(client, [picture(1)], ["layer_2"], norm=False))["layer_2"]
    assert np.abs(raw - last).max() > 1e-2


def test_infer__default_outputs_follow_the_parameters(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    response = _infer(client, [picture(1)], [], layers="0,-1", pyramid=True, dtype="INT8",
                      binary_data_output=True, priority=1)  # fmt: skip
    outputs = _outputs(response)
    names = ["pooled", "tokens", "layer_0", "layer_2", *(f"pyramid_{s}" for s in (4, 8, 16, 32))]
    assert list(outputs) == [n for name in names for n in (name, f"{name}_scale")]
    assert outputs["tokens"].dtype == np.int8
    wide = _outputs(_infer(client, [picture(1)], ["tokens"]))["tokens"]
    restored = outputs["tokens"] * outputs["tokens_scale"]
    assert (np.abs(restored - wide) <= outputs["tokens_scale"] * 0.501).all()
    metadata = json.loads(
        parse_response(response.content, response.headers[HEADER_LENGTH]).parameters["metadata"]  # type: ignore[arg-type]
    )
    assert metadata["outputs"][4] == {
        "name": "pyramid_4", "layer": 2, "norm": True, "stride": [4, 4],
        "kind": "parameter-free: bilinear from layer 2",
    }  # fmt: skip


def test_infer__pixels_equal_the_encoded_picture(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    data = picture(3)
    pixels = np.asarray(Image.open(io.BytesIO(data)))[None]
    by_bytes, by_pixels = (
        _outputs(_infer(client, image, ["pooled"]))["pooled"] for image in ([data], pixels)
    )
    np.testing.assert_array_equal(by_bytes, by_pixels)


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


def test_infer__pictures_of_other_sizes_cannot_share_a_tensor(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    mixed = [picture(1, (90, 70)), picture(2, (40, 120))]
    response = _infer(client, mixed, ["tokens"], size="native")
    assert response.status_code == 400
    assert "different sizes" in response.json()["error"]
    assert _outputs(_infer(client, mixed, ["pooled"], size="native"))["pooled"].shape == (2, 64)


def _bytes_input(**changes: Any) -> dict[str, Any]:
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["aGk="], **changes}


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"outputs": [{"name": "nose"}]}, 400),
        ({"outputs": [{"name": "layer_3"}]}, 400),
        ({"outputs": [{"name": "pooled"}, {"name": "pooled"}]}, 400),
        ({"parameters": {"dtype": "FP8"}}, 400),
        ({"parameters": {"norm": "often"}}, 400),
        ({"parameters": {"layerz": "1"}}, 400),
        ({"inputs": [_bytes_input(name="x")]}, 400),
        ({"inputs": [_bytes_input(datatype="FP32", data=[1.0])]}, 400),
        ({"inputs": [_bytes_input(datatype="UINT8", data=[1])]}, 400),
        ({"inputs": [_bytes_input(shape=[0], data=[])]}, 400),
        ({"inputs": [_bytes_input(shape=[9], data=["aGk="] * 9)]}, 413),
        ({"inputs": [_bytes_input(datatype="UINT8", shape=[1, 2, 2, 1], data=[0] * 4)]}, 422),
        ({"inputs": [_bytes_input(datatype="FP32", shape=[1, 3, 16, 9], data=[0] * 432)]}, 400),
    ],
)
def test_infer__refusals(client: TestClient, changes: dict[str, Any], status: int) -> None:
    response = client.post(INFER, content=json.dumps({"inputs": [_bytes_input()], **changes}))
    assert response.status_code == status, response.text
    assert response.json()["error"]
