"""Replicas of the Ray Serve applications: one a version of a model, and one for the rest."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from starlette.types import ASGIApp

from mimray import __version__
from mimray.serving.api.access_log import open_access_log
from mimray.serving.api.gateway import GatewayParts
from mimray.serving.api.keys import KeyRing, hash_key
from mimray.serving.api.routes import model_app, root_app
from mimray.serving.config import API_KEY_VARIABLE
from mimray.serving.deploy.build_service import build_service
from mimray.serving.deploy.replica_ports import close_to_others
from mimray.serving.deploy.settings import GatewaySettings, ModelSettings, Routing
from mimray.serving.operations.calls import Call, Reply, problem_reply
from mimray.serving.operations.metadata import DESCRIBE
from mimray.serving.operations.operation import Computation
from mimray.serving.operations.table import OPERATIONS
from mimray.serving.telemetry.metrics import Metrics, exposition
from mimray.serving.telemetry.tracing import Tracer
from mimray.serving.wire.errors import OverloadedError, UnknownModelError

logger = logging.getLogger(__name__)

ROOT_APPLICATION = "mimray"
# Asking the controller takes a few milliseconds, and probes come often.
_STATUS_AGE_S = 0.5
# A replica may die with a call in it; the next one gets the call, too.
_ATTEMPTS = 3


class ModelReplica:
    """Answers for one version of one model."""

    def __init__(self, settings: ModelSettings) -> None:
        close_to_others()
        self._settings = settings
        self._service = build_service(
            settings, num_threads=settings.num_threads or _assigned_cpus()
        )
        self._routing: Routing | None = None
        # Half of the time is left for the stable version.
        self._canary_timeout_s = settings.gateway.limits.request_timeout_s / 2
        self._peers = _Applications()
        self._gateway = gateway_parts(settings.gateway)

    def reconfigure(self, routing: dict[str, Any]) -> None:
        """Take the model's versions from Ray Serve."""
        self._routing = Routing.model_validate(routing)
        self._service.model.versions = tuple(self._routing.applications)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes, built once the model is loaded."""
        return model_app(self._settings.name, self.answer, self._gateway)

    def __del__(self) -> None:
        """End the replica; Ray Serve calls this."""
        if hasattr(self, "_gateway"):
            self._gateway.close()
            self._service.close()

    async def answer(self, call: Call) -> Reply:
        """Answer a call, or have the canary answer it."""
        routing = self._routing
        if (
            routing is not None
            and routing.canary is not None
            and call.version is None
            and isinstance(OPERATIONS.get(call.operation), Computation)
            and random.random() < routing.share
        ):
            try:
                # Named, or the canary would split it again.
                named = replace(call, version=routing.canary)
                async with asyncio.timeout(self._canary_timeout_s):
                    reply = await self._peers.ask(routing.applications[routing.canary], named)
            except Exception as error:  # no failure of a canary may reach a client
                logger.warning("canary %s did not answer: %r", routing.canary, error)
            else:
                if reply.status < 400:
                    return reply
                # A refusal may be the canary's own: it may lack a head that the stable one has.
                if reply.status >= 500:
                    logger.warning("canary %s answered %d", routing.canary, reply.status)
        return await self._service.answer(call)


class RootReplica:
    """Answers for the server as a whole."""

    def __init__(self, settings: GatewaySettings) -> None:
        close_to_others()
        self._timeout_s = settings.limits.request_timeout_s
        self._gateway = gateway_parts(settings)
        self._models: dict[str, Routing] = {}
        self._states: dict[str, bool] = {}
        self._applications: dict[str, Any] = {}
        # Kept, so that listing models does not wake those that scaled to zero.
        self._descriptions: dict[str, Reply] = {}
        self._peers = _Applications()
        self._asked = -_STATUS_AGE_S

    def reconfigure(self, models: dict[str, Any]) -> None:
        """Take the models and their versions from Ray Serve."""
        self._models = {name: Routing.model_validate(tree) for name, tree in models.items()}
        self._descriptions.clear()
        self._asked = -_STATUS_AGE_S

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes."""
        return root_app(
            self._ready,
            self._ask,
            self._gateway,
            version=__version__,
            metrics=exposition,
        )

    def __del__(self) -> None:
        """End the replica; Ray Serve calls this."""
        if hasattr(self, "_gateway"):
            self._gateway.close()

    async def _ready(self) -> Mapping[str, bool]:
        if time.monotonic() - self._asked >= _STATUS_AGE_S:
            # Blocks on the controller, so not on the event loop.
            self._applications = (await asyncio.to_thread(serve.status)).applications
            self._asked = time.monotonic()
            self._states = {name: self._is_ready(name) for name in self._models}
        return self._states

    def _is_ready(self, name: str) -> bool:
        """True if a model answers.

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
        if call.operation == DESCRIBE.name and name in self._descriptions:
            return self._descriptions[name]
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._peers.ask(application, call)
        except TimeoutError:
            return problem_reply(OverloadedError(f"model {name!r} did not answer in time"))
        except Exception as error:  # the replica or its application is gone
            logger.warning("%s did not answer: %r", application, error)
            return problem_reply(OverloadedError(f"model {name!r} cannot be reached"))
        if call.operation == DESCRIBE.name and _is_current(reply, routing):
            self._descriptions[name] = reply
        return reply


def _is_current(description: Reply, routing: Routing) -> bool:
    """True if a description is of today's versions; replicas learn of a rollout one by one."""
    if description.status != 200:
        return False
    told = json.loads(description.body)
    return (told["version"], told["versions"]) == (routing.default, [*routing.applications])


class _Applications:
    """Other applications; their handles are kept, as Serve gives out none during a change."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    async def ask(self, application: str, call: Call) -> Reply:
        """Have an application answer a call; sent again if its replica dies."""
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


def gateway_parts(settings: GatewaySettings) -> GatewayParts:
    """Build the parts of a replica's gateway.

    Raises:
        ServingError: a key is needed and none is set.
    """
    settings.require_keys()
    hashes = [settings.key_sha256] if settings.key_sha256 else []
    if os.environ.get(API_KEY_VARIABLE):
        hashes.append(hash_key(os.environ[API_KEY_VARIABLE]))
    return GatewayParts(
        limits=settings.limits,
        keys=KeyRing(settings.keys, hashes) if hashes or settings.keys else None,
        access_log=open_access_log(settings.access_log),
        tracer=Tracer(),
        metrics=Metrics("", ""),
        cors_origins=settings.cors_origins,
    )


def _assigned_cpus() -> int:
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))
