"""Trained heads behind the endpoint: what they find is what they find at hand."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as mask_api
from PIL import Image
from starlette.testclient import TestClient

from mimray.serving.client import Classification, Detection, FeatureClient, Segmentation
from mimray.serving.wire.run_lengths import decode_mask
from mimray.trainers import load_bundle
from mimray.trainers.evaluation.load_head import load_head
from tests.serving.heads import (
    NAMES,
    save_detection,
    save_knn,
    save_linear,
    save_segmentation,
)

# Of several aspects, one of the input's own size, one much larger.
SIZES = ((90, 70), (64, 48), (210, 160), (40, 120))


@pytest.fixture(scope="module")
def heads(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A head of each kind on model `alpha`."""
    encoder, folder = load_bundle(bundles["alpha"]), tmp_path_factory.mktemp("heads")
    return {
        "pixels": save_segmentation(folder / "pixels", encoder, head="fpn", head_width=16),
        "windows": save_segmentation(folder / "windows", encoder, scale=1.0),
        "masks": save_detection(folder / "masks", encoder),
        "boxes": save_detection(folder / "boxes", encoder, "retinanet"),
        "kind": save_linear(folder / "kind", encoder),
        "ridge": save_linear(folder / "ridge", encoder, solver="ridge"),
        "near": save_knn(folder / "near", encoder),
    }


@pytest.fixture(scope="module")
def client(application: Callable[..., Any], heads: dict[str, Path]) -> Iterator[TestClient]:
    limits = {"picture_pixels": 80_000, "pictures": 8}
    made = application(("alpha",), heads={"alpha": heads}, gateway={"limits": limits})
    with TestClient(made) as client:
        yield client


@pytest.fixture(scope="module")
def pictures(picture: Callable[..., bytes]) -> list[bytes]:
    return [picture(seed, size) for seed, size in enumerate(SIZES)]


def at_hand(bundle: Path, head: Path, pictures: list[bytes]) -> list[Any]:
    """What a head finds on each picture alone, without an endpoint."""
    loaded: Any = load_head(head, load_bundle(bundle))
    call = loaded.detect if hasattr(loaded, "detect") else loaded
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    return [found for image in images for found in call([image])]


def ask(client: TestClient, pictures: list[bytes], **query: object) -> dict[str, Any]:
    """The answer of `/v1/predict` to several pictures."""
    files = [("file", (str(i), data, "image/png")) for i, data in enumerate(pictures)]
    response = client.post("/v1/predict", params={"model": "alpha", **query}, files=files)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("name", ["pixels", "windows"])
def test_segmentation__is_that_at_hand_in_every_form(
    client: TestClient, bundles: dict[str, Path], heads: dict[str, Path], pictures: list[bytes],
    name: str,
) -> None:  # fmt: skip
    expected = at_hand(bundles["alpha"], heads[name], pictures)
    assert len(np.unique(np.concatenate([c.ravel() for c in expected]))) > 1
    answers = {form: ask(client, pictures, heads=name, masks=form)["data"] for form in
               ("rle", "png", "map", "none")}  # fmt: skip
    for index, classes in enumerate(expected):
        told = {form: rows[index]["heads"][name] for form, rows in answers.items()}
        assert answers["rle"][index]["source_size"] == list(classes.shape)
        np.testing.assert_array_equal(told["map"]["map"], classes)
        file = base64.b64decode(told["png"]["map"].partition(",")[2])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file))), classes)
        assert sum(region["pixels"] for region in told["rle"]["regions"]) == classes.size
        for region in told["rle"]["regions"]:
            assert region["label"] == NAMES[region["index"]]
            np.testing.assert_array_equal(
                mask_api.decode(region["mask"]).astype(bool), classes == region["index"]
            )
        assert "mask" not in told["none"]["regions"][0]
        assert "map" not in told["none"]


@pytest.mark.parametrize("name", ["masks", "boxes"])
def test_detection__is_that_at_hand_in_the_pictures_own_pixels(
    client: TestClient, bundles: dict[str, Path], heads: dict[str, Path], pictures: list[bytes],
    name: str,
) -> None:  # fmt: skip
    expected = at_hand(bundles["alpha"], heads[name], pictures)
    assert sum(len(found.scores) for found in expected) > 3
    rows = ask(client, pictures, heads=name)["data"]
    for row, found in zip(rows, expected, strict=True):
        objects = row["heads"][name]["objects"]
        np.testing.assert_allclose(
            np.reshape([o["box"] for o in objects], (-1, 4)), found.boxes, atol=1e-3
        )
        np.testing.assert_allclose([o["score"] for o in objects], found.scores, atol=1e-5)
        assert [o["index"] for o in objects] == found.labels.tolist()
        if found.masks is not None:
            for one, mask in zip(objects, found.masks, strict=True):
                np.testing.assert_array_equal(mask_api.decode(one["mask"]), mask_api.decode(mask))


