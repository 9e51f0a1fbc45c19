"""The same features in every format, read back by whatever people read them with."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors import safe_open

from mimray.serving.inference.placement import described
from mimray.serving.inference.predictor import Prediction
from mimray.serving.operations.response_formats import (
    ARROW,
    JSON,
    METADATA_HEADER,
    NPY,
    NPZ,
    SAFETENSORS,
    WRITERS,
    Answer,
    negotiate,
)
from mimray.serving.wire.errors import ModelFailureError, NotAcceptableError
from mimray.trainers.data.geometry import whole_view


def _answer(
    names: tuple[str, ...] = ("pooled", "tokens"), dtype: str = "float32", tall: int = 0
) -> Answer:
    rng = np.random.default_rng(0)
    kind = {"bfloat16": np.uint16, "int8": np.int8}.get(dtype, dtype)
    predictions = []
    for index in range(2):
        rows = 6 + (tall if index else 0)
        shapes = {"pooled": (4,), "pooled_scale": (1,), "tokens": (rows, 4)}
        outputs = {name: (rng.normal(size=shapes[name]) * 9).astype(kind) for name in names}
        predictions.append(Prediction(outputs, whole_view((30, 40), (48, 64), keep_aspect=False)))
    pictures = [described(p.placement, 16) for p in predictions]
    metadata = {"model": "m", "version": "3", "dtype": dtype, "pictures": pictures}
    return Answer(names, predictions, metadata)


def _expected(answer: Answer, name: str) -> np.ndarray[Any, Any]:
    return np.stack([p.outputs[name] for p in answer.predictions])


def test_write_json__pooled_and_geometry() -> None:
    answer = _answer(("pooled",))
    tree = json.loads(WRITERS[JSON](answer)[0])
    found = np.array([row["pooled"] for row in tree["data"]], np.float32)
    np.testing.assert_array_equal(found, _expected(answer, "pooled"))
    assert tree["data"][1]["index"] == 1
    assert tree["data"][1]["transform"] == answer.metadata["pictures"][1]["transform"]
    assert "pictures" not in tree["metadata"]
    with pytest.raises(NotAcceptableError, match="tokens does not go into JSON"):
        WRITERS[JSON](_answer())
    answer.predictions[0].outputs["pooled"][0] = np.nan
    with pytest.raises(ModelFailureError, match="not finite"):
        WRITERS[JSON](answer)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_write_npy_and_npz(dtype: str) -> None:
    answer = _answer(("tokens",), dtype)
    body, headers = WRITERS[NPY](answer)
    np.testing.assert_array_equal(np.load(io.BytesIO(body)), _expected(answer, "tokens"))
    assert json.loads(headers[METADATA_HEADER]) == answer.metadata
    both = _answer(dtype=dtype)
    with pytest.raises(NotAcceptableError, match="pooled, tokens were asked for"):
        WRITERS[NPY](both)
    with np.load(io.BytesIO(WRITERS[NPZ](both)[0]), allow_pickle=False) as found:
        for name in both.names:
            np.testing.assert_array_equal(found[name], _expected(both, name))
        assert json.loads(str(found["metadata"])) == both.metadata


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "bfloat16"])
def test_write_safetensors(dtype: str, tmp_path: Any) -> None:
    answer = _answer(dtype=dtype)
    file = tmp_path / "x.safetensors"
    file.write_bytes(WRITERS[SAFETENSORS](answer)[0])
    with safe_open(file, framework="pt") as found:
        assert json.loads(found.metadata()["mimray"]) == answer.metadata
        for name in answer.names:
            tensor = found.get_tensor(name)
            assert str(tensor.dtype) == f"torch.{dtype}"
            expected = _expected(answer, name)
            if dtype == "bfloat16":
                wide = (expected.astype(np.uint32) << 16).view(np.float32)
                np.testing.assert_array_equal(tensor.float().numpy(), wide)
            else:
                np.testing.assert_array_equal(tensor.numpy(), expected)


def test_write_arrow__a_row_a_picture() -> None:
    answer = _answer(dtype="float16", tall=3)
    with pa.ipc.open_stream(WRITERS[ARROW](answer)[0]) as reader:
        table = reader.read_all()
    assert json.loads(table.schema.metadata[b"mimray"]) == answer.metadata
    assert table["source_size"].to_pylist() == [[30, 40]] * 2
    for index, prediction in enumerate(answer.predictions):
        for name, values in prediction.outputs.items():
            row = table.slice(index, 1).to_pylist()[0]
            found = np.array(row[name], np.float16).reshape(row[f"{name}_shape"])
            np.testing.assert_array_equal(found, values)


def test_arrays__of_pictures_that_differ_in_shape() -> None:
    answer = _answer(tall=3)
    with np.load(io.BytesIO(WRITERS[NPZ](answer)[0])) as found:
        assert found["pooled"].shape == (2, 4)
        assert (found["tokens.0"].shape, found["tokens.1"].shape) == ((6, 4), (9, 4))


@pytest.mark.parametrize("media", [NPY, NPZ, ARROW])
def test_writers__bfloat16_goes_where_it_has_a_name(media: str) -> None:
    with pytest.raises(NotAcceptableError, match="bfloat16"):
        WRITERS[media](_answer(("tokens",), "bfloat16"))


@pytest.mark.parametrize(
    ("accept", "media"),
    [
        ("", JSON),
        ("*/*", JSON),
        ("application/*", JSON),
        ("application/x-npz", NPZ),
        ("text/html, application/x-npy;q=0.5, application/json;q=0.4", NPY),
        ("application/json;q=0, */*;q=0.1", NPY),
        ("APPLICATION/X-SAFETENSORS", "application/x-safetensors"),
    ],
)
def test_negotiate(accept: str, media: str) -> None:
    assert negotiate(accept) == media


@pytest.mark.parametrize("accept", ["text/html", "*/*;q=0", "application/json;q=x"])
def test_negotiate__nothing_that_is_made_here(accept: str) -> None:
    with pytest.raises(NotAcceptableError, match="x-npz"):
        negotiate(accept)
