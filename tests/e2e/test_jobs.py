"""The same pre-training as a Ray job: the code travels in the package, nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds, and beside it what work leaves behind."""
    copy = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    for litter in (".venv/lib/torch.so", "runs/demo/bundle.bin", "data/pictures.bin"):
        (copy / litter).parent.mkdir(parents=True)
        (copy / litter).write_bytes(bytes(1 << 20))
    # Only this tree has this recipe, so a job that knows it runs this tree.
    recipes = copy / "trainers/recipes"
    shutil.copy2(recipes / "mae-tiny.yaml", recipes / "mae-clone.yaml")
    return copy


def test_package__holds_the_code_alone(tree: Path, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True)
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
    assert {"trainers/data/loader.py", "trainers/recipes/mae-clone.yaml"} < set(names)
    assert not {n.split("/")[0] for n in names} & {".venv", "runs", "data", "tests"}
    assert package.stat().st_size < 1 << 20


def test_job__trains_from_the_package_alone(bench: Any, photos: Path, tree: Path) -> None:
    bench.start_head(num_cpus=1)
    storage = bench.folder / "runs"
    arguments = bench.pretraining(photos, storage, "job", STEPS)
    arguments[arguments.index("mae-tiny")] = "mae-clone"
    job = bench.start(
        "ray", "job", "submit", "--working-dir", ".", "--address", bench.dashboard,
        "--", "python", "-m", "service", *arguments, cwd=tree,
    )  # fmt: skip
    printed = bench.finish(job)
    assert "succeeded" in printed
    run = storage / "job"
    assert list(bench.losses((run / "metrics.jsonl").read_bytes())) == list(range(1, STEPS + 1))
    for name in ("plan.json", "bundle/bundle.json", "bundle/encoder.safetensors", "loss.png"):
        assert (run / name).is_file(), name


def test_job__without_the_token_is_refused(bench: Any, tree: Path) -> None:
    stranger = {k: v for k, v in bench.environment.items() if not k.startswith("RAY_")}
    answer = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "list", "--address", bench.dashboard],
        env={**stranger, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert answer.returncode != 0
    assert "401" in answer.stderr or "nauthenticated" in answer.stderr