def test_detection__best_ones_alone(client: TestClient, pictures: list[bytes]) -> None:
    (row,) = ask(client, pictures[:1], heads="masks")["data"]
    scores = [o["score"] for o in row["heads"]["masks"]["objects"]]
    assert scores == sorted(scores, reverse=True)
    (two,) = ask(client, pictures[:1], heads="masks", top=2)["data"]
    assert two["heads"]["masks"]["objects"] == row["heads"]["masks"]["objects"][:2]
    least = (scores[0] + scores[-1]) / 2
    (good,) = ask(client, pictures[:1], heads="masks", min_score=least)["data"]
    assert [o["score"] for o in good["heads"]["masks"]["objects"]] == [
        s for s in scores if s >= least
    ]
    (drawn,) = ask(client, pictures[:1], heads="masks", masks="png", top=1)["data"]
    uri = drawn["heads"]["masks"]["objects"][0]["mask"]
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))
    lengths = row["heads"]["masks"]["objects"][0]["mask"]
    np.testing.assert_array_equal(mask, 255 * mask_api.decode(lengths))


@pytest.mark.parametrize("name", ["kind", "ridge", "near"])
def test_classification__is_that_at_hand(
    client: TestClient, bundles: dict[str, Path], heads: dict[str, Path], pictures: list[bytes],
    name: str,
) -> None:  # fmt: skip
    expected = at_hand(bundles["alpha"], heads[name], pictures)
    rows = ask(client, pictures, heads=name)["data"]
    for row, scores in zip(rows, expected, strict=True):
        found = row["heads"][name]
        assert found["label"] == NAMES[scores.argmax()] == found["scores"][0]["label"]
        by_index = sorted(found["scores"], key=lambda entry: entry["index"])
        np.testing.assert_allclose([e["score"] for e in by_index], scores, atol=1e-5)
        if name != "ridge":
            assert sum(e["score"] for e in by_index) == pytest.approx(1)


