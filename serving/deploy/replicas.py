"""What Ray Serve runs: one application a version of a model, and one for everything else."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.types import ASGIApp

from mimray.serving.deploy.config import API_KEY_VARIABLE, Limits, Urls
from mimray.serving.operations.calls import Call, Reply, problem_reply
from mimray.serving.wire.errors import OverloadedError, UnknownModelError
from mimray.trainers.config.base import Config
from mimray.trainers.errors import ServingError

if TYPE_CHECKING:
    from mimray.serving.api.routes import EdgeParts

logger = logging.getLogger(__name__)

ROOT_APPLICATION = "mimray"
# Asking the controller takes a few milliseconds, and probes come often.
_STATUS_AGE_S = 0.5
_MIB = 2**20
# A replica may die with a call in it; the next one gets the call, too.
_ATTEMPTS = 3


class EdgeSettings(Config):
    """What every replica needs to know to admit requests.

    Attributes:
        keys: file of keys, readable on every node.
        key_sha256: digest of one more key.
        needs_key: refuse to start where there is none.
        limits: see there.
        access_log: see `ServeConfig`.
    """

    keys: Path | None = None
    key_sha256: str | None = None
    needs_key: bool = True
    limits: Limits = Limits()
    access_log: str | None = "ray"


class ModelSettings(Config):
    """What a replica needs to know to serve one version of a model.

    Attributes:
        name: the model's name in the URL.
        bundle: directory of its bundle, readable on every node a replica may run on.
        version: of the model.
        device: see `Predictor`; by default whatever Ray gave the replica.
        num_threads: threads of the model on a CPU; by default the CPUs Ray gave the replica.

    The others are as in `ModelConfig` and `ServeConfig`.
    """

    name: str
    bundle: Path
    version: str = "1"
    device: str = "auto"
    num_threads: int | None = None
    max_batch_size: int = 16
    batch_wait_ms: float = 5.0
    max_queue_size: int = 256
    max_wait_s: float = 20.0
    cache_mib: int = 64
    compile: str | bool = "auto"
    jpeg_draft: bool = False
    urls: Urls = Urls()
    edge: EdgeSettings = EdgeSettings()


class Routing(Config):
    """What changes without a restart: which versions of a model there are.

    Attributes:
        default: the version that answers where none is named.
        applications: of each version.
        canary: the version that gets a share of what names none.
        share: how much it gets.
    """

    default: str
    applications: dict[str, str]
    canary: str | None = None
    share: float = 0.0


class ModelReplica:
    """Answers for one version of one model."""

    def __init__(self, settings: ModelSettings) -> None:
        from mimray.serving.deploy.build_service import build_service

        self._settings = settings
        self._service = build_service(
            settings, num_threads=settings.num_threads or _assigned_cpus()
        )
        self._routing: Routing | None = None
        # So that there is time for the stable version when the canary does not answer.
        self._canary_timeout_s = settings.edge.limits.request_timeout_s / 2
        self._others = _Others()
        self._edge = edge_parts(settings.edge)

    def reconfigure(self, routing: dict[str, Any]) -> None:
        """Learn which versions there are now."""
        self._routing = Routing.model_validate(routing)
        self._service.versions = tuple(self._routing.applications)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes, built once the model is loaded."""
        from mimray.serving.api.routes import model_app

        return model_app(self._settings.name, self.answer, self._edge)

    def __del__(self) -> None:
        """Serve calls this as a replica ends."""
        if hasattr(self, "_edge"):
            self._edge.close()
            self._service.close()

    async def answer(self, call: Call) -> Reply:
        """Answer a call, or have the canary answer it."""
        routing = self._routing
        if (
            routing is not None
            and routing.canary is not None
            and call.version is None
            and call.operation in _SPLIT
            and random.random() < routing.share
        ):
            try:
                # Named, or the canary would split it again.
                named = replace(call, version=routing.canary)
                async with asyncio.timeout(self._canary_timeout_s):
                    reply = await self._others.ask(routing.applications[routing.canary], named)
            except Exception as error:  # whatever it is, a canary's fall is nobody's harm
                logger.warning("canary %s did not answer: %r", routing.canary, error)
            else:
                if reply.status < 500:
                    return reply
                logger.warning("canary %s answered %d", routing.canary, reply.status)
        return await self._service.answer(call)


# What is computed, as against what is told.
_SPLIT = ("infer", "features", "embeddings", "reconstruct")


