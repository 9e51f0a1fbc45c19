"""`mimray evaluate` and what it leaves, task by task, on scenes that are drawn here."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from mimray.service.cli.main import cli
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.evaluation.features.encoders import untrained

# What makes each task short, and where its labels are.
TASKS: dict[str, tuple[str, list[str]]] = {
    "knn": ("crops", ["--set", "k=5"]),
    "linear": ("crops", ["--set", "solver=ridge"]),
    "segmentation": ("", ["--epochs", "2", "--set", "batch_size=4", "--set", "num_views=1"]),
    "dense-knn": ("", ["--set", "k=5"]),
    "detection": ("", ["--epochs", "1", "--set", "batch_size=4", "--set", "num_views=1"]),
}

Scored = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(out, num_train=12, num_val=6, image_size=(64, 64), num_classes=3, seed=0)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run looks like to those who use its bundle."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    shape = ViTConfig(name="vit", width=32, depth=4, num_heads=2, patch_size=8)
    card = BundleCard(
        name="small", encoder=shape, image_size=(64, 64), channels=3,
        mean=(0.5,) * 3, std=(0.25,) * 3, layers=(0, 1, 2, 3), plan_hash="abc", step=9,
    )  # fmt: skip
    save_bundle(folder / "bundle", card, untrained(card, seed=3).encoder.state_dict())
    return folder


@pytest.fixture(scope="module", autouse=True)
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache and an MLflow of this module's own."""
    place = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place))
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
        patch.chdir(place)
        yield


def evaluate(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["evaluate", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def asked_of(task: str, scenes: Path) -> list[str]:
    below, options = TASKS[task]
    return ["--task", task, "--data", str(scenes / below), *options]


@pytest.fixture(scope="module")
def scored(scenes: Path, run: Path, ray_session: str) -> Scored:
    """What a task found the first time it was asked."""
    return cache(lambda task: evaluate(str(run), *asked_of(task, scenes)))


def at_hand(patch: pytest.MonkeyPatch) -> None:
    """Probes make features in this process, since encoders take long to start on a cluster.

    `test_extraction_on_ray.py` holds one against the other.
    """
    for name in ("connected", "connected_if_larger"):
        patch.setattr(f"mimray.service.commands.evaluate.{name}", nullcontext)
    patch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate__figures_pictures_and_the_card(
    task: str, scenes: Path, run: Path, scored: Scored, monkeypatch: pytest.MonkeyPatch
) -> None:
    if task in ("knn", "linear"):
        at_hand(monkeypatch)
    first = scored(task)
    again = evaluate(str(run), *asked_of(task, scenes))

    assert first["headline"] == again["headline"]
    assert first["metrics"] == again["metrics"]
    kept = json.loads((run / "evaluation" / f"{task}.json").read_text())
    assert kept["headline"] == first["headline"]
    assert (kept["plan_hash"], kept["seed"]) == ("abc", 0)
    assert kept["data_fingerprint"] != kept["val_fingerprint"]
    for picture in first["pictures"]:
        Image.open(picture).verify()
    assert first["pictures"]
    assert read_card(run / "bundle").scores[task]["headline"] == first["headline"]


@pytest.mark.parametrize("where", ["here", pytest.param("cluster", marks=pytest.mark.slow)])
def test_compare__a_bundle_and_its_untrained_twin(
    where: str,
    scenes: Path,
    run: Path,
    ray_session: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if where == "here":
        at_hand(monkeypatch)
    found = evaluate(
        "--compare", str(run), f"untrained:{run}", "untrained:vit_tiny", "--image-size", "64",
        *asked_of("knn", scenes), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    names = [result["encoder"] for result in found["results"]]
    assert names == [str(run), f"untrained:{run}", "untrained:vit_tiny"]
    assert (run / "evaluation" / "untrained" / "knn.json").is_file()
    table = Path(found["files"]["md"]).read_text()
    assert all(name in table for name in names)
    Image.open(found["files"]["png"]).verify()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_through__an_endpoint_scores_as_the_bundle_does(
    task: str, scenes: Path, run: Path, scored: Scored, tmp_path: Path
) -> None:
    from mimray.serving.deploy.endpoint import serve_bundles

    near = scored(task)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serve_bundles({"far": run}, port=port, device="cpu", num_cpus=1) as endpoint:
        through = ["--through", endpoint.url, "--out", str(tmp_path / "far")]
        far = evaluate("far", *asked_of(task, scenes), *through)
    assert far["headline"] == pytest.approx(near["headline"], abs=0.005)
    assert far["through"] == endpoint.url


@pytest.mark.slow
def test_verdict__on_masks_takes_what_is_there(
    scenes: Path, run: Path, ray_session: str, tmp_path: Path
) -> None:
    other, card = tmp_path / "start", read_card(run / "bundle")
    save_bundle(other, card, untrained(card, seed=4).encoder.state_dict())
    options, val = TASKS["segmentation"][1][2:], str(scenes / "train")  # 6 in val are too few
    command = [
        "verdict", str(run), str(other), "--data", str(scenes / "train/images"),
        "--labelled", str(scenes / "train"), "--val", val, "--set", "k=5",
        "--set", "segmentation.epochs=2", *options, "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip

    def verdict() -> tuple[dict[str, Any], dict[str, int]]:
        result = CliRunner().invoke(cli, command, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        files = (tmp_path / "out").rglob("*/*/*.json")
        return json.loads(result.stdout), {str(file): file.stat().st_mtime_ns for file in files}

    first, written = verdict()
    gone = tmp_path / "out/labelled/start/dense-knn.json"
    gone.unlink()  # as after a kill
    second, again = verdict()
    assert {file for file, at in again.items() if written[file] != at} == {str(gone)}
    assert first["figures"] == second["figures"]
    names = [figure["name"] for figure in first["figures"]]
    assert names == ["dense kNN", "linear segmentation", "RankMe", ""]
    assert all(figure["change"]["paired"] for figure in first["figures"][:3])
