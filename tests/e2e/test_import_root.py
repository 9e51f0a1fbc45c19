"""Commands among packages that carry the names of ours, and on a cluster that others started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NAMES = ("trainers", "serving", "tuning", "service")


def occupy(folder: Path) -> Path:
    """A directory whose packages have the names of ours, and end whoever imports them."""
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} of {folder}')\n")
    return folder


@pytest.fixture(scope="module")
def cluster(bench: Any) -> Any:
    """A cluster started by other hands, in a directory of theirs that is just as full."""
    occupy(bench.folder)
    bench.environment.pop("PYTHONPATH", None)
    bench.start_head(num_cpus=2)
    bench.environment["RAY_ADDRESS"] = bench.address
    return bench


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return occupy(tmp_path_factory.mktemp("project"))


@pytest.mark.slow
def test_commands__workers_find_this_package(cluster: Any, photos: Path, here: Path) -> None:
    def mimray(*arguments: str) -> str:
        printed: str = cluster.finish(cluster.start("mimray", *arguments, cwd=here))
        return printed

    mimray("data", "ingest", str(photos), "dataset")
    mimray(*cluster.pretraining("dataset", "runs", "own", 2))

    assert (here / "dataset").is_dir()
    assert (here / "runs/own/bundle/bundle.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "inspect", "dataset", "--sheet", "sheet.png"),
        ("data", "synth", "scenes", "--num-train", "4", "--num-val", "2"),
        ("plan", "mae-tiny", "--data", "dataset", "--set", "optim.batch_size=4"),
        ("recipes", "mae-tiny"),
        ("reconstruct", "runs/own", "PICTURE", "--out", "out.png"),
        ("evaluate", "runs/own", "--task", "rankme", "--data", "dataset"),
        ("extract", "runs/own", "dataset", "features"),
        ("export", "runs/own", "exported", "--format", "timm"),
        ("models", "register", "runs/own", "--name", "own"),
        ("models", "list"),
        ("keys", "list", "--file", "keys.json"),
        ("serve", "own=runs/own", "--build"),
        ("tune", "--list"),
        ("doctor",),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_commands__work_among_packages_of_the_same_names(
    cluster: Any, photos: Path, here: Path, arguments: tuple[str, ...]
) -> None:
    picture = str(next(path for path in photos.rglob("*") if path.is_file()))
    given = [picture if word == "PICTURE" else word for word in arguments]

    process = cluster.start("mimray", *given, cwd=here)
    process.wait(200)

    said = cluster.output(process)
    assert f"of {here}" not in said
    assert "Traceback" not in said
    assert process.returncode in ((0, 1) if arguments[0] == "doctor" else (0,)), said


def test_client__stands_beside_an_applications_own_serving(tmp_path: Path) -> None:
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving" / "__init__.py").write_text("MINE = True\n")
    code = "import serving; from mimray.serving.client import FeatureClient; print(serving.MINE)"

    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout == "True\n"
