"""The configuration of an endpoint, `serve.yaml`; every key but `models` has a default.

models:
  photos: {bundle: photos@champion, replicas: 2}
  drawings:
    bundle: runs/drawings
    autoscaling: {min_replicas: 0, max_replicas: 4}
keys: keys.json
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from mimray.trainers.config.base import Config
from mimray.trainers.config.explain import explain
from mimray.trainers.errors import ServingError

API_KEY_VARIABLE = "MIMRAY_API_KEY"
"""The environment variable that holds one key, where no file of keys is needed."""

MIB = 2**20
HTTPS_PORT = 443
_HINT = "see docs/serving.md for the keys"


def parse_share(value: Any) -> Any:
    """Read a share of requests, `10%` or 0.1.

    Raises:
        ValueError: it is not between 0 and 1.
    """
    text = str(value).strip()
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise ValueError(f"{text!r} is no share between 0 and 1, such as 10%")
    return share


Share = Annotated[float, BeforeValidator(parse_share)]
Origin = Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.\-\[\]:]+)$")]
HeadName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Autoscaling(Config):
    """A number of replicas that follows the load.

    Attributes:
        min_replicas: fewest replicas. With 0 an idle model is unloaded, and the next request waits
            until it is loaded again.
        max_replicas: most replicas.
        target_requests: requests a replica has, answered now or waiting, that scaling aims for.
        upscale_delay_s: seconds that a higher load must last before a replica is added.
        downscale_delay_s: seconds that a lower load must last before a replica is removed.
        idle_s: seconds without a request before the last replica is removed.
    """

    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_requests: PositiveFloat = 8.0
    upscale_delay_s: NonNegativeFloat = 5.0
    downscale_delay_s: NonNegativeFloat = 120.0
    idle_s: NonNegativeFloat = 600.0

    @model_validator(mode="after")
    def _check_order(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}"
            )
        return self


class Canary(Config):
    """Another version that gets a share of the requests which name no version.

    Attributes:
        bundle: the other version, as in `ModelConfig`.
        share: share of the requests, `10%` or 0.1.
    """

    bundle: str
    share: Share


class ReplicaConfig(Config):
    """The part of a model's configuration that its replicas read.

    Attributes:
        device: `cpu`, `cuda`, or `auto` for a GPU where there is one.
        max_batch_size: most pictures in one pass through the model.
        batch_wait_ms: longest wait of a picture for others to fill its batch, while the model is
            free.
        max_queue_size: most pictures a replica admits before they are answered.
        max_wait_s: longest estimated wait; a request that would wait longer is refused.
        cache_mib: memory a replica keeps answers in, by the content of requests and the key that
            asks; 0 for none.
        compile: have torch compile the model. `auto` does on GPUs; on CPUs it has oneDNN compute
            the linear layers, which is faster and holds their weights in memory twice.
        jpeg_draft: decode large JPEGs at a fraction of their size, which is faster and changes
            pixels a little; heads never do.
        heads: folders or URIs of heads that `mimray evaluate` trained on the encoder, by the names
            they are asked for by.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_batch_size: PositiveInt = 16
    batch_wait_ms: NonNegativeFloat = 5.0
    max_queue_size: PositiveInt = 256
    max_wait_s: PositiveFloat = 20.0
    cache_mib: NonNegativeInt = 64
    compile: Literal["auto", True, False] = "auto"
    jpeg_draft: bool = False
    heads: dict[HeadName, str] = {}


class ModelConfig(ReplicaConfig):
    """One model of the endpoint.

    Attributes:
        bundle: folder or URI of a bundle or a run, or `NAME[@ALIAS|@vN]` of the registry. An alias
            is followed: when it moves to another version, that version is rolled in.
        replicas: number of replicas; excludes `autoscaling`.
        autoscaling: bounds and pace of a number of replicas that follows the load.
        num_cpus: cores of a replica, and its threads on a CPU; an equal share by default.
        num_gpus: GPUs of a replica, fractions allowed; an equal share by default.
        canary: another version that gets a share of the requests.
    """

    bundle: str
    replicas: PositiveInt = 1
    autoscaling: Autoscaling | None = None
    num_cpus: PositiveFloat | None = None
    num_gpus: NonNegativeFloat | None = None
    canary: Canary | None = None

    @model_validator(mode="after")
    def _check_replicas(self) -> ModelConfig:
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("replicas and autoscaling exclude each other")
        return self

    @property
    def most_replicas(self) -> int:
        """The most replicas there may be at once, but for a rollout."""
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas


