"""serve.yaml, the command line, and Ray Serve's configuration made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mimray.serving.config import check_config
from mimray.serving.deploy.rollout import steps
from mimray.serving.deploy.serve_schema import (
    ReplicaResources,
    Served,
    Version,
    serve_schema,
)
from mimray.serving.deploy.settings import ModelSettings, Routing
from mimray.trainers.errors import ConfigError, ServingError


def _config(**model: Any) -> Any:
    return check_config({"models": {"m": {"bundle": "m@champion", **model}}}, "test")


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({}, "missing key 'models'"),
        ({"models": {}}, "models"),
        ({"models": {"m": {}}}, "models.m.bundle"),
        ({"models": {"m": {"bundle": "x", "replica": 2}}}, "unknown key 'models.m.replica'"),
        ({"models": {"m": {"bundle": "x"}}, "port": 0}, "port"),
        (
            {"models": {"m": {"bundle": "x", "replicas": 2, "autoscaling": {}}}},
            "exclude each other",
        ),
        (
            {"models": {"m": {"bundle": "x", "autoscaling": {"min_replicas": 3}}}},
            "more than max_replicas",
        ),
        ({"models": {"m": {"bundle": "x", "canary": {"bundle": "y", "share": "120%"}}}}, "share"),
        (
            {"models": {"m": {"bundle": "x"}}, "urls": {"allowed_hosts": ["http://a"]}},
            "allowed_hosts",
        ),
    ],
)
def test_check_config__names_what_is_wrong(tree: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_config(tree, "serve.yaml")


@pytest.mark.parametrize(("text", "share"), [("10%", 0.1), (0.25, 0.25), ("0.5", 0.5)])
def test_check_config__shares(text: Any, share: float) -> None:
    canary = _config(canary={"bundle": "m@canary", "share": text}).models["m"].canary
    assert canary is not None
    assert canary.share == share


def test_serve_schema__is_one_that_ray_serve_takes() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = _config(
        autoscaling={"min_replicas": 0, "max_replicas": 4, "idle_s": 60},
        canary={"bundle": "m@canary", "share": "10%"},
        max_batch_size=32,
    )
    stable = Version("m@champion", Path("/b/1"), "1")
    canary = Version("m@canary", Path("/b/2"), "2")
    served = Served("m", config.models["m"], stable, canary)
    tree = serve_schema(
        config, [served], {"m": ReplicaResources(1.5, 0.5, 2)}, key_sha256="0" * 64, needs_key=True
    )
    ServeDeploySchema.model_validate(tree)
    first, second, root = tree["applications"]
    assert (first["name"], first["route_prefix"]) == ("m", "/v2/models/m")
    assert (second["name"], second["route_prefix"]) == ("m@2", "/v2/models/m/versions/2")
    settings = ModelSettings.model_validate(first["args"])
    assert (settings.max_batch_size, settings.num_threads) == (32, 2)
    assert settings.bundle == "/b/1"
    (deployment,) = first["deployments"]
    assert deployment["ray_actor_options"] == {"num_cpus": 1.5, "num_gpus": 0.5}
    assert deployment["autoscaling_config"]["min_replicas"] == 0
    assert deployment["autoscaling_config"]["downscale_to_zero_delay_s"] == 60
    routing = {"default": "1", "applications": {"1": "m", "2": "m@2"}, "canary": "2", "share": 0.1}
    assert deployment["user_config"] == routing
    assert root["deployments"][0]["user_config"] == {"m": routing}


def test_serve_schema__nodes_fetch_a_remote_bundle_by_its_uri() -> None:
    config = _config()
    version = Version("m", Path("/tmp/copy-of-one-node"), "1", uri="s3://models/m")
    served = Served("m", config.models["m"], version)
    tree = serve_schema(
        config, [served], {"m": ReplicaResources(1, 0, 1)}, key_sha256=None, needs_key=False
    )
    assert tree["applications"][0]["args"]["bundle"] == "s3://models/m"


V = {number: Version(f"m@{number}", Path(f"/b/{number}"), number) for number in "1234"}


@pytest.mark.parametrize(
    ("before", "after", "between"),
    [
        ("1", "2", []),
        ("1", "1 2", ["1 (2)"]),
        ("1 2", "1", ["1 (2)"]),
        ("1 2", "2", ["1 (2)", "2 (2)"]),
        ("1 2", "3 2", []),
        ("1 2", "1 3", ["1 (2)", "1", "1 (3)"]),
        ("1 2", "3 4", ["1 (2)", "3 (2)", "3", "3 (4)"]),
    ],
)
def test_steps__nothing_is_handed_to_what_is_not_there(
    before: str, after: str, between: list[str]
) -> None:
    """Written as the stable version and the canary, in brackets where it has no share."""
    config = _config(canary={"bundle": "m@canary", "share": "10%"}).models["m"]

    def served(text: str) -> Served:
        stable, *canary = text.replace("(", "").replace(")", "").split()
        return Served("m", config, V[stable], V[canary[0]] if canary else None, "(" not in text)

    assert steps(served(before), served(after)) == [served(text) for text in (*between, after)]


def test_routing__a_canary_that_is_promoted_answers_as_the_stable_one() -> None:
    config = _config(canary={"bundle": "m@canary", "share": "10%"}).models["m"]
    assert Served("m", config, V["2"], V["2"], is_split=False).routing == Routing(
        default="2", applications={"2": "m"}
    )
    assert Served("m", config, V["1"], V["2"], is_split=False).routing == Routing(
        default="1", applications={"1": "m", "2": "m@2"}
    )


def test_replica_resources__leave_room_for_one_more(ray_session: str) -> None:
    from mimray.serving.deploy.rollout import replica_resources
    from mimray.trainers.errors import ResourceError

    (given,) = replica_resources(_config(replicas=2)).values()
    assert given.num_threads == 1
    assert given.num_cpus * 3 <= 2
    with pytest.raises(ResourceError, match="need 3 CPUs, the cluster has 2"):
        replica_resources(_config(replicas=3, num_cpus=1))
    with pytest.raises(ResourceError, match="needs a GPU"):
        replica_resources(_config(device="cuda"))


def test_build__writes_what_serve_deploy_takes(bundles: dict[str, Path], tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from mimray.service.cli.main import cli

    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"models": {"a": {"bundle": str(bundles["alpha"])}}}))
    arguments = ["serve", f"b={bundles['beta']}", "--config", str(file), "--build"]
    done = CliRunner().invoke(cli, [*arguments, "--port", "8001"])
    assert done.exit_code == 0, done.output
    tree = yaml.safe_load(done.stdout)
    ServeDeploySchema.model_validate(tree)
    assert tree["http_options"]["port"] == 8001
    assert [application["name"] for application in tree["applications"]] == ["a", "b", "mimray"]
    out = tmp_path / "out.yaml"
    assert CliRunner().invoke(cli, [*arguments, "--out", str(out)]).stdout == ""
    ServeDeploySchema.model_validate(yaml.safe_load(out.read_text()))


def test_serve_config__what_a_command_line_means(bundles: dict[str, Path]) -> None:
    from mimray.service.commands.serve import serve_config

    alpha = str(bundles["alpha"])
    config = serve_config([alpha], None, None, {"port": 9, "replicas": 2, "host": None})
    assert config.port == 9
    assert config.models["alpha"].replicas == 2
    with pytest.raises(ServingError, match="NAME=BUNDLE names them apart"):
        serve_config([f"a={alpha}", f"a={alpha}"], None, None, {})
    with pytest.raises(ServingError, match="alias"):
        serve_config([f"a={alpha}"], None, "10%", {})
    with pytest.raises(ServingError, match="nothing to serve"):
        serve_config([], None, None, {})
    canary = serve_config(["m=photos@champion"], None, "10%", {}).models["m"].canary
    assert canary is not None
    assert (canary.bundle, canary.share) == ("photos@canary", 0.1)
