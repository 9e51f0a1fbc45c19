"""Ray Serve's configuration of an endpoint, and the applications that it names.

`mimray serve` runs the result of `serve_schema`; `--build` writes it for `serve deploy` and
KubeRay's RayService. Its `import_path`s mean `model` and `root`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from mimray.serving.config import GatewayConfig, ModelConfig, ReplicaConfig, ServeConfig
from mimray.serving.deploy.replicas import ROOT_APPLICATION, ModelReplica, RootReplica
from mimray.serving.deploy.settings import GatewaySettings, ModelSettings, Routing
from mimray.serving.operations.operation import MODEL_PATH
from mimray.trainers.storage import RunDir

# `Predictor.admit` refuses first: what Serve itself refuses is plain text.
MAX_ONGOING_REQUESTS = 1000
# A new replica starts before an old one ends, however few there are.
_SURGE_PERCENT = 100
# Longer than any request may take, so that a replica that goes has answered its last one.
_LAST_ANSWERS_S = 5
_SHUTDOWN_POLL_S = 0.2


@dataclass(frozen=True)
class Version:
    """The version that a reference means now.

    Attributes:
        reference: the reference, as it was written.
        bundle: the bundle's directory on this machine.
        number: the version's number; `1` for a bundle that is not registered.
        uri: the bundle's URI, from which every node fetches it; empty where nodes read `bundle`.
        heads: names and places of the heads that are registered with the version.
    """

    reference: str
    bundle: Path
    number: str
    uri: str = ""
    heads: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Served:
    """One model and the versions of it that are to be served now.

    Attributes:
        name: the model's name in the URL.
        config: the model's configuration, as in `serve.yaml`.
        stable: the version that answers.
        canary: the version that answers a share; None for none.
        is_split: True if the canary gets its share, False if it answers only requests that name it.
    """

    name: str
    config: ModelConfig
    stable: Version
    canary: Version | None = None
    is_split: bool = True

    @property
    def routing(self) -> Routing:
        """The applications of the versions, for the replicas."""
        applications = {self.stable.number: self.name}
        canary = self.config.canary
        if self.canary is None or canary is None:
            return Routing(default=self.stable.number, applications=applications)
        # One that is being promoted answers as the stable one already.
        applications.setdefault(self.canary.number, application_of(self.name, self.canary))
        if not self.is_split:
            return Routing(default=self.stable.number, applications=applications)
        return Routing(
            default=self.stable.number,
            applications=applications,
            canary=self.canary.number,
            share=canary.share,
        )


@dataclass(frozen=True)
class ReplicaResources:
    """Resources of a replica.

    Attributes:
        num_cpus: CPUs that Ray reserves.
        num_gpus: GPUs that Ray reserves.
        num_threads: CPU threads of the model.
    """

    num_cpus: float
    num_gpus: float
    num_threads: int


def heads_of(model: ModelConfig, version: Version) -> dict[str, str]:
    """Places of a version's heads by name: those registered with it, and the configuration's."""
    configured = {name: RunDir(place).uri for name, place in model.heads.items()}
    return {**dict(version.heads), **configured}


def application_of(name: str, canary: Version) -> str:
    """The name of the application of a version that is not the default."""
    return f"{name}@{canary.number}"


def serve_schema(
    config: ServeConfig,
    models: Sequence[Served],
    resources: Mapping[str, ReplicaResources],
    *,
    key_sha256: str | None,
    needs_key: bool,
) -> dict[str, Any]:
    """Write Ray Serve's configuration.

    Args:
        config: the endpoint's configuration.
        models: the models and their versions that are to be served now.
        resources: the resources of a replica, by model.
        key_sha256: SHA-256 of a key from the environment; None for none.
        needs_key: True if replicas refuse to start without a key.

    Source: Ray's `ServeDeploySchema`.
    """
    gateway = GatewaySettings(
        key_sha256=key_sha256,
        needs_key=needs_key,
        **config.model_dump(include=set(GatewayConfig.model_fields)),
    )
    applications = []
    for served in models:
        given = resources[served.name]
        applications.append(_application(config, served, served.stable, gateway, given))
        if served.canary is not None and served.config.canary is not None:
            applications.append(_application(config, served, served.canary, gateway, given))
    routings = {served.name: served.routing.model_dump(mode="json") for served in models}
    applications.append(
        {
            "name": ROOT_APPLICATION,
            "route_prefix": "/",
            "import_path": "mimray.serving.deploy.serve_schema:root",
            "args": gateway.model_dump(mode="json", exclude_defaults=True),
            "deployments": [{"name": "root", "user_config": routings}],
        }
    )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": applications,
    }


def _application(
    config: ServeConfig,
    served: Served,
    version: Version,
    gateway: GatewaySettings,
    resources: ReplicaResources,
) -> dict[str, Any]:
    model = served.config
    is_canary = version is not served.stable
    prefix = MODEL_PATH.format(name=served.name)
    settings = ModelSettings(
        name=served.name,
        bundle=version.uri or str(version.bundle),
        version=version.number,
        num_threads=resources.num_threads,
        urls=config.urls,
        gateway=gateway,
        **model.model_dump(include=set(ReplicaConfig.model_fields))
        | {"heads": heads_of(model, version)},
    )
    deployment: dict[str, Any] = {
        "name": "model",
        "ray_actor_options": {"num_cpus": resources.num_cpus, "num_gpus": resources.num_gpus},
        "user_config": served.routing.model_dump(mode="json"),
    }
    if model.autoscaling is None:
        deployment["num_replicas"] = 1 if is_canary else model.replicas
    else:
        scaling = model.autoscaling
        deployment["autoscaling_config"] = {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "initial_replicas": max(1, scaling.min_replicas),
            "target_ongoing_requests": scaling.target_requests,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "downscale_to_zero_delay_s": scaling.idle_s,
        }
    return {
        "name": application_of(served.name, version) if is_canary else served.name,
        "route_prefix": f"{prefix}/versions/{version.number}" if is_canary else prefix,
        "import_path": "mimray.serving.deploy.serve_schema:model",
        "args": settings.model_dump(mode="json", exclude_defaults=True),
        "deployments": [deployment],
    }


# Ray turns `args` into a model by itself only where annotations are not strings, hence the two
# calls of `model_validate`.


def model(args: Mapping[str, Any]) -> Application:
    """Build the application of one version of a model; `args` are `ModelSettings`."""
    settings = ModelSettings.model_validate(args)
    settings.gateway.require_keys()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    deployment = serve.deployment(
        serve.ingress()(ModelReplica),
        name="model",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **_lifecycle(settings.gateway),
    )
    return deployment.bind(settings)


def root(args: Mapping[str, Any]) -> Application:
    """Build the application of all other routes; `args` are `GatewaySettings`."""
    settings = GatewaySettings.model_validate(args)
    settings.require_keys()
    deployment = serve.deployment(
        serve.ingress()(RootReplica),
        name="root",
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        **_lifecycle(settings),
        ray_actor_options={"num_cpus": 0},
    )
    return deployment.bind(settings)


def _lifecycle(settings: GatewaySettings) -> dict[str, float]:
    """The options of a deployment for replacing and ending replicas."""
    return {
        "max_surge_percent": _SURGE_PERCENT,
        "graceful_shutdown_timeout_s": settings.limits.request_timeout_s + _LAST_ANSWERS_S,
        "graceful_shutdown_wait_loop_s": _SHUTDOWN_POLL_S,
    }
