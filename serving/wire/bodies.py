"""JSON bodies of requests and answers: the server and the client check them by these models.

The OpenAPI document shows them. Unknown members are ignored: a peer may send more.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mimray.serving.wire.errors import REFUSALS

Pair = tuple[int, int]
Row = tuple[float, float, float]
Dtype = Literal["float32", "float16", "bfloat16", "int8"]
Pooling = Literal["mean", "cls", "gem"]
Parameters = dict[str, str | int | float | bool | None]


class Body(BaseModel):
    """A JSON object; members it does not name are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class OipBody(Body):
    """A body of the Open Inference Protocol; values are of their exact JSON type."""

    model_config = ConfigDict(strict=True)


class Tensor(OipBody):
    """A tensor: its values are in `data`, or raw bytes after the JSON part."""

    name: str
    datatype: str
    shape: list[int] = Field(max_length=8)
    parameters: Parameters = {}
    data: Any = None


class RequestedOutput(OipBody):
    """An output that is asked for."""

    name: str
    parameters: Parameters = {}


class InferRequest(OipBody):
    """An inference request of the Open Inference Protocol."""

    id: str | None = None
    parameters: Parameters = {}
    inputs: list[Tensor] = Field(min_length=1)
    outputs: list[RequestedOutput] = []


class InferResponse(OipBody):
    """An inference response of the Open Inference Protocol."""

    model_name: str
    model_version: str = ""
    id: str | None = None
    parameters: Parameters = {}
    outputs: list[Tensor]


class UnusablePicture(Body):
    """A picture that cannot be decoded, by its index in the request."""

    index: int
    reason: str
    message: str


class OpenAIError(Body):
    """A refusal in the words of OpenAI's API, as its clients show it."""

    message: str
    type: str
    param: str | None
    code: str


class Problem(Body):
    """A refusal (RFC 9457), with the `error` member of the Open Inference Protocol.

    On routes of OpenAI's API, `/v1/embeddings` and `/v1/models`, `error` is an object.
    """

    type: str
    title: str
    status: int
    code: str = Field(json_schema_extra={"enum": [r["code"] for r in REFUSALS.values()]})
    detail: str
    error: str | OpenAIError
    pictures: list[UnusablePicture] = []


class Model(Body):
    """A model; one that is ready describes itself in further members."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    ready: bool


class Models(Body):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class Geometry(Body):
    """The position of a picture in the model's input, in continuous pixels.

    Sizes, grid and stride are (vertical, horizontal). `transform` maps (x, y, 1) of the picture to
    the input, `inverse` maps back; `valid_region` is (left, top, right, bottom) of the input.
    """

    source_size: Pair
    input_size: Pair
    grid: Pair
    stride: Pair
    transform: tuple[Row, Row, Row]
    inverse: tuple[Row, Row, Row]
    valid_region: tuple[float, float, float, float]


class PooledPicture(Geometry):
    """The pooled vector of one picture."""

    index: int
    pooled: list[float]


class Features(Body):
    """Pooled vectors of pictures."""

    model: str
    version: str
    metadata: dict[str, Any]
    data: list[PooledPicture]


class Embedding(Body):
    """The pooled vector of one picture, as numbers or as base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Body):
    """Pooled vectors of pictures, in the words of OpenAI's API."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: dict[str, Any]


class Panel(Body):
    """A picture that explains a prediction, as a data URI."""

    title: str
    image: str


class Reconstruction(Body):
    """A model's prediction of a picture of which it saw a part; pictures are data URIs.

    In `mask`, row-major over `grid`, 1 is hidden; models that hide nothing have no mask.
    """

    mask_ratio: float | None
    grid: Pair
    mask: list[Literal[0, 1]] | None
    masked: str | None
    reconstruction: str | None
    raw: str | None
    panels: list[Panel]


class RunLengths(Body):
    """A mask in COCO's compressed run lengths, as pycocotools reads them; `size` is (h, w)."""

    size: Pair
    counts: str


Mask = RunLengths | str
"""A mask of the size of the picture: run lengths, or a PNG as a data URI."""


class Region(Body):
    """The pixels of one class, of which there are some on the picture."""

    label: str
    index: int
    pixels: int
    share: float
    mask: RunLengths | None = None


class Segmentation(Body):
    """A class for each pixel of a picture: regions, the largest first.

    `map` holds the index of each pixel's class, as rows or as a PNG in a data URI.
    """

    task: Literal["segmentation"]
    regions: list[Region]
    map: list[list[int]] | str | None = None


class Object(Body):
    """An object on a picture; its box is (left, top, right, bottom) in the picture's pixels."""

    label: str
    index: int
    score: float
    box: tuple[float, float, float, float]
    mask: Mask | None = None


class Detection(Body):
    """Objects on a picture, the best first."""

    task: Literal["detection"]
    objects: list[Object]


class ClassScore(Body):
    """The score of one class."""

    label: str
    index: int
    score: float


class Classification(Body):
    """The class of a picture, and the scores of classes, the best first."""

    task: Literal["classification"]
    label: str
    scores: list[ClassScore]


Finding = Annotated[Segmentation | Detection | Classification, Field(discriminator="task")]
"""The prediction of one head for one picture."""


class PredictedSize(Body):
    """(h, w) of a picture that heads looked at."""

    source_size: Pair


class PredictedPicture(PredictedSize):
    """Predictions for one picture, by the names of the heads."""

    index: int
    heads: dict[str, Finding]


class HeadCard(Body):
    """A trained head that is served."""

    task: Literal["segmentation", "detection", "classification"]
    class_names: list[str]
    input_size: Pair
    sha256: str


class Predictions(Body):
    """Predictions of a model's heads for pictures."""

    model: str
    version: str
    weights_sha256: str
    heads: dict[str, HeadCard]
    data: list[PredictedPicture]
