from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimray.serving.inference.placement import Sizing, described, parse_size, place
from mimray.serving.wire.errors import InvalidRequestError, TooLargeError

SIDES = st.integers(1, 3000)


@pytest.mark.parametrize(
    ("text", "sizing"),
    [
        ("224", Sizing("stretch", (224, 224))),
        ("448,640", Sizing("stretch", (448, 640))),
        ("448, 640", Sizing("stretch", (448, 640))),
        ("keep", Sizing("keep")),
        ("keep:1024", Sizing("keep", (1024, 1024))),
        ("keep:768,1024", Sizing("keep", (768, 1024))),
        ("native", Sizing("native")),
    ],
)
def test_parse_size(text: str, sizing: Sizing) -> None:
    assert parse_size(text) == sizing


@pytest.mark.parametrize("text", ["", "0", "keep:", "native:3", "1,2,3", "-16", "999999", "16x16"])
def test_parse_size__refuses(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="size"):
        parse_size(text)


@given(SIDES, SIDES, st.sampled_from(["stretch", "keep", "native"]))
def test_place__there_and_back(height: int, width: int, mode: str) -> None:
    sizing = Sizing(mode, None)  # type: ignore[arg-type]
    placement = place((height, width), sizing, trained=(48, 64), stride=16, max_pixels=10**8)
    rows, columns = placement.input_size
    assert rows % 16 == columns % 16 == 0
    assert 1 <= placement.shown_size[0] <= rows
    assert 1 <= placement.shown_size[1] <= columns
    there, back = np.array(placement.transform), np.array(placement.inverse)
    np.testing.assert_allclose(there @ back, np.eye(3), atol=1e-9)
    corner = there @ [width, height, 1]
    np.testing.assert_allclose(corner[:2], placement.valid_region[2:], rtol=1e-9)
    if mode == "native":
        assert abs(rows - height) <= 8 or rows == 16
    if mode == "keep":  # one side fills the input, the other has the picture's own aspect
        assert rows == placement.shown_size[0] or columns == placement.shown_size[1]
        scale = min(48 / height, 64 / width)
        assert abs(placement.shown_size[0] - height * scale) <= 1
        assert abs(placement.shown_size[1] - width * scale) <= 1


def test_place__limits() -> None:
    with pytest.raises(InvalidRequestError, match="nearest that is: 32,96"):
        place((9, 9), Sizing("stretch", (32, 90)), trained=(48, 64), stride=16, max_pixels=9999)
    with pytest.raises(TooLargeError):
        place((900, 900), Sizing("native"), trained=(48, 64), stride=16, max_pixels=9999)


def test_described__is_what_answers_carry() -> None:
    placement = place((70, 90), Sizing("keep"), trained=(48, 64), stride=16, max_pixels=9999)
    assert described(placement, 16) == {
        "source_size": [70, 90],
        "input_size": [48, 64],
        "grid": [3, 4],
        "stride": [16, 16],
        "transform": [[62 / 90, 0, 0], [0, 48 / 70, 0], [0, 0, 1]],
        "inverse": [[90 / 62, 0, 0], [0, 70 / 48, 0], [0, 0, 1]],
        "valid_region": [0, 0, 62, 48],
    }