def test_heads__of_one_view_share_a_pass(
    application: Callable[..., Any], heads: dict[str, Path], bundles: dict[str, Path],
    picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from mimray.serving.inference.heads import HeadSet

    passes: list[tuple[str, ...]] = []
    compute = HeadSet.compute

    def counted(self: HeadSet, images: Any, names: Any) -> Any:
        passes.append(tuple(names))
        return compute(self, images, names)

    monkeypatch.setattr(HeadSet, "compute", counted)
    places = {name: heads[name] for name in ("pixels", "masks", "kind")}
    with TestClient(application(("alpha",), heads={"alpha": places})) as client:
        passes.clear()
        # 64 x 48 is the input's own shape, so that stretched and kept aspects are one view.
        ask(client, [picture(1, (64, 48))])
        assert passes == [("pixels", "masks", "kind")]
        passes.clear()
        ask(client, [picture(1, (64, 70))])
        assert sorted(passes) == [("kind",), ("pixels", "masks")]


def test_protocol__and_client_tell_the_same(
    application: Callable[..., Any], heads: dict[str, Path], serve_application: Callable[..., Any],
    bundles: dict[str, Path], pictures: list[bytes],
) -> None:  # fmt: skip
    places = {name: heads[name] for name in ("pixels", "masks", "boxes", "kind")}
    made = application(("alpha",), heads={"alpha": places})
    with serve_application(made) as url, FeatureClient(url, batch_size=3) as client:
        found = client.predict(pictures, "alpha")
        array = np.asarray(Image.open(io.BytesIO(pictures[0])))
        (pixels,) = client.predict([array], "alpha", ["kind"])
        best = client.predict(pictures[:1], "alpha", ["masks"], top=1)[0]["masks"]
        assert client.predict([], "alpha") == []
        metadata = client.metadata("alpha")
    assert {"name": "head_masks", "datatype": "BYTES", "shape": [-1]} in metadata["outputs"]
    assert isinstance(pixels["kind"], Classification)
    for label, score in found[0]["kind"].scores.items():
        assert pixels["kind"].scores[label] == pytest.approx(score, abs=1e-6)
    assert isinstance(best, Detection)
    assert len(best.labels) == 1
    for index, row in enumerate(found):
        assert list(row) == list(places)
        segmented, detected, kind = row["pixels"], row["masks"], row["kind"]
        assert isinstance(segmented, Segmentation)
        assert isinstance(detected, Detection)
        assert isinstance(kind, Classification)
        one = pictures[index : index + 1]
        np.testing.assert_array_equal(
            segmented.classes, at_hand(bundles["alpha"], heads["pixels"], one)[0]
        )
        (expected,) = at_hand(bundles["alpha"], heads["masks"], one)
        np.testing.assert_allclose(detected.boxes, expected.boxes, atol=1e-3)
        assert len(detected.masks or ()) == len(expected.masks)
        for mask, lengths in zip(detected.masks or (), expected.masks, strict=True):
            np.testing.assert_array_equal(mask, mask_api.decode(lengths).astype(bool))
        assert sum(kind.scores.values()) == pytest.approx(1)
        assert len(repr(row)) < 600


def test_run_lengths__are_cocos() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 40, 2)
        mask = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
        told = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
        np.testing.assert_array_equal(decode_mask(told["counts"].decode(), (height, width)), mask)


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ({"heads": "nobody"}, 400, "there are pixels"),
        ({"heads": "kind,kind"}, 400, "twice"),
        ({"masks": "bmp"}, 400, "rle, png, map or none"),
        ({"min_score": "nan"}, 400, "min_score"),
        ({"top": "0"}, 400, "top"),
        ({"top": "²"}, 400, "top"),
        ({"layers": "1"}, 400, "there is no parameter"),
        ({"model": "gamma"}, 404, "gamma"),
        ({"version": "7"}, 404, "version"),
    ],
)
def test_predict__refuses_what_it_does_not_do(
    client: TestClient, picture: Callable[..., bytes], query: dict[str, str], status: int, said: str
) -> None:
    response = client.post("/v1/predict", params={"model": "alpha", **query}, content=picture(1))
    assert response.status_code == status, response.text
    assert said in response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_predict__refuses_pictures_that_it_cannot_use(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    response = client.post("/v1/predict?model=alpha", content=b"nothing")
    assert response.status_code == 422
    # Windows overlap: together they have more pixels than the picture.
    many = client.post("/v1/predict?model=alpha&heads=windows", content=picture(1, (280, 210)))
    assert (many.status_code, "windows" in many.text) == (413, True)
    floats = {"name": "image", "datatype": "FP32", "shape": [1, 3, 2, 2], "data": [0.0] * 12}
    body = {"inputs": [floats], "outputs": [{"name": "head_kind"}]}
    normalised = client.post("/v2/models/alpha/infer", json=body)
    assert (normalised.status_code, "normalised" in normalised.text) == (400, True)


def test_infer__features_and_heads_in_one_answer(
    client: TestClient, picture: Callable[..., bytes]
) -> None:
    image = {"name": "image", "datatype": "BYTES", "shape": [1],
             "data": [base64.b64encode(picture(1)).decode()]}  # fmt: skip
    named = [{"name": name} for name in ("head_kind", "pooled", "source_size")]
    body = {"inputs": [image], "outputs": named, "parameters": {"top": 1, "dtype": "int8"}}
    answer = client.post("/v2/models/alpha/infer", json=body)
    assert answer.status_code == 200, answer.text
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert list(outputs) == ["head_kind", "pooled", "pooled_scale", "source_size"]
    told = json.loads(base64.b64decode(outputs["head_kind"]["data"][0]))
    assert told["source_size"] == [70, 90]
    assert len(told["scores"]) == 1


def test_entity_tags__tell_heads_of_one_name_apart(
    application: Callable[..., Any], heads: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    def tag(head: str) -> str:
        made = application(("alpha",), heads={"alpha": {"kind": heads[head]}})
        with TestClient(made) as client:
            response = client.post("/v1/predict?heads=kind", content=picture(1))
            return str(response.headers["etag"])

    assert tag("kind") == tag("kind") != tag("ridge")


def test_model__without_heads(application: Callable[..., Any], picture: Any) -> None:
    with TestClient(application(("beta",))) as client:
        response = client.post("/v1/predict", content=picture(1))
        assert (response.status_code, "--head" in response.text) == (409, True)
        assert client.get("/v1/models/beta").json()["heads"] == {}


def test_model__describes_its_heads(client: TestClient) -> None:
    told = client.get("/v1/models/alpha").json()["heads"]
    assert told["pixels"] == {
        "task": "segmentation", "class_names": list(NAMES), "input_size": [48, 64],
        "sha256": told["pixels"]["sha256"],
    }  # fmt: skip
    assert len({head["sha256"] for head in told.values()}) == len(told)
    assert [told[name]["task"] for name in ("masks", "near")] == ["detection", "classification"]
