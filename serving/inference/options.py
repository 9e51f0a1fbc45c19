"""Options of a request for features: one set of words for every protocol."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

from mimray.serving.inference.placement import Sizing, check_input, parse_size
from mimray.serving.wire.bodies import Dtype, Pooling
from mimray.serving.wire.errors import InvalidRequestError
from mimray.trainers.data.geometry import Size

PYRAMID_STRIDES: tuple[int, ...] = (4, 8, 16, 32)
NAMES = ("layers", "pooling", "norm", "pyramid", "size", "dtype")
"""The names of all options."""

# The protocols spell types in their own ways.
_DTYPES: dict[str, Dtype] = {
    **{name: name for name in get_args(Dtype)},
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}
_LAYER_OUTPUT = re.compile(r"layer_(0|[1-9][0-9]{0,3})")
_INTEGER = re.compile(r"-?[0-9]{1,4}")
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class EncoderInfo:
    """The dimensions of an encoder, which options are checked against.

    Attributes:
        depth: number of layers.
        width: channels of the tokens.
        stride: pixels between neighbouring tokens.
        strides: pixels between neighbouring positions of each layer's map.
        widths: channels of each layer's map.
        trained: (height, width) of the input the encoder was trained at, pixels.
        pooling: the encoder's own way of pooling.
        has_class_token: True if there is a class token.
        max_input_pixels: most pixels of an input.
    """

    depth: int
    width: int
    stride: int
    strides: tuple[int, ...]
    widths: tuple[int, ...]
    trained: Size
    pooling: Pooling
    has_class_token: bool
    max_input_pixels: int


@dataclass(frozen=True)
class Options:
    """The outputs to compute; pictures share a batch only with equal options.

    Attributes:
        pooled: True if the pooled vector is wanted.
        tokens: True if the patch tokens are wanted.
        layers: layers whose feature maps are wanted, counted from 0, rising.
        pyramid: the layer that maps of strides 4, 8, 16 and 32 are derived from; None for no such
            maps.
        levels: strides of those of these maps that are wanted.
        norm: True if the final norm is applied to maps; tokens and pooled always have it.
        pooling: the way that tokens become the pooled vector.
        sizing: the way that pictures are brought to the model's input.
        dtype: the type of every output.
        heads: trained heads that are asked instead of any of these, each of which brings the
            picture to the model's input in its own way.
    """

    pooled: bool = True
    tokens: bool = False
    layers: tuple[int, ...] = ()
    pyramid: int | None = None
    levels: tuple[int, ...] = PYRAMID_STRIDES
    norm: bool = True
    pooling: Pooling = "mean"
    sizing: Sizing = field(default_factory=Sizing)
    dtype: Dtype = "float32"
    heads: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return (
            *(("pooled",) if self.pooled else ()),
            *(("tokens",) if self.tokens else ()),
            *(f"layer_{layer}" for layer in self.layers),
            *(() if self.pyramid is None else (f"pyramid_{s}" for s in self.levels)),
        )


def parse_options(
    parameters: Mapping[str, object],
    info: EncoderInfo,
    *,
    outputs: Sequence[str] = (),
    default: Iterable[str] = ("pooled",),
) -> Options:
    """Read the options of a request.

    Args:
        parameters: the request's parameters by name; values are text, or of their own type where a
            protocol has types.
        info: the encoder's dimensions.
        outputs: names of the outputs asked for. If none is, `default` is given, and the maps of
            `layers` and `pyramid`.
        default: names of the outputs given by default, of `pooled` and `tokens`.

    Raises:
        InvalidRequestError: a value that is not allowed; the message names it.
        TooLargeError: a `size` beyond the limit.
    """
    layers = _layers(parameters.get("layers"), info)
    pyramid = _flag(parameters, "pyramid", default=False)
    base = layers[-1] if layers else info.depth - 1
    names, levels = set(outputs), PYRAMID_STRIDES
    if len(names) != len(outputs):
        raise InvalidRequestError("an output is asked for twice")
    if outputs:
        layers = tuple(sorted(i for i in range(info.depth) if f"layer_{i}" in names))
        levels = tuple(s for s in PYRAMID_STRIDES if f"pyramid_{s}" in names)
        pyramid = bool(levels)
        _check_outputs(names, info)
    else:
        names = set(default)
    if pyramid:
        _check_pyramid(info)
    sizing = _sizing(parameters.get("size"), info)
    return Options(
        pooled="pooled" in names,
        tokens="tokens" in names,
        layers=layers,
        pyramid=base if pyramid else None,
        levels=levels if pyramid else PYRAMID_STRIDES,
        norm=_flag(parameters, "norm", default=True),
        pooling=_pooling(parameters.get("pooling"), info),
        sizing=sizing,
        dtype=_dtype(parameters.get("dtype")),
    )


def pyramid_source(stride: int, base: int, strides: Sequence[int]) -> int:
    """The layer that a level of the pyramid is made from: the deepest of its stride, or `base`."""
    return next((i for i in range(base, -1, -1) if strides[i] == stride), base)


def _layers(value: object, info: EncoderInfo) -> tuple[int, ...]:
    if value is None or value == "":
        return ()
    words = [word.strip() for word in str(value).split(",")]
    if not all(_INTEGER.fullmatch(word) for word in words):
        raise InvalidRequestError(
            f"parameter `layers` is {str(value)[:40]!r}", hint="use numbers, such as 2,5,8,11"
        )
    found = set()
    for number in map(int, words):
        layer = number + info.depth if number < 0 else number
        if not 0 <= layer < info.depth:
            raise InvalidRequestError(
                f"there is no layer {number}", hint=f"there are 0 to {info.depth - 1}"
            )
        found.add(layer)
    return tuple(sorted(found))


def _check_outputs(names: set[str], info: EncoderInfo) -> None:
    levels = {f"pyramid_{s}" for s in PYRAMID_STRIDES}
    for name in sorted(names - {"pooled", "tokens"} - levels):
        found = _LAYER_OUTPUT.fullmatch(name)
        if not found or int(found[1]) >= info.depth:
            raise InvalidRequestError(
                f"there is no output {name[:40]!r}",
                hint=f"there are pooled, tokens, layer_0 to layer_{info.depth - 1} and "
                f"{', '.join(sorted(levels, key=len))}",
            )


def _check_pyramid(info: EncoderInfo) -> None:
    for stride in PYRAMID_STRIDES:
        if max(stride, info.stride) % min(stride, info.stride):
            raise InvalidRequestError(
                f"a pyramid of strides {list(PYRAMID_STRIDES)} cannot be made from patches of "
                f"{info.stride} pixels",
                hint="ask for layers, and resample them where you need",
            )


def _sizing(value: object, info: EncoderInfo) -> Sizing:
    if value is None or value == "":
        return Sizing()
    sizing = parse_size(str(value))
    if sizing.size is not None:
        check_input(sizing.size, stride=info.stride, max_pixels=info.max_input_pixels)
    return sizing


def _pooling(value: object, info: EncoderInfo) -> Pooling:
    if value is None or value == "":
        return info.pooling
    if value not in get_args(Pooling):
        raise InvalidRequestError(
            f"parameter `pooling` is {str(value)[:40]!r}", hint="use mean, cls or gem"
        )
    if value == "cls" and not info.has_class_token:
        raise InvalidRequestError("this encoder has no class token", hint="use mean or gem")
    return cast(Pooling, value)


def _dtype(value: object) -> Dtype:
    found = _DTYPES.get(str(value or "float32").lower())
    if found is None:
        raise InvalidRequestError(
            f"parameter `dtype` is {str(value)[:40]!r}",
            hint="use float32, float16, bfloat16 or int8",
        )
    return found


def _flag(parameters: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = parameters.get(name)
    if value is None or value == "":
        return default
    word = str(value).lower()
    if word not in _TRUE + _FALSE:
        raise InvalidRequestError(f"parameter `{name}` must be true or false")
    return word in _TRUE
