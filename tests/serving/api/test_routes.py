"""The routes without Ray: every protocol, limits, keys, and every way to get it wrong."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

INFER = "/v2/models/alpha/infer"
JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def client(application: Callable[..., Any]) -> Iterator[TestClient]:
    limits = {"body_mib": 1, "pictures": 8, "picture_pixels": 30_000, "input_pixels": 60_000}
    with TestClient(application(gateway={"limits": limits}, max_batch_size=4)) as client:
        yield client


def test_bodies__too_large_in_every_way(client: TestClient) -> None:
    assert client.post(INFER, content=bytes(2**20 + 1)).status_code == 413
    chunks = (bytes(300_000) for _ in range(5))  # no Content-Length
    assert client.post(INFER, content=chunks).status_code == 413
    bomb = gzip.compress(bytes(50_000_000))
    assert len(bomb) < 2**20
    response = client.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 413
    response = client.post(INFER, content=b"x", headers={"Content-Encoding": "br"})
    assert response.status_code == 415
    assert client.post("/v1/features?model=alpha", content=bytes(2**20 + 1)).status_code == 413


def test_features__raw_multipart_and_json_are_the_same(
    client: TestClient, picture: Callable[..., bytes], reference: Callable[..., Any]
) -> None:
    data = picture(4, format="JPEG")
    text = base64.b64encode(data).decode()
    url = "/v1/features?model=alpha"
    answers = [
        client.post(url, content=data, headers=JPEG),
        client.post(url, content=data),
        client.post(url, files={"picture": ("a.jpg", data, "image/jpeg")}, data={"note": "x"}),
        client.post(url, json={"images": [f"data:image/jpeg;base64,{text}"]}),
        client.post(url, json={"images": [text]}),
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["data"]
        np.testing.assert_allclose(row["pooled"], reference(data)[0], atol=1e-5)
        assert row["source_size"] == [70, 90]
    several = [("file", (str(i), picture(i), "image/png")) for i in range(3)]
    answer = client.post(url, files=several).json()
    for index, row in enumerate(answer["data"]):
        np.testing.assert_allclose(row["pooled"], reference(picture(index))[0], atol=1e-5)
    assert answer["metadata"]["weights_sha256"]


def test_features__maps_as_files(client: TestClient, picture: Callable[..., bytes]) -> None:
    url = "/v1/features?model=alpha&outputs=tokens&layers=1&pyramid=true&size=keep:32,64"
    url += "&dtype=float16"
    answer = client.post(url, content=picture(4), headers={"Accept": "application/x-npz"})
    assert answer.status_code == 200, answer.text
    with np.load(io.BytesIO(answer.content)) as found:
        assert found["tokens"].shape == (1, 8, 64)
        assert found["layer_1"].dtype == np.float16
        assert found["pyramid_4"].shape == (1, 64, 8, 16)
        metadata = json.loads(str(found["metadata"]))
    assert metadata["pictures"][0]["valid_region"] == [0, 0, 41, 32]
    alone = "/v1/features?model=alpha&layers=1"
    npy = client.post(alone, content=picture(4), headers={"Accept": "application/x-npy"})
    assert np.load(io.BytesIO(npy.content)).shape == (1, 64, 3, 4)
    assert json.loads(npy.headers["x-mimray-metadata"])["outputs"][0]["layer"] == 1


def test_features__entity_tags(client: TestClient, picture: Callable[..., bytes]) -> None:
    url = "/v1/features?model=alpha"
    first = client.post(url, content=picture(7), headers=JPEG)
    assert first.headers["vary"] == "Accept"
    tag = first.headers["etag"]
    again = client.post(url, content=picture(7), headers={**JPEG, "If-None-Match": f'"x", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    others = [
        client.post(url, content=picture(8), headers=JPEG),
        client.post(url + "&pooling=gem", content=picture(7), headers=JPEG),
        client.post(url, content=picture(7), headers={**JPEG, "Accept": "application/x-npy"}),
        client.post("/v1/features?model=beta", content=picture(7), headers=JPEG),
    ]
    assert len({tag, *(other.headers["etag"] for other in others)}) == 5


@pytest.mark.parametrize(
    ("query", "content", "headers", "status"),
    [
        ("model=gamma", b"x", {}, 404),
        ("", b"x", {}, 400),
        ("model=alpha&model=beta", b"x", {}, 400),
        ("model=alpha&layer=1", b"x", {}, 400),
        ("model=alpha&version=2", b"x", {}, 404),
        ("model=alpha&outputs=nose", b"x", {}, 400),
        ("model=alpha", b"", {}, 400),
        ("model=alpha", b"x", {}, 422),
        ("model=alpha", b"x", {"Content-Type": "text/plain"}, 415),
        ("model=alpha", b"x", {"Accept": "text/html"}, 406),
        ("model=alpha&outputs=tokens", b"x", {"Content-Type": "image/png"}, 422),
        ("model=alpha", b"x", {"Content-Type": "multipart/form-data"}, 400),
        ("model=alpha", b"x", {"Content-Type": "multipart/form-data; boundary=b"}, 400),
        ("model=alpha", b"{}", {"Content-Type": "application/json"}, 400),
        ("model=alpha", b'{"images": ["?"]}', {"Content-Type": "application/json"}, 400),
        ("model=alpha", b'{"images": ["data:,x"]}', {"Content-Type": "application/json"}, 400),
        ("model=alpha", b'{"images": ["https://a.b"]}', {"Content-Type": "application/json"}, 400),
    ],
)  # fmt: skip
def test_features__refusals(
    client: TestClient, query: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    response = client.post(f"/v1/features?{query}", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["error"] == response.json()["detail"]
    assert response.json()["status"] == status


def test_features__one_model_needs_no_name(
    application: Callable[..., Any], picture: Callable[..., bytes]
) -> None:
    with TestClient(application(("alpha",))) as client:
        answer = client.post("/v1/features", content=picture(1), headers=JPEG)
        assert answer.json()["model"] == "alpha"


def test_embeddings__as_openai_has_them(
    client: TestClient, picture: Callable[..., bytes], reference: Callable[..., Any]
) -> None:
    text = base64.b64encode(picture(1)).decode()
    ask = {"model": "alpha", "input": [text, f"data:image/png;base64,{text}"], "user": "me"}
    answer = client.post("/v1/embeddings", json=ask).json()
    assert (answer["object"], answer["model"]) == ("list", "alpha")
    assert [row["index"] for row in answer["data"]] == [0, 1]
    packed = client.post("/v1/embeddings", json={**ask, "encoding_format": "base64"}).json()
    for row, other in zip(answer["data"], packed["data"], strict=True):
        np.testing.assert_allclose(row["embedding"], reference(picture(1))[0], atol=1e-5)
        raw = np.frombuffer(base64.b64decode(other["embedding"]), np.float32)
        np.testing.assert_array_equal(raw, np.array(row["embedding"], np.float32))


@pytest.mark.parametrize(
    "changes",
    [{"input": 3}, {"input": []}, {"encoding_format": "hex"}, {"dimensions": 3}, {"pooling": "x"}],
)
def test_embeddings__refusals(client: TestClient, changes: dict[str, Any]) -> None:
    response = client.post("/v1/embeddings", json={"model": "alpha", "input": "aGk=", **changes})
    assert response.status_code == 400, response.text


def test_models__and_what_is_said_of_them(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["alpha", "beta"]
    assert listed[0] == client.get("/v1/models/alpha").json()
    assert (listed[0]["depth"], listed[0]["patch_size"], listed[0]["layers"]) == (3, 16, [0, 2])
    assert listed[0]["can_reconstruct"] is False
    assert client.post("/v1/reconstruct?model=alpha", content=b"x").status_code == 409
    assert client.get("/v2/models/alpha/config").json()["max_batch_size"] == 0
    stats = client.get("/v2/models/alpha/stats").json()["model_stats"][0]
    assert stats["inference_count"] >= 0
    index = client.post("/v2/repository/index").json()
    assert [(m["name"], m["version"], m["state"]) for m in index] == [
        ("alpha", "1", "READY"), ("beta", "1", "READY")
    ]  # fmt: skip


def test_routes__versions_and_unknown_ones(client: TestClient) -> None:
    assert client.get("/v2/models/alpha/versions/1/ready").status_code == 200
    for path, status in [
        ("/v2/models/alpha/versions/2", 404),
        ("/v2/models/alpha/nothing", 404),
        ("/v2/models/gamma", 404),
        ("/page/../config.py", 404),
        ("/page/..%2Fconfig.py", 404),
        (INFER, 405),
    ]:
        response = client.get(path)
        assert response.status_code == status, path
        assert response.json()["error"]
    assert client.get(INFER).headers["allow"] == "POST"


def test_page__has_its_files(client: TestClient) -> None:
    for name in ("main.js", "style.css", "samples/valley.jpg"):
        assert client.get(f"/page/{name}").status_code == 200, name


def test_home__a_page_for_browsers(client: TestClient) -> None:
    page = client.get("/", headers={"Accept": "text/html,*/*"})
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert [m["name"] for m in client.get("/").json()["models"]] == ["alpha", "beta"]


def test_gateway__asks_for_the_key(application: Callable[..., Any]) -> None:
    from mimray.serving.api.keys import hash_key

    app = application(("alpha",), gateway={"key_sha256": hash_key("secret")}, ready={"beta": False})
    with TestClient(app) as client:
        for headers in ({}, {"X-API-Key": "Secret"}, {"Authorization": "Basic secret"}):
            response = client.get("/v2/models/alpha", headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]
        for headers in ({"X-API-Key": "secret"}, {"Authorization": "bearer secret"}):
            assert client.get("/v2/models/alpha", headers=headers).status_code == 200
        assert client.get("/v2/health/live").status_code == 200
        assert client.get("/", headers={"Accept": "text/html"}).status_code == 200
        assert client.get("/").json()["models"] == []  # names are for those who may ask
        waiting = client.get("/v2/health/ready")
        assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "1")
        assert "beta" in waiting.json()["error"]


def test_gateway__continues_a_trace_and_names_the_request(client: TestClient) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = client.get("/v2/health/live", headers={"traceparent": parent})
    version, trace, span, _ = answer.headers["traceparent"].split("-")
    assert (version, trace) == ("00", "0af7651916cd43dd8448eb211c80319c")
    assert span != "b7ad6b7169203331"


def test_gateway__bodies_that_do_not_come_and_bodies_that_are_too_many(
    application: Callable[..., Any],
) -> None:
    import asyncio

    app = application(("alpha",), gateway={"limits": {"body_timeout_s": 0.05, "bodies_mib": 1}})

    async def post(messages: list[dict[str, Any]], hang: bool) -> tuple[int, bytes]:
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            if hang:
                await asyncio.sleep(30)
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": INFER, "query_string": b"",
                 "headers": [], "http_version": "1.1", "scheme": "http", "server": None,
                 "client": None, "raw_path": b"", "root_path": ""}  # fmt: skip
        await app(scope, receive, send)
        return (sent[0]["status"], sent[1]["body"]) if sent else (0, b"")

    chunk = {"type": "http.request", "body": bytes(600_000), "more_body": True}
    assert asyncio.run(post([dict(chunk)], hang=True))[0] == 408
    status, body = asyncio.run(post([dict(chunk), dict(chunk)], hang=True))
    assert status == 503
    assert b"large bodies" in body
    assert asyncio.run(post([dict(chunk)], hang=False)) == (0, b"")  # gone; nothing is said
    # What they held is free again.
    assert asyncio.run(post([dict(chunk)], hang=True))[0] == 408


def test_gateway__what_nobody_foresaw_is_a_problem_too(
    application: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:

    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("mimray.serving.api.routes.document", fail)
    with TestClient(application(("alpha",))) as client:
        response = client.get("/openapi.json")
    assert response.status_code == 500
    assert response.json()["error"] == "unexpected ZeroDivisionError"


def test_openai__shows_its_users_the_reason(
    application: Callable[..., Any], serve_application: Callable[..., Any]
) -> None:
    import openai

    with serve_application(application(("alpha",))) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="alpha", input="a cat")
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve("gamma")
    for error, said in ((refused.value, "neither a data URI nor base64"), (unknown.value, "gamma")):
        assert said in error.message
        assert (error.code, error.type) == (error.body["code"], error.body["type"])
    assert (refused.value.code, unknown.value.code) == ("invalid_request", "not_found")


@pytest.mark.parametrize(
    ("member", "status"),
    [
        ({"dtype": "float16"}, 400),
        ({"layers": "0"}, 400),
        ({"norm": False}, 400),
        ({"user": "somebody", "dimensions": None, "dtype": None}, 200),
    ],
)
def test_embeddings__do_what_is_asked_or_say_that_they_do_not(
    client: TestClient, picture: Callable[..., bytes], member: dict[str, Any], status: int
) -> None:
    text = base64.b64encode(picture(1)).decode()
    response = client.post("/v1/embeddings", json={"model": "alpha", "input": text, **member})
    assert response.status_code == status, response.text
    if status == 400:
        assert f"no member {min(member)!r}" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "written",
    [
        lambda data: base64.encodebytes(data).decode(),  # with line breaks
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: base64.b64encode(data).decode().rstrip("="),
        lambda data: "data:image/png;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
    ],
    ids=["lines", "url-safe", "unpadded", "data-uri"],
)
def test_base64__as_encoders_write_it(
    client: TestClient, reference: Callable[..., Any], picture: Callable[..., bytes],
    written: Callable[[bytes], str],
) -> None:  # fmt: skip
    data = picture(3)
    response = client.post("/v1/features?model=alpha", json={"images": [written(data)]})
    assert response.status_code == 200, response.text
    np.testing.assert_allclose(response.json()["data"][0]["pooled"], reference(data)[0], atol=1e-5)
    wrong = client.post("/v1/features?model=alpha", json={"images": ["a*b"]})
    assert wrong.status_code == 400


def test_features__one_level_of_the_pyramid_alone(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    url, npz = "/v1/features?model=alpha&outputs=", {"Accept": "application/x-npz"}
    one = client.post(f"{url}pyramid_32", content=picture(4), headers=npz)
    two = client.post(f"{url}pyramid_8,pooled", content=picture(4), headers=npz)
    for answer, names in ((one, ["pyramid_32"]), (two, ["pooled", "pyramid_8"])):
        with np.load(io.BytesIO(answer.content)) as found:
            metadata = json.loads(str(found["metadata"]))
            assert [output["name"] for output in metadata["outputs"]] == names
            assert sorted(set(found.files) - {"metadata"}) == names


def test_cors__for_the_origins_that_are_named_and_no_other(
    application: Callable[..., Any], picture: Callable[..., bytes]
) -> None:
    app = "https://app.example.org"
    key = {"key_sha256": hashlib.sha256(b"sesame").hexdigest()}
    made = application(("alpha",), gateway={"cors_origins": [app], **key})
    before = {"Access-Control-Request-Method": "POST",
              "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    url = "/v1/features?model=alpha"
    with TestClient(made) as client:
        asked = client.options(url, headers={"Origin": app, **before})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == app
        assert "authorization" in asked.headers["access-control-allow-headers"].lower()
        other = client.options(url, headers={"Origin": "https://evil.example", **before})
        assert other.status_code == 400
        assert "access-control-allow-origin" not in other.headers
        answer = client.post(
            url, content=picture(1), headers={"Origin": app, "Authorization": "Bearer sesame"}
        )
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == app
        assert "ETag" in answer.headers["access-control-expose-headers"]
        # A page has to be able to read why it was refused.
        refused = client.post(url, content=picture(1), headers={"Origin": app})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == app
    with TestClient(application(("alpha",))) as client:
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={
            "Origin": app}).headers  # fmt: skip
        assert client.options(url, headers={"Origin": app, **before}).status_code == 405


@pytest.mark.parametrize("origin", ["app.example.org", "https://a.org/path", "null", ""])
def test_cors__an_origin_that_is_none_is_refused(origin: str) -> None:
    from mimray.serving.config import check_config
    from mimray.trainers.errors import ConfigError

    with pytest.raises(ConfigError, match="cors_origins"):
        check_config({"models": {"m": {"bundle": "m"}}, "cors_origins": [origin]}, "serve")
