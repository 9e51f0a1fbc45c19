from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("service", "trainers", "tuning", "serving")


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


def test_import__costs_nothing_and_offers_what_people_need():
    code = (
        "import sys, mimray\n"
        "heavy = {'torch', 'ray', 'numpy', 'click', 'pydantic', 'httpx2'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "print(*[name for name in dir(mimray) if not name.startswith('_')])\n"
        "print(all(callable(getattr(mimray, name)) for name in mimray.__all__ if name[0] != '_'))"
    )

    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )

    heavy, names, found = answer.stdout.splitlines()
    assert heavy == "[]"
    wanted = {"pretrain", "evaluate", "extract", "tune", "serve", "load_bundle", "load_method"}
    assert wanted <= set(names.split())
    assert found == "True"