class RootReplica:
    """Answers for the server as a whole."""

    def __init__(self, edge: EdgeSettings) -> None:
        self._timeout_s = edge.limits.request_timeout_s
        self._edge = edge_parts(edge)
        self._models: dict[str, Routing] = {}
        self._states: dict[str, bool] = {}
        self._applications: dict[str, Any] = {}
        # Kept, so that whoever lists models does not wake those that scaled to zero.
        self._descriptions: dict[str, Reply] = {}
        self._others = _Others()
        self._asked = -_STATUS_AGE_S

    def reconfigure(self, models: dict[str, Any]) -> None:
        """Learn which models there are now."""
        self._models = {name: Routing.model_validate(tree) for name, tree in models.items()}
        self._descriptions.clear()
        self._asked = -_STATUS_AGE_S

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes."""
        from mimray.serving.api.routes import root_app
        from mimray.serving.telemetry.metrics import exposition

        return root_app(
            self._ready,
            self._ask,
            self._edge,
            version=importlib.metadata.version("mimray"),
            metrics=exposition,
        )

    def __del__(self) -> None:
        """Serve calls this as a replica ends."""
        if hasattr(self, "_edge"):
            self._edge.close()

    async def _ready(self) -> Mapping[str, bool]:
        if time.monotonic() - self._asked >= _STATUS_AGE_S:
            # Blocks on the controller, so not on the event loop.
            self._applications = (await asyncio.to_thread(serve.status)).applications
            self._asked = time.monotonic()
            self._states = {name: self._is_ready(name) for name in self._models}
        return self._states

    def _is_ready(self, name: str) -> bool:
        """Whether a model answers.

        While a new version is rolled in, the old one does; a model that scaled to zero is woken.
        """
        routing = self._models[name]
        application = self._applications.get(routing.applications[routing.default])
        status = "NOT_STARTED" if application is None else application.status
        return status == "RUNNING" or (status == "DEPLOYING" and self._states.get(name, False))

    async def _ask(self, name: str, call: Call) -> Reply:
        routing = self._models[name]
        version = call.version or routing.default
        application = routing.applications.get(version)
        if application is None:
            known = ", ".join(routing.applications)
            return problem_reply(
                UnknownModelError(
                    f"{name} has no version {version[:40]!r}", hint=f"there are {known}"
                )
            )
        states = await self._ready()
        if not states.get(name) and application not in self._applications:
            return problem_reply(OverloadedError(f"model {name!r} is not ready"))
        if call.operation == "describe" and name in self._descriptions:
            return self._descriptions[name]
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._others.ask(application, call)
        except TimeoutError:
            return problem_reply(OverloadedError(f"model {name!r} did not answer in time"))
        except Exception as error:  # the replica or its application is gone
            logger.warning("%s did not answer: %r", application, error)
            return problem_reply(OverloadedError(f"model {name!r} cannot be reached"))
        if call.operation == "describe" and _is_current(reply, routing):
            self._descriptions[name] = reply
        return reply


def _is_current(description: Reply, routing: Routing) -> bool:
    """Whether a model's description is of the versions there are now: a rollout takes a while."""
    if description.status != 200:
        return False
    told = json.loads(description.body)
    return (told["version"], told["versions"]) == (routing.default, [*routing.applications])


class _Others:
    """Asks other applications, by handles kept: while one changes, Serve does not give out new."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    async def ask(self, application: str, call: Call) -> Reply:
        """A call answered there; sent again where its replica dies."""
        from ray.exceptions import RayActorError

        if application not in self._handles:
            self._handles[application] = serve.get_app_handle(application)
        for attempt in range(_ATTEMPTS):
            try:
                reply: Reply = await self._handles[application].answer.remote(call)
            except RayActorError:
                if attempt == _ATTEMPTS - 1:
                    raise
            else:
                return reply
        raise AssertionError("the last attempt returns or raises")


def edge_parts(settings: EdgeSettings) -> EdgeParts:
    """What stands before the routes of a replica.

    Raises:
        ServingError: keys are needed, and there are none.
    """
    from mimray.serving.api.access_log import open_access_log
    from mimray.serving.api.gateway import EdgeLimits
    from mimray.serving.api.keys import KeyRing, hash_key
    from mimray.serving.api.routes import EdgeParts
    from mimray.serving.telemetry.metrics import Metrics
    from mimray.serving.telemetry.tracing import Tracer

    require_keys(settings)
    hashes = [settings.key_sha256] if settings.key_sha256 else []
    if os.environ.get(API_KEY_VARIABLE):
        hashes.append(hash_key(os.environ[API_KEY_VARIABLE]))
    keys = KeyRing(settings.keys, hashes) if hashes or settings.keys else None
    limits = settings.limits
    return EdgeParts(
        limits=EdgeLimits(
            max_body_bytes=limits.body_mib * _MIB,
            max_bodies_bytes=limits.bodies_mib * _MIB,
            body_timeout_s=limits.body_timeout_s,
        ),
        keys=keys,
        access_log=open_access_log(settings.access_log),
        tracer=Tracer(),
        metrics=Metrics("", ""),
    )


def require_keys(settings: EdgeSettings) -> None:
    """Refuse to serve whoever comes where others can come.

    Raises:
        ServingError: keys are needed, and there are none.
    """
    known = settings.keys or settings.key_sha256 or os.environ.get(API_KEY_VARIABLE)
    if settings.needs_key and not known:
        raise ServingError(
            f"{API_KEY_VARIABLE} is not set, there is no file of keys, and others can reach this",
            hint="give it to every container from a Secret",
        )


def _assigned_cpus() -> int:
    import ray

    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
