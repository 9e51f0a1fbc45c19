"""Builders for Serve config files: what `import_path` names in KubeRay's RayService.

Pods listen on their own addresses, which others can reach, so these builders serve with an API
key or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from ray.serve import Application

from serving.app import hash_key
from serving.deployment import ModelSettings, model_target, root_target
from serving.run import API_KEY_VARIABLE
from trainers.errors import ServingError


class ModelArgs(BaseModel):
    """`args` of one model's application.

    Attributes:
        name: the model's name; its `route_prefix` is `/v2/models/<name>`.
        bundle: directory of its bundle, mounted on every worker.
        num_replicas: processes of the model.
        num_cpus: CPU cores a replica, and threads of a model on a CPU.
        num_gpus: share of a GPU a replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    bundle: Path
    num_replicas: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0


class RootArgs(BaseModel):
    """`args` of the application behind `/`.

    Attributes:
        models: names of the models beside it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: tuple[str, ...]


# Ray turns `args` into a model by itself only where annotations are not strings, hence the two
# calls of `model_validate`.


def model(args: Mapping[str, Any]) -> Application:
    """One model as an application; `args` as in `ModelArgs`."""
    wanted = ModelArgs.model_validate(args)
    settings = ModelSettings(
        name=wanted.name,
        bundle=wanted.bundle,
        device="cuda" if wanted.num_gpus else "cpu",
        num_threads=max(1, int(wanted.num_cpus)),
        key_hash=_key_hash(),
    )
    target = model_target(
        settings,
        num_replicas=wanted.num_replicas,
        num_cpus=wanted.num_cpus,
        num_gpus=wanted.num_gpus,
    )
    return target.target


def root(args: Mapping[str, Any]) -> Application:
    """Health, readiness and metadata of the server as a whole; `args` as in `RootArgs`."""
    return root_target(RootArgs.model_validate(args).models, key_hash=_key_hash()).target


def _key_hash() -> str:
    key = os.environ.get(API_KEY_VARIABLE)
    if not key:
        raise ServingError(
            f"{API_KEY_VARIABLE} is not set, and pods can be reached from other machines",
            hint="give it to every container from a Secret",
        )
    return hash_key(key)
