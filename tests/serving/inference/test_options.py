from __future__ import annotations

from typing import Any

import pytest

from mimray.serving.inference.options import EncoderInfo, Options, parse_options, pyramid_source
from mimray.serving.inference.placement import Sizing
from mimray.serving.wire.errors import InvalidRequestError, TooLargeError

INFO = EncoderInfo(
    depth=12, width=192, stride=16, strides=(16,) * 12, widths=(192,) * 12, trained=(224, 224),
    pooling="mean", has_class_token=True, max_input_pixels=512 * 512,
)  # fmt: skip


def test_parse_options__one_meaning_for_every_protocol() -> None:
    as_text = {"layers": "5, -1,2", "norm": "false", "pooling": "gem", "size": "keep:448",
               "dtype": "bf16", "pyramid": "true"}  # fmt: skip
    as_json = {**as_text, "norm": False, "pyramid": True, "dtype": "bfloat16"}
    expected = Options(
        pooled=True, layers=(2, 5, 11), pyramid=11, norm=False, pooling="gem",
        sizing=Sizing("keep", (448, 448)), dtype="bfloat16",
    )  # fmt: skip
    assert parse_options(as_text, INFO) == parse_options(as_json, INFO) == expected
    assert expected.names == (
        "pooled", "layer_2", "layer_5", "layer_11", "pyramid_4", "pyramid_8", "pyramid_16",
        "pyramid_32",
    )  # fmt: skip


def test_parse_options__named_outputs_decide() -> None:
    found = parse_options({"layers": "3"}, INFO, outputs=["layer_7", "pyramid_8", "tokens"])
    assert (found.pooled, found.tokens, found.layers, found.pyramid) == (False, True, (7,), 3)
    assert parse_options({}, INFO, outputs=["pooled"]) == Options()


@pytest.mark.parametrize(
    ("parameters", "outputs", "match"),
    [
        ({"layers": "a"}, [], "layers"),
        ({"layers": "12"}, [], "there is no layer 12"),
        ({"layers": "-13"}, [], "there is no layer -13"),
        ({"norm": "maybe"}, [], "norm"),
        ({"pooling": "max"}, [], "mean, cls or gem"),
        ({"dtype": "float8"}, [], "float32, float16"),
        ({"size": "230"}, [], "nearest that is: 224"),
        ({}, ["layer_12"], "layer_0 to layer_11"),
        ({}, ["nose"], "no output 'nose'"),
        ({}, ["pooled", "pooled"], "twice"),
    ],
)
def test_parse_options__refusals(parameters: Any, outputs: list[str], match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        parse_options(parameters, INFO, outputs=outputs)


def test_parse_options__what_an_encoder_cannot() -> None:
    with pytest.raises(TooLargeError):
        parse_options({"size": "1024"}, INFO)
    patch14 = EncoderInfo(2, 8, 14, (14, 14), (8, 8), (224, 224), "mean", False, 512 * 512)
    with pytest.raises(InvalidRequestError, match="patches of 14"):
        parse_options({"pyramid": "1"}, patch14)
    with pytest.raises(InvalidRequestError, match="no class token"):
        parse_options({"pooling": "cls"}, patch14)


def test_pyramid_source__a_stage_of_that_stride_or_the_base() -> None:
    stages = (4, 8, 16, 32)
    assert [pyramid_source(s, 3, stages) for s in stages] == [0, 1, 2, 3]
    assert [pyramid_source(s, 1, stages) for s in stages] == [0, 1, 1, 1]
    assert [pyramid_source(s, 11, (16,) * 12) for s in stages] == [11] * 4
