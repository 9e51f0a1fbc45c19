"""The versions that a rollout is to serve, without a cluster."""

from __future__ import annotations

from pathlib import Path

from mimray.serving.config import ServeConfig, check_config
from mimray.serving.deploy.rollout import Rollout
from mimray.serving.deploy.serve_schema import Version
from mimray.trainers.errors import BundleError


def config() -> ServeConfig:
    canary = {"bundle": "m@canary", "share": "10%"}
    return check_config({"models": {"m": {"bundle": "m@champion", "canary": canary}}}, "serve")


def wanted(versions: dict[str, str]) -> Rollout:
    def resolve(reference: str) -> Version:
        if reference not in versions:
            raise BundleError(f"no version carries {reference}")
        return Version(reference, Path("bundle"), versions[reference])

    rollout = Rollout(config(), resolve, key_sha256=None, needs_key=False)
    rollout.models = rollout._wanted()
    return rollout


def test_canary__the_reason_for_having_none_is_known() -> None:
    rollout = wanted({"m@champion": "1"})
    assert rollout.models["m"].canary is None
    assert rollout.without_canary == {"m": "no version carries m@canary"}


def test_canary__of_the_same_version_is_none() -> None:
    rollout = wanted({"m@champion": "3", "m@canary": "3"})
    assert rollout.models["m"].canary is None
    assert rollout.without_canary == {"m": "it is version 3 as well"}


def test_canary__that_there_is_needs_no_reason() -> None:
    rollout = wanted({"m@champion": "1", "m@canary": "2"})
    assert rollout.models["m"].canary is not None
    assert rollout.without_canary == {}