class Limits(Config):
    """Bounds of requests and answers.

    Attributes:
        body_mib: most of a request's body, before and after inflating.
        bodies_mib: most of all bodies a replica holds at once.
        body_timeout_s: longest time a body may take to arrive; one of less than 64 KiB has 10 s.
        requests_per_source: most POSTs of one address that HAProxy holds at once, those whose body
            is on its way among them; more where a proxy before the endpoint is the one address.
        request_timeout_s: longest time an answer may take.
        pictures: most pictures of one request.
        picture_pixels: most pixels of one picture, checked before decoding.
        picture_frames: most frames of one file; only the first is used, but counting is work.
        request_pixels: most pixels of a request's pictures together, as decoded; what is beyond is
            refused before it is.
        decode_timeout_s: longest time to decode a picture that is neither JPEG, PNG nor WebP.
        input_pixels: most pixels of the model's input.
        answer_mib: most features of one answer.
    """

    body_mib: PositiveInt = 64
    bodies_mib: PositiveInt = 512
    body_timeout_s: PositiveFloat = 60.0
    requests_per_source: PositiveInt = 512
    request_timeout_s: PositiveFloat = 60.0
    pictures: PositiveInt = 64
    picture_pixels: PositiveInt = 50_000_000
    picture_frames: PositiveInt = 100
    request_pixels: PositiveInt = 1_000_000_000
    decode_timeout_s: PositiveFloat = 10.0
    input_pixels: PositiveInt = 1536 * 1536
    answer_mib: PositiveInt = 256


class Urls(Config):
    """Rules for pictures by URL; without allowed hosts none is fetched.

    Attributes:
        allowed_hosts: exact names, or `*.example.org` for those below one; `:port` for a port other
            than 443; IPv6 in brackets.
        max_mib: most of one picture.
        timeout_s: longest time one may take to arrive, redirects included.
    """

    allowed_hosts: tuple[str, ...] = ()
    max_mib: PositiveInt = 16
    timeout_s: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _check_hosts(self) -> Urls:
        _ = self._patterns
        return self

    def allow(self, host: str, port: int) -> bool:
        """True if a host is allowed; its name as on the wire, in lower-case ASCII."""
        return any(
            port == wanted and (host.endswith(f".{name}") if below else host == name)
            for below, name, wanted in self._patterns
        )

    @cached_property
    def _patterns(self) -> tuple[tuple[bool, str, int], ...]:
        return tuple(map(_host_pattern, self.allowed_hosts))


def _host_pattern(text: str) -> tuple[bool, str, int]:
    """An entry of `allowed_hosts`: True for the names below it, the name, the port."""
    import httpx2

    below = text.startswith("*.")
    try:
        url = httpx2.URL(f"https://{text.removeprefix('*.')}")
    except (httpx2.InvalidURL, ValueError):
        url = httpx2.URL("")
    name = url.raw_host.decode()
    rest = (url.userinfo, url.raw_path, url.fragment)
    if not name or "*" in name or rest != (b"", b"/", ""):
        raise ValueError(
            f"{text!r} in `urls.allowed_hosts` is no host (write example.org, *.example.org or "
            "example.org:8443)"
        )
    return below, name, url.port or HTTPS_PORT


class GatewayConfig(Config):
    """The part of an endpoint's configuration that the gateway of every replica reads.

    Attributes:
        keys: the file of `mimray keys`; on a cluster a path that every node can read.
        limits: bounds of requests and answers.
        access_log: `-` for standard output, a path, or none; by default among Ray's logs.
        cors_origins: origins whose pages browsers let ask the endpoint, such as
            `https://app.example.org`, or `*` for every one. None but its own page by default.
    """

    keys: Path | None = None
    limits: Limits = Limits()
    access_log: str | None = "ray"
    cors_origins: tuple[Origin, ...] = ()


class ServeConfig(GatewayConfig):
    """An endpoint.

    Attributes:
        host: address to listen on; any but loopback requires keys.
        port: port to listen on.
        models: the models by their names in the URL.
        urls: rules for pictures by URL.
        follow_s: seconds between two looks at the aliases.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    models: dict[str, ModelConfig] = Field(min_length=1)
    urls: Urls = Urls()
    follow_s: PositiveFloat = 5.0


def load_config(path: Path) -> dict[str, Any]:
    """Read the tree of a `serve.yaml`, which `check_config` checks.

    Raises:
        ServingError: it cannot be read.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ServingError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ServingError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ServingError(f"{path} holds no keys", hint=_HINT)
    return tree


def check_config(tree: dict[str, Any], origin: str) -> ServeConfig:
    """Check the tree of a `serve.yaml`.

    Args:
        tree: the keys and their values.
        origin: the tree's origin, for messages.

    Raises:
        ConfigError: keys or values that are not allowed.
    """
    try:
        return ServeConfig.model_validate(tree)
    except ValidationError as error:
        raise explain(error, tree, origin, keys=_keys(), hint=_HINT) from None


def _keys() -> list[str]:
    models = (ServeConfig, ModelConfig, Autoscaling, Canary, Limits, Urls)
    return [name for model in models for name in model.model_fields]
