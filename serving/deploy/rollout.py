"""Rollouts: one version takes another's place without a failed request."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mimray.serving.config import ModelConfig, ServeConfig
from mimray.serving.deploy.serve_schema import (
    ReplicaResources,
    Served,
    Version,
    heads_of,
    serve_schema,
)
from mimray.serving.inference.heads import check_head
from mimray.trainers.errors import MimrayError, ResourceError, ServingError

logger = logging.getLogger(__name__)

Resolve = Callable[[str], Version]
"""Finds the version that a reference means now; raises a `MimrayError` if it means none."""

_POLL_S = 0.1
_FAILED = ("DEPLOY_FAILED", "UNHEALTHY")


class Rollout:
    """Brings Ray Serve to what the configuration and the registry say.

    Args:
        config: the endpoint's configuration.
        resolve: finds the version that a reference means.
        key_sha256: SHA-256 of a key from the environment; None for none.
        needs_key: True if replicas refuse to start without a key.
        start_timeout_s: longest wait for new replicas.

    Attributes:
        models: the models and their versions that are served now, by name.
        without_canary: the reason why a canary that is configured has no version, by model.
    """

    def __init__(
        self,
        config: ServeConfig,
        resolve: Resolve,
        *,
        key_sha256: str | None,
        needs_key: bool,
        start_timeout_s: float = 600.0,
    ) -> None:
        self.models: dict[str, Served] = {}
        self.without_canary: dict[str, str] = {}
        self._config = config
        self._resolve = resolve
        self._key_sha256 = key_sha256
        self._needs_key = needs_key
        self._start_timeout_s = start_timeout_s
        self._resources: dict[str, ReplicaResources] = {}
        # Bundles that were refused, so that each is complained of once.
        self._refused: set[Version] = set()

    def prepare(self) -> None:
        """Find and verify the versions to be served; nothing is started.

        Raises:
            BundleError: a bundle is missing or damaged.
            ServingError: a head does not belong to its encoder.
        """
        self.models = self._wanted()
        for served in self.models.values():
            for version in _versions(served):
                check_version(served.config, version)

    def start(self) -> None:
        """Start the versions that were prepared.

        Raises:
            ResourceError: the cluster cannot hold the replicas.
            ServingError: Ray Serve did not start them.
        """
        self._resources = replica_resources(self._config)
        self._deploy(self.models)

    def follow(self) -> list[str]:
        """Look references up once, and roll in the versions that they mean now.

        A bundle that is damaged or does not start is refused; the version before it goes on.

        Returns:
            A line of text for each model that changed or was refused.
        """
        try:
            wanted = self._wanted()
        except MimrayError as error:
            logger.warning("aliases cannot be looked up, nothing changes: %s", error)
            return []
        changed = {name: new for name, new in wanted.items() if new != self.models[name]}
        done = []
        for name, new in changed.items():
            if self._is_refused(new):
                continue
            try:
                for version in _versions(new):
                    check_version(new.config, version)
                for step in steps(self.models[name], new):
                    self._deploy({**self.models, name: step})
            except MimrayError as error:
                self._refused |= _versions(new) - _versions(self.models[name])
                done.append(f"{name}: {error}; goes on with {_shown(self.models[name])}")
                self._restore()
                continue
            done.append(f"{name}: {_shown(self.models[name])} → {_shown(new)}")
            self.models[name] = new
        return done

    def _wanted(self) -> dict[str, Served]:
        wanted = {}
        self.without_canary = {}
        for name, config in self._config.models.items():
            stable, canary = self._resolve(config.bundle), None
            if config.canary is not None:
                try:
                    canary = self._resolve(config.canary.bundle)
                except MimrayError as error:
                    # Nobody carries the alias yet, or nobody any more.
                    self.without_canary[name] = str(error)
            if canary is not None and canary.number == stable.number:
                self.without_canary[name] = f"it is version {stable.number} as well"
                canary = None
            wanted[name] = Served(name, config, stable, canary)
        return wanted

    def _is_refused(self, served: Served) -> bool:
        return bool(self._refused & _versions(served))

    def _restore(self) -> None:
        try:
            self._deploy(self.models)
        except ServingError as error:
            logger.error("what ran before does not come back: %s", error)

    def _deploy(self, models: Mapping[str, Served]) -> None:
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        tree = serve_schema(
            self._config,
            list(models.values()),
            self._resources,
            key_sha256=self._key_sha256,
            needs_key=self._needs_key,
        )
        client = _get_global_client()
        assert client is not None, "Serve was started before"
        client.deploy_apps(ServeDeploySchema.model_validate(tree))
        self._wait({application["name"] for application in tree["applications"]})

    def _wait(self, names: set[str]) -> None:
        from ray import serve

        deadline = time.monotonic() + self._start_timeout_s
        while time.monotonic() < deadline:
            applications = serve.status().applications
            states: dict[str, Any] = {name: applications.get(name) for name in names}
            for name, state in states.items():
                if state is not None and state.status in _FAILED:
                    raise ServingError(f"{name} did not start: {_reason(state)}")
            if all(s is not None and s.status == "RUNNING" for s in states.values()) and not (
                applications.keys() - names
            ):
                return
            time.sleep(_POLL_S)
        late = [
            name for name, state in states.items() if state is None or state.status != "RUNNING"
        ]
        raise ServingError(
            f"{', '.join(late)} did not start within {self._start_timeout_s:g} s",
            hint="is there room in the cluster for the replicas? `ray status` says",
        )


def steps(old: Served, new: Served) -> list[Served]:
    """Plan a rollout so that no request is handed to an application that does not run.

    A canary that goes loses its share before its application ends; one that comes gets its share
    once it runs. Replicas that are about to end hand requests on until they do.

    Args:
        old: the versions that are served now.
        new: the versions that are to be served.

    Returns:
        The states to serve one after the other; the last is `new`.
    """
    leaves = old.canary is not None and old.canary != new.canary
    arrives = new.canary is not None and old.canary != new.canary
    kept = replace(new, canary=old.canary, is_split=not leaves)
    found = [
        *([replace(old, is_split=False)] if leaves else []),
        *([kept] if old.stable != new.stable else []),
        *([replace(new, canary=None)] if leaves else []),
        *([replace(new, is_split=False)] if arrives else []),
    ]
    return [*(step for step in found if step != new), new]


def check_version(config: ModelConfig, version: Version) -> None:
    """Verify a bundle's checksum and architecture, and its heads, before anything is stopped.

    Args:
        config: configuration of the model.
        version: version to be served.

    Raises:
        BundleError: the bundle is missing or damaged.
        ServingError: a head does not belong to it.
    """
    from mimray.trainers.bundles import fetch_folder, load_bundle

    card = load_bundle(version.bundle).card
    for name, place in heads_of(config, version).items():
        check_head(name, fetch_folder(place), card)


def replica_resources(config: ServeConfig) -> dict[str, ReplicaResources]:
    """Resources of a replica of each model, checked against those of the cluster.

    Room is left for one more replica, which a rollout starts before it ends an old one: by default
    a replica reserves fewer CPUs than it has threads.

    Raises:
        ResourceError: the cluster cannot hold the replicas.
    """
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    counts = {
        name: model.most_replicas + (1 if model.canary is not None else 0)
        for name, model in config.models.items()
    }
    total = sum(counts.values())
    fixed = sum(counts[name] * (model.num_cpus or 0.0) for name, model in config.models.items())
    free = sum(counts[name] for name, model in config.models.items() if model.num_cpus is None)
    if fixed > cpus or cpus == 0 or (free and fixed >= cpus):
        raise ResourceError(
            f"{total} replicas need {fixed:g} CPUs{' and more' if free else ''}, "
            f"the cluster has {cpus:g}",
            hint="fewer replicas, or fewer CPUs each",
        )
    found = {}
    for name, model in config.models.items():
        each = model.num_cpus or (cpus - fixed) / free
        # With room for one more of the largest.
        claimed = each * cpus / (cpus + each)
        num_gpus = _gpus(name, model.device, model.num_gpus, total, gpus)
        found[name] = ReplicaResources(
            num_cpus=math.floor(claimed * 1000) / 1000,
            num_gpus=num_gpus,
            num_threads=max(1, int(each)),
        )
    return found


def _gpus(name: str, device: str, wanted: float | None, replicas: int, gpus: float) -> float:
    if device == "cpu" or (device == "auto" and gpus == 0 and not wanted):
        return 0.0
    if gpus == 0:
        raise ResourceError(f"{name} needs a GPU, the cluster has none", hint="use --device cpu")
    if wanted is not None:
        return wanted
    per_gpu = math.ceil((replicas + 1) / gpus)  # one more, for a rollout
    return math.floor(1000 / per_gpu) / 1000


def _versions(served: Served) -> set[Version]:
    return {version for version in (served.stable, served.canary) if version is not None}


def _shown(served: Served) -> str:
    shown = f"version {served.stable.number}"
    if served.canary is None or served.config.canary is None:
        return shown
    return f"{shown}, {served.config.canary.share:.0%} to version {served.canary.number}"


def _reason(state: Any) -> str:
    """The reason of a failure: the last line of Serve's message on the application."""
    messages = [state.message, *(d.message for d in state.deployments.values())]
    lines = [line.strip() for message in messages for line in (message or "").splitlines()]
    lines = [line for line in lines if line and "Traceback" not in line]
    return lines[-1] if lines else str(state.status)
