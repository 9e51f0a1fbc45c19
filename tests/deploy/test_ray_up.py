"""The files of `ray up`, for AWS and for one's own machines."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "deploy/local.yaml")


def load(path: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return tree


@pytest.fixture
def aws() -> dict[str, Any]:
    return load("cluster.yaml")


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own reading of a cluster file, which needs no cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: dict[str, Any] = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("path", FILES)
def test_file__passes_the_check_that_ray_up_makes(path: str) -> None:
    config = load(path)

    prepared = validate(config)

    # `ray up` runs what is written here, and no default of Ray's that starts without a token.
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[commands] == config[commands]


@pytest.mark.parametrize("path", FILES)
def test_file__the_check_can_fail(path: str) -> None:
    from jsonschema.exceptions import ValidationError

    with pytest.raises(ValidationError):
        validate({**load(path), "max_wokers": 3})


@pytest.mark.parametrize("path", FILES)
@pytest.mark.parametrize("role", ["head", "worker"])
def test_node__asks_for_a_token_and_serves_by_haproxy(path: str, role: str) -> None:
    config = load(path)
    (start,) = [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]
    environment, _, arguments = start.partition("ray start")
    variables = dict(re.findall(r"(\w+)=([^\s;]+)", environment))

    assert environment.startswith("export ")
    assert environment.rstrip().endswith(";")
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    (folder,) = [there for there, here in config["file_mounts"].items() if here == "."]
    launcher = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert os.access(ROOT / launcher.relative_to(folder), os.X_OK)
    assert config["file_mounts"][variables["RAY_AUTH_TOKEN_PATH"]] == "~/.ray/auth_token"
    assert "0.0.0.0" not in start
    assert ("--autoscaling-config=~/ray_bootstrap_config.yaml" in arguments) == (role == "head")
    assert ("RAY_JOB_STOP_WAIT_TIME_S" in variables) == (role == "head")


@pytest.mark.parametrize("path", FILES)
def test_setup__installs_this_project_by_its_constraints(path: str) -> None:
    config = load(path)
    (folder,) = [there for there, here in config["file_mounts"].items() if here == "."]

    install = config["setup_commands"][-1]
    assert install.endswith(f"pip install --constraint {folder}/constraints.txt {folder}")


def test_aws__has_a_small_head_without_work_and_gpu_workers(aws: dict[str, Any]) -> None:
    types = aws["available_node_types"]

    assert types[aws["head_node_type"]]["resources"] == {"CPU": 0}
    assert [name for name, kind in types.items() if kind["resources"].get("GPU")] == ["gpu"]
    assert types["gpu"]["max_workers"] <= aws["max_workers"]
    # Without one Ray takes an image whose driver is too old.
    assert all(kind["node_config"]["ImageId"].startswith("ami-") for kind in types.values())


def test_aws__installs_the_ray_that_it_runs(aws: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert pinned is not None
    for image in ("head_image", "worker_image"):
        assert f"ray:{pinned[1]}-py311-" in aws["docker"][image]


SECRETS = [
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40,}\b",
    r"(?i)(RAY_AUTH_TOKEN|SECRET_ACCESS_KEY|password|api_key)['\"]?\s*[=:]\s*['\"]?[\w]",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_deployments__name_no_secret(secret: str) -> None:
    paths = [ROOT / "Dockerfile", ROOT / "cluster.yaml", *(ROOT / "deploy").rglob("*.*")]

    assert len(paths) >= 8
    for path in paths:
        assert not re.search(secret, path.read_text()), path
