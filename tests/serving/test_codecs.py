from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from serving.codecs import DTYPES, decode_binary, decode_json, encode_binary, encode_json
from serving.errors import InvalidRequestError

datatypes = st.sampled_from(sorted(DTYPES))
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    datatype = draw(datatypes)
    dtype = DTYPES[datatype]
    elements = (
        st.floats(allow_nan=False, allow_infinity=False, width=dtype.itemsize * 8)
        if dtype.kind == "f"
        else None
    )
    return datatype, draw(hnp.arrays(dtype, draw(shapes), elements=elements))


@given(arrays())
def test_binary__round_trip(drawn: tuple[str, np.ndarray]) -> None:
    datatype, array = drawn
    back = decode_binary(memoryview(encode_binary(array)), datatype, array.shape)
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@given(arrays())
def test_json__round_trip(drawn: tuple[str, np.ndarray]) -> None:
    datatype, array = drawn
    back = decode_json(encode_json(array), datatype, array.shape)
    np.testing.assert_array_equal(back, array)


@given(st.lists(st.binary(max_size=40), max_size=6))
def test_bytes__round_trip_both_ways(items: list[bytes]) -> None:
    shape = (len(items),)
    assert decode_binary(memoryview(encode_binary(items)), "BYTES", shape) == items
    assert decode_json(encode_json(items), "BYTES", shape) == items


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=4), st.data())
def test_bytes__cut_anywhere_is_refused(items: list[bytes], data: st.DataObject) -> None:
    whole = encode_binary(items)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(InvalidRequestError):
        decode_binary(memoryview(whole[:cut]), "BYTES", (len(items),))
    with pytest.raises(InvalidRequestError, match="follow"):
        decode_binary(memoryview(whole + b"x"), "BYTES", (len(items),))


@given(st.binary(max_size=64), datatypes, st.lists(st.integers(0, 4), max_size=3))
@settings(max_examples=200)
def test_binary__arbitrary_bytes_fill_the_shape_or_are_refused(
    data: bytes, datatype: str, shape: list[int]
) -> None:
    expected = int(np.prod(shape, dtype=int)) * DTYPES[datatype].itemsize
    if len(data) == expected:
        assert np.shape(decode_binary(memoryview(data), datatype, tuple(shape))) == tuple(shape)
    else:
        with pytest.raises(InvalidRequestError, match=str(expected)):
            decode_binary(memoryview(data), datatype, tuple(shape))


def test_binary__non_contiguous_array_is_row_major() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4).T
    np.testing.assert_array_equal(
        decode_binary(memoryview(encode_binary(array)), "FP32", (4, 3)), array
    )


@pytest.mark.parametrize(
    ("data", "datatype", "shape"),
    [
        ([[1, 2], [3]], "UINT8", (2, 2)),
        ([1, 2, 3], "UINT8", (2, 2)),
        ([[1, 2, 3, 4]], "UINT8", (2, 2)),
        ([256], "UINT8", (1,)),
        ([-1], "UINT8", (1,)),
        ([0.5], "UINT8", (1,)),
        ([True], "UINT8", (1,)),
        (["1"], "FP32", (1,)),
        ([None], "FP32", (1,)),
        ([10**30], "INT64", (1,)),
        ("abc", "BYTES", (3,)),
        (["not base64!"], "BYTES", (1,)),
        ([7], "BYTES", (1,)),
        (["aGk="], "BYTES", (1, 1)),
        (["aGk="], "BYTES", (2,)),
        ([1], "FP8", (1,)),
        (None, "FP32", (0,)),
    ],
)
def test_decode_json__refuses(data: object, datatype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        decode_json(data, datatype, shape)
