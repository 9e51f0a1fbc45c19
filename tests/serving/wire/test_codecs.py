from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mimray.serving.wire.codecs import (
    DTYPES,
    datatype_of,
    decode_binary,
    decode_json,
    encode_binary,
    encode_json,
    narrow_bfloat16,
    widen_bfloat16,
)
from mimray.serving.wire.errors import InvalidRequestError

datatypes = st.sampled_from(sorted(DTYPES))
shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, np.ndarray]:
    datatype = draw(datatypes)
    dtype = DTYPES[datatype]
    elements = None
    if dtype.kind == "f":
        elements = st.floats(allow_nan=False, allow_infinity=False, width=dtype.itemsize * 8)
    elif datatype == "BF16":  # the bits of all that are finite
        elements = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)
    return datatype, draw(hnp.arrays(dtype, draw(shapes), elements=elements))


@given(arrays())
def test_binary__round_trip(drawn: tuple[str, np.ndarray]) -> None:
    datatype, array = drawn
    back = decode_binary(memoryview(encode_binary(array)), datatype, array.shape)
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    assert datatype_of(back) == datatype
    np.testing.assert_array_equal(back, array)


@given(arrays())
def test_json__round_trip_flat_and_nested(drawn: tuple[str, np.ndarray]) -> None:
    datatype, array = drawn
    values = json.loads(json.dumps(encode_json(array), allow_nan=False))
    back = decode_json(values, datatype, array.shape)
    assert isinstance(back, np.ndarray)
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)
    if array.ndim and array.size:
        nested = np.array(values).reshape(array.shape).tolist()
        np.testing.assert_array_equal(decode_json(nested, datatype, array.shape), array)


@given(hnp.arrays(np.float32, shapes, elements=st.floats(width=32)))
@settings(deadline=None)  # torch is imported in the first case
def test_bfloat16__nearest_as_torch_has_it(values: np.ndarray) -> None:
    import torch

    bits = narrow_bfloat16(values)
    assert (bits.dtype, bits.shape) == (np.uint16, values.shape)
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    np.testing.assert_array_equal(widen_bfloat16(bits), expected)


def test_bfloat16__every_value_survives() -> None:
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    values = widen_bfloat16(bits)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(narrow_bfloat16(values)[numbers], bits[numbers])
    assert np.isnan(widen_bfloat16(narrow_bfloat16(values))[~numbers]).all()
    np.testing.assert_array_equal(widen_bfloat16(bits.T[::3]), values.T[::3])


def test_bfloat16__is_numbers_in_json() -> None:
    assert encode_json(narrow_bfloat16(np.float32([1.5, -2]))) == [1.5, -2.0]
    assert decode_json([1, 1e300], "BF16", (2,)).tolist() == [0x3F80, 0x7F80]  # type: ignore[union-attr]


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


def test_datatype__none_for_others() -> None:
    for dtype in (np.uint32, np.complex64, bool):
        with pytest.raises(InvalidRequestError, match="no protocol datatype"):
            encode_binary(np.zeros(1, dtype))


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
        ([128], "INT8", (1,)),
        ([-(2**31) - 1], "INT32", (1,)),
        ([0.5], "INT8", (1,)),
        (["1"], "BF16", (1,)),
        ([[1.0], [1.0, 2.0]], "BF16", (3,)),
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
