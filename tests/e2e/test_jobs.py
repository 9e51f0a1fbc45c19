"""The same pre-training as a Ray job: the code travels in the package, nothing is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import zipfile
from pathlib import Path
from typing import Any

import httpx2
import pytest

ROOT = Path(__file__).parents[2]
STEPS = 6

# In the environment of who submits jobs.
SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "planted-secret-of-s3",
    "MLFLOW_TRACKING_TOKEN": "planted-token-of-mlflow",
    "HF_TOKEN": "planted-token-of-hf",
    "MIMRAY_API_KEY": "planted-key-of-serving",
}

pytestmark = pytest.mark.slow


def tracked() -> list[str]:
    """The files of a fresh clone."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return listed.stdout.splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a fresh clone holds, and beside it what work leaves behind."""
    copy = tmp_path_factory.mktemp("clone")
    for name in tracked():
        if (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
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
    assert not {n.split("/")[0] for n in names} & {".venv", "runs", "data", "tests", "docs"}
    files = {n for n in names if not n.endswith("/")}
    known = {*tracked(), "trainers/recipes/mae-clone.yaml"}
    # What the links of the import root name is carried a second time.
    assert files <= known | {f"mimray/{name}" for name in known}
    assert "mimray/trainers/data/loader.py" in files


@pytest.fixture(scope="module")
def cluster(bench: Any) -> Any:
    bench.start_head(num_cpus=1)
    bench.environment |= SECRETS
    return bench


def test_job__trains_from_the_package_alone(cluster: Any, photos: Path, tree: Path) -> None:
    storage = cluster.folder / "runs"
    arguments = cluster.pretraining(photos, storage, "job", STEPS)
    arguments[arguments.index("mae-tiny")] = "mae-clone"
    submit = (
        "ray", "job", "submit", "--working-dir", ".", "--address", cluster.dashboard,
        "--", "python", "-m", "service", *arguments,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    job = cluster.start(*submit, cwd=tree)
    # A node takes jobs some seconds after it has started.
    while job.wait(800) and "No available agent" in cluster.output(job):
        assert time.monotonic() < deadline, cluster.output(job)
        job = cluster.start(*submit, cwd=tree)
    printed = cluster.finish(job)
    assert "succeeded" in printed
    run = storage / "job"
    assert list(cluster.losses((run / "metrics.jsonl").read_bytes())) == list(range(1, STEPS + 1))
    for name in ("plan.json", "bundle/bundle.json", "bundle/encoder.safetensors", "loss.png"):
        assert (run / name).is_file(), name


def test_submit__the_same_command_is_the_same_job(cluster: Any, photos: Path, tree: Path) -> None:
    storage = cluster.folder / "runs"

    def submit(*arguments: str, options: tuple[str, ...] = (), code: int = 0) -> dict[str, Any]:
        job = cluster.start(
            "mimray", "submit", "--address", cluster.dashboard, "--working-dir", str(tree),
            *options, "--json", "--", *arguments,
        )  # fmt: skip
        job.wait(800)
        assert job.returncode == code, cluster.output(job)
        found: dict[str, Any] = json.loads(cluster.output(job).splitlines()[-1])
        return found

    arguments = cluster.pretraining(photos, storage, "submitted", STEPS)
    arguments[arguments.index("mae-tiny")] = "mae-clone"
    first = submit(*arguments)
    assert (first["found"], first["status"], first["exit_code"]) == (False, "SUCCEEDED", 0)
    assert (storage / "submitted/bundle/bundle.json").is_file()
    assert submit(*arguments) == {**first, "found": True}
    again = submit(*arguments, options=("--again",))
    assert (again["id"], again["status"]) == (f"{first['id']}-2", "SUCCEEDED")

    nowhere = cluster.pretraining(cluster.folder / "nowhere", storage, "nothing", STEPS)
    failed = submit(*nowhere, code=2)
    assert (failed["found"], failed["status"]) == (False, "FAILED")
    assert submit(*nowhere, code=2)["id"] == f"{failed['id']}-2"


def test_job__without_the_token_is_refused(cluster: Any) -> None:
    jobs = f"{cluster.dashboard}/api/jobs/"
    assert httpx2.get(jobs).status_code == 401
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert httpx2.get(jobs, headers={"Authorization": f"Bearer {token}"}).status_code == 200


def test_jobs__keep_no_secret_of_who_submitted_them(cluster: Any) -> None:
    """After the jobs above: what Ray tells of them, and every file of cluster, jobs and runs."""
    token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    told = httpx2.get(
        f"{cluster.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    ).text
    assert "mae-clone" in told
    files = [p for p in cluster.folder.rglob("*") if p.is_file() and p.name != "token"]
    assert any("job-driver" in file.name for file in files)
    for secret in (token, *SECRETS.values()):
        assert secret not in told
        assert [str(file) for file in files if secret.encode() in file.read_bytes()] == []
