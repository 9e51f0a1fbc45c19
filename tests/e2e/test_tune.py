"""A sweep through the front door: real Ray Tune, real DeepSpeed, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from PIL import Image

from service.cli import cli
from trainers import load_bundle

STEPS = 8
SETS = [
    "base.set.encoder.depth=1", "base.set.encoder.width=32", "base.set.encoder.num_heads=2",
    "base.set.data.image_size=32", "base.set.method.decoder_width=16",
    "base.set.method.decoder_num_heads=2", "base.set.optim.batch_size=8",
    "base.set.logging.num_pictures=2", "base.set.logging.every_steps=1",
    "base.set.checkpoint.every_steps=2", f"budget.steps={STEPS}",
    "space.method.mask_ratio={grid: [0.5, 0.75]}", "space.method.decoder_depth={grid: [1]}",
    "scheduler={name: none, num_rungs: 2}",
]  # fmt: skip
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, told apart by colour, with a held-out split."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 8)):
        for label, tint in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(tint, 50, (6, 6, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((40, 40)).save(place / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(ray_session: str, pictures: Path, storage: Path) -> Iterator[Start]:
    """Starts `python -m service tune mae-mask-depth` against the session's cluster."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, *extra: str, sets: tuple[str, ...] = (), resume: bool = False) -> Any:
        if resume:
            asked = ["--resume", name]
        else:
            given = [arg for item in (*SETS, *sets) for arg in ("--set", item)]
            asked = ["mae-mask-depth", "--data", str(pictures), "--name", name, *given]
        command = [
            sys.executable, "-m", "service", "tune", *asked, "--storage", str(storage),
            "--json", *extra,
        ]  # fmt: skip
        environment = {
            **os.environ, "RAY_ADDRESS": ray_session, "RAY_AUTH_MODE": "token",
            "MLFLOW_TRACKING_URI": f"sqlite:///{storage}/mlflow.db",
        }  # fmt: skip
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


def scores(folder: Path) -> dict[str, list[float]]:
    """Scores by trial, rung by rung."""
    return {
        place.name: [
            rung["score"] for rung in json.loads((place / "trial.json").read_text())["rungs"]
        ]
        for place in sorted((folder / "trials").iterdir())
    }


def losses(trial: Path) -> list[float]:
    lines = (trial / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines)]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def reached(trial: Path, step: int) -> bool:
    return (trial / "metrics.jsonl").is_file() and len(losses(trial)) >= step


def trial_processes() -> list[psutil.Process]:
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any("ray::ResourceTrainable" in part for part in process.info["cmdline"] or [])
    ]


@pytest.fixture(scope="module")
def undisturbed(start: Start) -> dict[str, Any]:
    """A sweep that nothing happened to."""
    return finish(start("undisturbed"))


def test_sweep__leaves_everything_it_promises(undisturbed: dict[str, Any], storage: Path) -> None:
    folder = storage / "undisturbed"
    assert undisturbed["ended"]
    assert [t["state"] for t in undisturbed["trials"]] == ["finished"] * 2
    assert [len(found) for found in scores(folder).values()] == [2] * 2
    best = max(undisturbed["trials"], key=lambda t: t["score"])
    assert undisturbed["best"]["score"] == best["score"]
    for name in ("report.html", "report.md", "report.json", "sweep.json", "study.db"):
        assert (folder / name).is_file(), name
    assert not (folder / ".ray").exists()
    for trial in (folder / "trials").iterdir():
        for name in ("plan.json", "reconstruction.png", "bundle/encoder.safetensors"):
            assert (trial / name).is_file(), name
        assert len(losses(trial)) == STEPS
        assert not (trial / "checkpoints").exists()
        card = load_bundle(trial).card
        assert card.scores["knn"]["headline"] == scores(folder)[trial.name][-1]


