"""The applications Ray Serve runs: one a model, and one for everything else."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray import serve
from starlette.types import ASGIApp

from serving.app import model_app, root_app
from serving.handlers import ModelHandler
from serving.predictor import Predictor, PredictorLimits

ROOT_APPLICATION = "mimray"
# Admission is ours (`PredictorLimits.max_queue_size`), because what Serve itself refuses is
# plain text; this only has to be out of the way.
MAX_ONGOING_REQUESTS = 1000


@dataclass(frozen=True)
class ModelSettings:
    """What a replica needs to know to serve one model.

    Attributes:
        name: the model's name in the URL.
        bundle: directory of its bundle, readable on every node a replica may run on.
        device: see `Predictor`.
        num_threads: threads of the model on a CPU.
        limits: see `Predictor`.
        max_pictures: most pictures in one request.
        max_body_bytes: most bytes of a request body.
        key_hash: `hash_key` of the API key, None when none is needed.
    """

    name: str
    bundle: Path
    device: str = "auto"
    num_threads: int = 1
    limits: PredictorLimits = field(default_factory=PredictorLimits)
    max_pictures: int = 64
    max_body_bytes: int = 64 * 2**20
    key_hash: str | None = None


class ModelReplica:
    """Answers for one model."""

    def __init__(self, settings: ModelSettings) -> None:
        predictor = Predictor(
            settings.bundle,
            device=settings.device,
            num_threads=settings.num_threads,
            limits=settings.limits,
        )
        predictor.warm_up()
        self._settings = settings
        self._handler = ModelHandler(settings.name, predictor, max_pictures=settings.max_pictures)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes, built once the model is loaded."""
        return model_app(
            self._handler,
            key_hash=self._settings.key_hash,
            max_body_bytes=self._settings.max_body_bytes,
        )


class RootReplica:
    """Answers for the server as a whole."""

    def __init__(self, models: Sequence[str], key_hash: str | None) -> None:
        self._models = tuple(models)
        self._key_hash = key_hash

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes."""
        version = importlib.metadata.version("mimray")
        return root_app(self._states, version=version, key_hash=self._key_hash)

    async def _states(self) -> Mapping[str, bool]:
        # Blocks on the controller, so not on the event loop.
        applications = (await asyncio.to_thread(serve.status)).applications
        return {
            name: name in applications and applications[name].status == "RUNNING"
            for name in self._models
        }


def model_target(
    settings: ModelSettings, *, num_replicas: int, num_cpus: float, num_gpus: float
) -> serve.RunTarget:
    """One model as a Serve application behind its own route prefix."""
    deployment = serve.deployment(
        serve.ingress()(ModelReplica),
        name="model",
        num_replicas=num_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
    )
    return serve.RunTarget(
        deployment.bind(settings), name=settings.name, route_prefix=f"/v2/models/{settings.name}"
    )


def root_target(models: Sequence[str], *, key_hash: str | None) -> serve.RunTarget:
    """The application that answers for everything that is not a model."""
    deployment = serve.deployment(
        serve.ingress()(RootReplica),
        name="root",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return serve.RunTarget(
        deployment.bind(models, key_hash), name=ROOT_APPLICATION, route_prefix="/"
    )
