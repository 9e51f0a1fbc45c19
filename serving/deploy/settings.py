"""Settings of the replicas, as Ray Serve's configuration carries them."""

from __future__ import annotations

import os

from mimray.serving.config import API_KEY_VARIABLE, GatewayConfig, ReplicaConfig, Urls
from mimray.trainers.config.base import Config
from mimray.trainers.errors import ServingError


class GatewaySettings(GatewayConfig):
    """Settings of a replica's gateway, beside those from `serve.yaml`.

    Attributes:
        key_sha256: SHA-256 of one more key.
        needs_key: refuse to start without any key.
    """

    key_sha256: str | None = None
    needs_key: bool = True

    def require_keys(self) -> None:
        """Require a key unless only loopback can connect.

        Raises:
            ServingError: a key is needed and none is set.
        """
        known = self.keys or self.key_sha256 or os.environ.get(API_KEY_VARIABLE)
        if self.needs_key and not known:
            raise ServingError(
                f"{API_KEY_VARIABLE} is not set, there is no file of keys, and others can reach "
                "this",
                hint="give it to every container from a Secret",
            )


class ModelSettings(ReplicaConfig):
    """Settings of a replica of one version of a model, beside those from `serve.yaml`.

    Attributes:
        name: the model's name in the URL.
        bundle: the bundle's URI, or its directory on every node that may run a replica.
        version: the model's version.
        num_threads: CPU threads of the model; by default the CPUs that Ray assigned.
        urls: the rules for pictures by URL, as in `serve.yaml`.
        gateway: the settings by which requests are admitted.
    """

    name: str
    bundle: str
    version: str = "1"
    num_threads: int | None = None
    urls: Urls = Urls()
    gateway: GatewaySettings = GatewaySettings()


class Routing(Config):
    """The versions of a model; Ray Serve changes it without a restart.

    Attributes:
        default: the version that answers requests which name none.
        applications: the Ray Serve application of each version.
        canary: the version that answers a share of the requests which name none.
        share: the canary's share of those requests, 0 to 1.
    """

    default: str
    applications: dict[str, str]
    canary: str | None = None
    share: float = 0.0