def test_sweep__mlflow_has_a_parent_and_its_children(
    undisturbed: dict[str, Any], storage: Path
) -> None:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("mimray")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [r for r in runs if r.info.run_name == "undisturbed"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {r.info.run_name for r in children} == {f"undisturbed/000{n}" for n in range(2)}
    assert parent.data.metrics["best/accuracy"] == undisturbed["best"]["score"]
    for child in children:
        assert child.info.status == "FINISHED"
        trial = undisturbed["trials"][int(child.info.run_name[-1])]
        assert child.data.metrics["score/accuracy"] == trial["score"]
        assert child.data.params["method.mask_ratio"] == str(trial["params"]["method.mask_ratio"])
        losses_ = client.get_metric_history(child.info.run_id, "loss")
        assert len(losses_) == STEPS
        assert any("reconstruction" in a.path for a in client.list_artifacts(
            child.info.run_id, "images"))  # fmt: skip


def test_sweep__tensorboard_has_curves_and_hparams(
    undisturbed: dict[str, Any], storage: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for trial in undisturbed["trials"]:
        events = EventAccumulator(str(storage / "undisturbed/tensorboard" / trial["trial"]))
        events.Reload()
        assert len(events.Scalars("training/loss")) == STEPS
        assert events.Scalars("score/accuracy")[-1].value == pytest.approx(trial["score"])
        assert "hparams" in events.PluginAssets("hparams") or events.SummaryMetadata(
            "_hparams_/session_start_info"
        )


def test_sweep__optuna_opens_the_study_itself(undisturbed: dict[str, Any]) -> None:
    name, place = undisturbed["study"]
    study = optuna.load_study(study_name=name, storage=place)
    found = {t.user_attrs["mimray.number"]: (t.params, t.value) for t in study.trials}
    assert found == {
        int(t["trial"]): (t["params"], pytest.approx(t["score"])) for t in undisturbed["trials"]
    }


@pytest.mark.slow
def test_same_seed__same_trials_and_scores_however_many_at_once(
    start: Start, undisturbed: dict[str, Any], storage: Path
) -> None:
    # One CPU a trial, as when two run at once: figures depend in the last digits on threads.
    again = finish(start("again", "--concurrent", "1", sets=("resources.cpus_per_worker=1",)))
    strip = ("trial", "params", "state", "score", "rung", "samples")
    assert [[t[k] for k in strip] for t in again["trials"]] == [
        [t[k] for k in strip] for t in undisturbed["trials"]
    ]
    assert scores(storage / "again") == scores(storage / "undisturbed")
    for name in ("0000", "0001"):
        trials = "again/trials", "undisturbed/trials"
        assert losses(storage / trials[0] / name) == losses(storage / trials[1] / name)


def test_killed_trial_process__resumes_and_changes_nothing(
    start: Start, undisturbed: dict[str, Any], storage: Path
) -> None:
    folder = storage / "lost"
    sweep = start("lost")
    wait_until(lambda: reached(folder / "trials/0001", 3), sweep)
    victims = trial_processes()
    assert victims
    for victim in victims:
        victim.kill()
    found = finish(sweep)
    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert sum(t["failures"] for t in found["trials"]) >= 1
    assert scores(folder) == scores(storage / "undisturbed")
    assert losses(folder / "trials/0001") == losses(storage / "undisturbed/trials/0001")


def test_killed_driver__resumes_and_trains_nothing_twice(
    start: Start, undisturbed: dict[str, Any], storage: Path
) -> None:
    folder = storage / "orphaned"
    sweep = start("orphaned", "--concurrent", "1", sets=("resources.cpus_per_worker=1",))
    wait_until(lambda: reached(folder / "trials/0001", 5), sweep)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    before = (folder / "trials/0000/metrics.jsonl").stat()
    refused = start("orphaned", sets=("budget.steps=4",))
    _, said = refused.communicate(timeout=120)
    assert refused.returncode == 2
    assert "budget.steps: 8 -> 4" in said

    found = finish(start("orphaned", "--concurrent", "1", resume=True))
    assert found["ended"]
    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert (folder / "trials/0000/metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert scores(folder) == scores(storage / "undisturbed")
    assert losses(folder / "trials/0001") == losses(storage / "undisturbed/trials/0001")
    study = optuna.load_study(study_name=found["study"][0], storage=found["study"][1])
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2


@pytest.mark.slow
def test_failed_trial__is_told_with_its_reason_and_ends_nothing(
    start: Start, storage: Path
) -> None:
    sets = (
        "space.method.decoder_depth=null", "space.method.mask_ratio=null",
        "space.optim.base_lr={grid: [1.0e-3, 1.0e+30]}",
    )  # fmt: skip
    found = finish(start("diverging", sets=sets))
    assert found["ended"]
    assert [t["state"] for t in found["trials"]] == ["finished", "failed"]
    assert "not finite" in found["trials"][1]["reason"]
    assert found["best"]["trial"] == "0000"
    assert "not finite" in (storage / "diverging/report.html").read_text()


def test_impossible_sweep__is_refused_before_anything_starts(start: Start, storage: Path) -> None:
    began = time.monotonic()
    sweep = start("impossible", sets=("resources.num_workers=4",))
    _, said = sweep.communicate(timeout=120)
    assert sweep.returncode == 2
    assert "4 workers x 1 CPU; the cluster has 2 CPUs" in said
    assert time.monotonic() - began < 60
    assert not (storage / "impossible").exists()


def test_winner__is_registered_with_its_lineage_and_served_by_name(
    undisturbed: dict[str, Any], storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")

    def models(*arguments: str) -> Any:
        result = CliRunner().invoke(cli, ["models", *arguments, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    place = ("--storage", str(storage))
    best = undisturbed["best"]
    for reference in ("undisturbed:best", f"{storage}/undisturbed:best"):
        found = models("register", reference, "--name", "photos", "--alias", "champion", *place)
        assert found["model"] == "photos@v1"
    assert found["aliases"] == ["champion"]
    assert found["trial"] == best["trial"]
    assert found["sweep"] == str(storage / "undisturbed")
    assert json.loads(found["params"]) == best["params"]
    assert found["scores"]["knn"]["headline"] == best["score"]
    assert found["data_fingerprint"]
    other = next(t for t in undisturbed["trials"] if t["trial"] != best["trial"])
    second = models("register", f"undisturbed:{int(other['trial'])}", "--name", "photos", *place)
    assert second["model"] == "photos@v2"

    from service.deploy import parse_models

    served = parse_models(["photos@champion"])
    assert list(served) == ["photos"]
    assert (served["photos"] / "bundle.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trials_of_two_workers__nest_a_trainer_each(start: Start, storage: Path) -> None:
    process = start("pairs", sets=("resources.num_workers=2",))
    out, err = process.communicate(timeout=800)
    assert process.returncode == 0, err
    found = json.loads(out)
    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert [len(s) for s in scores(storage / "pairs").values()] == [2, 2]
    assert len(losses(storage / "pairs/trials/0000")) == STEPS
