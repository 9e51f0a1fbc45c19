"""The two kinds of operations, and the model that they answer from."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mimray.serving.config import Limits, Urls
from mimray.serving.inference.options import EncoderInfo
from mimray.serving.inference.predictor import Predictor
from mimray.serving.inference.reconstructor import Reconstructor
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.calls import Call, Reply

if TYPE_CHECKING:
    from mimray.trainers.bundles import BundleCard

MODEL_PATH = "/v2/models/{name}"
_VERSION_PATH = MODEL_PATH + "/versions/{version}"


@dataclass
class Model:
    """One version of a model, as operations see it.

    Attributes:
        name: the model's name in the URL.
        version: the version that is loaded.
        versions: every version of the model that is served.
        predictor: computes features.
        reconstructor: predicts hidden patches.
        limits: the endpoint's limits, as in `serve.yaml`.
        urls: the rules for pictures by URL, as in `serve.yaml`.
        created_s: time the bundle was made, seconds since 1970.
        pictures: number of pictures answered so far.
        busy_s: seconds the model computed for them.
    """

    name: str
    version: str
    versions: tuple[str, ...]
    predictor: Predictor
    reconstructor: Reconstructor
    limits: Limits
    urls: Urls
    created_s: int
    pictures: int = 0
    busy_s: float = 0.0

    @property
    def card(self) -> BundleCard:
        """The bundle's description, bundle.json."""
        return self.predictor.card

    @property
    def info(self) -> EncoderInfo:
        """The encoder's dimensions."""
        return self.predictor.info


@dataclass(frozen=True)
class Operation:
    """One thing a model can be asked.

    Attributes:
        name: the operation's name in calls, metrics, logs and spans.
        path: its route; `{name}` stands for the model's name.
        summary: one line for the OpenAPI document.
        method: the HTTP method.
        model_in: the part of a request that names the model.
    """

    name: str
    path: str
    summary: str
    method: ClassVar[str]
    model_in: Literal["path", "query", "body"] = field(default="path", kw_only=True)

    @property
    def is_below_model(self) -> bool:
        """True if the route lies below the model's own path, which its replicas answer."""
        return self.path.startswith(MODEL_PATH)

    @property
    def paths(self) -> tuple[str, ...]:
        """The route and, below the model's own path, the same for a version."""
        if not self.is_below_model:
            return (self.path,)
        return self.path, self.path.replace(MODEL_PATH, _VERSION_PATH)


@dataclass(frozen=True)
class Description(Operation):
    """An operation that tells of the model; GET.

    Attributes:
        describe: makes the answer, to be written as JSON.
    """

    method = "GET"
    describe: Callable[[Model], dict[str, Any]]


@dataclass(frozen=True)
class Computation(Operation):
    """An operation that runs the model; POST, kept in the cache, and shared with a canary.

    Attributes:
        compute: makes the answer; gives the number of pictures, too.
    """

    method = "POST"
    compute: Callable[[Model, Call, Timeline], Awaitable[tuple[Reply, int]]]
