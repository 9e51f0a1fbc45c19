from __future__ import annotations

import copy
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "trainers", "tuning", "serving")


def load_yaml(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return load_yaml("cluster.yaml")


def validate(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own reading of a cluster file, which needs no cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("package", PACKAGES)
def test_packages__come_from_this_tree(package: str):
    module = importlib.import_module(f"mimray.{package}")

    assert Path(module.__file__).parent == ROOT / "mimray" / package
    assert Path(module.__file__).parent.resolve() == ROOT / package


def test_wheel__has_one_name_at_its_top_and_all_that_is_read(tmp_path: Path):
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])

    with zipfile.ZipFile(built) as wheel:
        names = set(wheel.namelist())
        launcher = wheel.getinfo("mimray/serving/deploy/haproxy.sh")
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mimray"}
    assert launcher.external_attr >> 16 & 0o100  # may be executed
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {f"mimray/{name}" for name in tracked.stdout.splitlines()} <= names


def test_client__brings_in_neither_torch_nor_ray():
    code = (
        "import sys, mimray.serving.client\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'timm', 'mlflow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    assert answer.stdout == "[]\n"


def test_cluster__passes_the_check_that_ray_up_makes(cluster: dict[str, Any]):
    prepared = validate(cluster)

    # `ray up` runs what is written here, and no default of Ray's that starts without a token.
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[commands] == cluster[commands]


def test_cluster__the_check_can_fail(cluster: dict[str, Any]):
    from jsonschema.exceptions import ValidationError

    with pytest.raises(ValidationError):
        validate({**cluster, "max_wokers": 3})


def test_cluster__a_small_head_without_work_and_gpu_workers(cluster: dict[str, Any]):
    types = cluster["available_node_types"]

    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert [name for name, kind in types.items() if kind["resources"].get("GPU")] == ["gpu"]
    assert types["gpu"]["max_workers"] <= cluster["max_workers"]


@pytest.mark.parametrize("role", ["head", "worker"])
def test_cluster__every_node_asks_for_a_token_and_serves_by_haproxy(
    cluster: dict[str, Any], role: str
):
    (start,) = [line for line in cluster[f"{role}_start_ray_commands"] if "ray start" in line]
    environment, _, _ = start.partition("ray start")

    assert "export RAY_AUTH_MODE=token" in environment
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in environment
    (launcher,) = re.findall(r"RAY_SERVE_HAPROXY_BINARY_PATH=([^\s;]+)", environment)
    (folder,) = [there for there, here in cluster["file_mounts"].items() if here == "."]
    assert os.access(ROOT / Path(launcher).relative_to(folder), os.X_OK)
    (path,) = re.findall(r"RAY_AUTH_TOKEN_PATH=([^\s;]+)", environment)
    assert cluster["file_mounts"][path] == "~/.ray/auth_token"
    assert "0.0.0.0" not in start


@pytest.mark.parametrize(
    "path", ["cluster.yaml", "deploy/kuberay/rayjob.yaml", "deploy/kuberay/rayservice.yaml"]
)
def test_deployments__name_no_secret(path: str):
    text = (ROOT / path).read_text()

    assert not re.search(r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40,}\b", text)
    assert not re.search(
        r"(?i)(RAY_AUTH_TOKEN|SECRET_ACCESS_KEY|password|api_key)['\"]?\s*[=:]\s*['\"]?\w", text
    )


def test_cluster__installs_the_ray_that_it_runs(cluster: dict[str, Any]):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert pinned is not None
    for image in ("head_image", "worker_image"):
        assert f"ray:{pinned[1]}-py311-" in cluster["docker"][image]


def test_rayjob__runs_the_same_command():
    job = load_yaml("deploy/kuberay/rayjob.yaml")

    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["entrypoint"].startswith("python -m service pretrain mae-vit-b ")
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_rayservice__names_applications_that_can_be_built(monkeypatch: pytest.MonkeyPatch):
    from ray.serve import Application
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    monkeypatch.setenv("MIMRAY_API_KEY", "only for this test")
    service = load_yaml("deploy/kuberay/rayservice.yaml")
    applications = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]

    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    for application in applications:
        module, _, name = application["import_path"].partition(":")
        builder = getattr(importlib.import_module(module), name)
        built = call_user_app_builder_with_args_if_necessary(builder, application["args"])
        assert isinstance(built, Application)
    models, root = applications[:-1], applications[-1]
    assert list(root["deployments"][0]["user_config"]) == [m["args"]["name"] for m in models]
    for model in models:
        assert model["route_prefix"] == f"/v2/models/{model['name']}"


def test_rayservice__has_haproxy_as_mimray_serve_has_it():
    from mimray.serving.config import Limits
    from mimray.serving.deploy.haproxy import HAProxyState

    cluster = load_yaml("deploy/kuberay/rayservice.yaml")["spec"]["rayClusterConfig"]
    (container,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    given = {v["name"]: v["value"] for v in container["env"] if "RAY_SERVE_" in v["name"]}
    ours = HAProxyState(8000).environment(silence_s=Limits().body_timeout_s)
    of_this_machine = r"_(PATH|LOC|BASE|FILE|PORT|NBTHREAD)$"

    launcher = Path(given.pop("RAY_SERVE_HAPROXY_BINARY_PATH"))
    assert (ROOT / launcher.relative_to(launcher.parents[3])).is_file()
    assert given == {
        name: value
        for name, value in ours.items()
        if name.startswith("RAY_SERVE_") and not re.search(of_this_machine, name)
    }


def test_rayservice__is_not_built_without_a_key(monkeypatch: pytest.MonkeyPatch):
    from mimray.serving.deploy.serve_schema import root
    from mimray.trainers.errors import ServingError

    monkeypatch.delenv("MIMRAY_API_KEY", raising=False)

    with pytest.raises(ServingError, match="MIMRAY_API_KEY is not set"):
        root({})


def test_rayignore__a_job_carries_code_and_no_data(tmp_path: Path):
    from ray._private.runtime_env.packaging import create_package

    tree = tmp_path / "tree"
    kept = {"cluster.yaml", "service/cli/main.py", "trainers/data/order.py", "constraints.txt"}
    left = {
        "data/photo.jpg",
        "runs/demo/plan.json",
        ".venv/bin/python",
        ".git/HEAD",
        ".ruff_cache/x",
        "service/__pycache__/cli.pyc",
        "tests/test_layout.py",
    }
    for name in kept | left:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tree)

    create_package(str(tree), tmp_path / "package.zip", include_gitignore=True)

    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        carried = {name for name in package.namelist() if not name.endswith("/")}
    assert kept <= carried
    assert carried & left == set()
