"""A sweep through the front door: real Ray Tune, real DeepSpeed, real kills."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow.tracking import MlflowClient

from mimray.trainers import load_bundle
from mimray.trainers.storage import RunDir
from mimray.tuning.record import read_record

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
# One CPU a trial, as when two run at once: figures depend in the last digits on threads.
ONE, ONE_CPU = ("--concurrent", "1"), ("resources.cpus_per_worker=1",)
Asked = Callable[..., list[str]]
Found = dict[str, Any]


@pytest.fixture(scope="module")
def asked(labelled: Path, storage: Path) -> Asked:
    """Arguments of a small `tune` under a name."""

    def arguments(name: str, *extra: str, sets: tuple[str, ...] = ()) -> list[str]:
        given = [arg for item in (*SETS, *sets) for arg in ("--set", item)]
        return [
            "tune", "mae-mask-depth", "--data", str(labelled), "--name", name, *given,
            "--storage", str(storage), "--json", *extra,
        ]  # fmt: skip

    return arguments


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


def reached(trial: Path, step: int) -> bool:
    return (trial / "metrics.jsonl").is_file() and len(losses(trial)) >= step


@pytest.fixture(scope="module")
def undisturbed(commands: Any, asked: Asked) -> Found:
    """A sweep that nothing happened to; its process printed its result and nothing else."""
    found: Found = json.loads(commands.finish(commands.start(*asked("undisturbed"))))
    return found


def test_sweep__leaves_everything_it_promises(undisturbed: Found, storage: Path) -> None:
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
        kept = load_bundle(trial).card.scores["knn"]
        chosen_by = kept.get("chosen_by", kept)
        assert chosen_by["headline"] == scores(folder)[trial.name][-1]
        assert (kept["num_val"], chosen_by["num_val"]) == (8, 8)  # halves of 16
        assert kept["part"] == ("report" if trial.name == best["trial"] else "choice")
    assert undisturbed["final"]["trial"] == int(best["trial"])
    assert undisturbed["final"]["num_val"] == 8
    assert undisturbed["final"]["standard_error"] > 0


def test_sweep__mlflow_has_a_parent_and_its_children(undisturbed: Found, storage: Path) -> None:
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


def test_sweep__tensorboard_has_curves_and_hparams(undisturbed: Found, storage: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for trial in undisturbed["trials"]:
        events = EventAccumulator(str(storage / "undisturbed/tensorboard" / trial["trial"]))
        events.Reload()
        assert len(events.Scalars("training/loss")) == STEPS
        assert events.Scalars("score/accuracy")[-1].value == pytest.approx(trial["score"])
        assert "hparams" in events.PluginAssets("hparams") or events.SummaryMetadata(
            "_hparams_/session_start_info"
        )


def test_sweep__optuna_opens_the_study_itself(undisturbed: Found) -> None:
    name, place = undisturbed["study"]
    study = optuna.load_study(study_name=name, storage=place)
    found = {t.user_attrs["mimray.number"]: (t.params, t.value) for t in study.trials}
    assert found == {
        int(t["trial"]): (t["params"], pytest.approx(t["score"])) for t in undisturbed["trials"]
    }


@pytest.mark.slow
def test_same_seed__same_trials_and_scores_however_many_at_once(
    commands: Any, asked: Asked, undisturbed: Found, storage: Path
) -> None:
    again = json.loads(commands.finish(commands.call(*asked("again", *ONE, sets=ONE_CPU))))
    strip = ("trial", "params", "state", "score", "rung", "samples")
    assert [[t[k] for k in strip] for t in again["trials"]] == [
        [t[k] for k in strip] for t in undisturbed["trials"]
    ]
    assert scores(storage / "again") == scores(storage / "undisturbed")
    for name in ("0000", "0001"):
        trials = "again/trials", "undisturbed/trials"
        assert losses(storage / trials[0] / name) == losses(storage / trials[1] / name)


@pytest.mark.slow
def test_methods__are_searched_as_any_key(commands: Any, labelled: Path, storage: Path) -> None:
    sets = [
        "base.set.encoder.depth=1", "base.set.encoder.width=32", "base.set.encoder.num_heads=2",
        "base.set.data.image_size=32", "base.set.optim.batch_size=8",
        "base.set.logging.every_steps=1", "base.set.logging.num_pictures=2",
        f"budget.steps={STEPS}",
        "space.method.name={grid: [mae, simmim]}", "space.optim.base_lr=null", "repeats=1",
        "base.methods.mae.set.method.decoder_width=16", "score.limit=16",
    ]  # fmt: skip
    found = json.loads(
        commands.finish(
            commands.call(
                "tune", "methods-tiny", "--data", str(labelled), "--storage", str(storage),
                "--json", *[word for item in sets for word in ("--set", item)],
            )
        )
    )  # fmt: skip
    assert found["ended"]
    assert [t["params"] for t in found["trials"][:2]] == [
        {"method.name": "mae"},
        {"method.name": "simmim"},
    ]
    folder = storage / "methods-tiny"
    kept = [load_bundle(folder / "trials" / f"000{number}").card for number in range(2)]
    assert [card.method for card in kept] == ["mae", "simmim"]
    repeated = {trial["params"]["method.name"] for trial in found["trials"][2:]}
    assert repeated == {"mae", "simmim"}
    text = (folder / "report.md").read_text()
    assert "method.name" in text
    assert "as many FLOPs of training" in text


# One by one, the same is asked of the sweep whose driver is killed, too.
@pytest.mark.slow
def test_killed_trial_processes__resume_and_change_nothing(
    commands: Any, asked: Asked, undisturbed: Found, storage: Path
) -> None:
    folder = storage / "lost"
    sweep = commands.start(*asked("lost"))
    commands.wait_until(lambda: reached(folder / "trials/0001", 3), sweep)
    commands.kill_ray("ResourceTrainable")
    found = json.loads(commands.finish(sweep))
    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert sum(t["failures"] for t in found["trials"]) >= 1
    assert scores(folder) == scores(storage / "undisturbed")
    assert losses(folder / "trials/0001") == losses(storage / "undisturbed/trials/0001")


def test_killed_trial_and_driver__resume_and_train_nothing_twice(
    commands: Any, asked: Asked, undisturbed: Found, storage: Path
) -> None:
    folder = storage / "orphaned"
    sweep = commands.start(*asked("orphaned", *ONE, sets=ONE_CPU))
    commands.wait_until(lambda: reached(folder / "trials/0001", 2), sweep)
    commands.kill_ray("ResourceTrainable")
    commands.wait_until(lambda: reached(folder / "trials/0001", 5), sweep)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    before = (folder / "trials/0000/metrics.jsonl").stat()
    assert read_record(RunDir(str(folder))).trials[1].failures == 1
    changed = asked("orphaned", sets=("budget.steps=4",))
    assert "budget.steps: 8 -> 4" in commands.refused(commands.call(*changed))

    resumed = commands.call(
        "tune", "--resume", "orphaned", "--storage", str(storage), "--json", *ONE
    )
    found = json.loads(commands.finish(resumed))
    assert found["ended"]
    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert [t["failures"] for t in found["trials"]] == [0, 1]
    assert (folder / "trials/0000/metrics.jsonl").stat().st_mtime_ns == before.st_mtime_ns
    assert scores(folder) == scores(storage / "undisturbed")
    assert losses(folder / "trials/0001") == losses(storage / "undisturbed/trials/0001")
    study = optuna.load_study(study_name=found["study"][0], storage=found["study"][1])
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 2


@pytest.mark.slow
def test_failed_trial__is_told_with_its_reason_and_ends_nothing(
    commands: Any, asked: Asked, storage: Path
) -> None:
    sets = (
        "space.method.decoder_depth=null", "space.method.mask_ratio=null",
        "space.optim.base_lr={grid: [1.0e-3, 1.0e+30]}",
    )  # fmt: skip
    found = json.loads(commands.finish(commands.call(*asked("diverging", sets=sets))))
    assert found["ended"]
    assert [t["state"] for t in found["trials"]] == ["finished", "failed"]
    assert "not finite" in found["trials"][1]["reason"]
    assert found["best"]["trial"] == "0000"
    assert "not finite" in (storage / "diverging/report.html").read_text()


@pytest.mark.slow
def test_weights_to_begin_with__are_a_key_of_the_space(
    commands: Any, asked: Asked, undisturbed: Found, storage: Path
) -> None:
    trials = storage / "undisturbed/trials"
    begun = [str(trials / number / "bundle") for number in ("0000", "0001")]
    sets = (
        "space.method.decoder_depth=null", "space.method.mask_ratio=null",
        f"space.method.init={{grid: [{', '.join(begun)}]}}", "base.set.optim.base_lr=1.0e-9",
    )  # fmt: skip
    found = json.loads(commands.finish(commands.call(*asked("begun", sets=sets))))

    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert [t["params"]["method.init"] for t in found["trials"]] == begun
    for number, start in zip(("0000", "0001"), begun, strict=True):
        trial = storage / "begun/trials" / number
        plan = json.loads((trial / "plan.json").read_text())
        card = json.loads(Path(start, "bundle.json").read_text())
        assert plan["recipe"]["method"]["init"] == start
        assert len(plan["recipe"]["method"]["init_sha256"]) == 64
        kept = json.loads((trial / "initial/bundle.json").read_text())
        assert kept["weights_sha256"] == card["weights_sha256"]
        # At a rate of next to nothing a trial ends with the weights that it began with.
        ended = load_bundle(trial).encoder.state_dict()
        for name, value in load_bundle(start).encoder.state_dict().items():
            torch.testing.assert_close(ended[name], value, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_hours__cut_what_runs_and_more_of_them_go_on(
    commands: Any, asked: Asked, undisturbed: Found, storage: Path
) -> None:
    short = ("budget.hours=0.0025", *ONE_CPU)  # 9 s: too short to end in, and perhaps to begin in
    done = commands.call(*asked("timed", *ONE, sets=short))
    cut = json.loads(done.stdout)
    assert done.exit_code == (1 if cut["best"] is None else 0), done.stderr
    assert not cut["ended"]
    assert {t["state"] for t in cut["trials"]} <= {"finished", "cut"}
    longer = asked("timed", *ONE, sets=("budget.hours=1", *ONE_CPU))
    found = json.loads(commands.finish(commands.call(*longer)))
    assert found["ended"]
    assert found["seconds"] > cut["seconds"] > 9
    assert scores(storage / "timed") == scores(storage / "undisturbed")


def test_impossible_sweep__is_refused_before_anything_starts(
    commands: Any, asked: Asked, storage: Path
) -> None:
    said = commands.refused(commands.call(*asked("impossible", sets=("resources.num_workers=4",))))
    assert "4 workers x 1 CPU; the cluster has 2 CPUs" in said
    assert not (storage / "impossible").exists()


def test_winner__is_registered_with_its_lineage_and_served_by_name(
    commands: Any, undisturbed: Found, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")

    def models(*arguments: str) -> Any:
        return json.loads(commands.finish(commands.call("models", *arguments, "--json")))

    place = ("--storage", str(storage))
    best = undisturbed["best"]
    for reference in ("undisturbed:best", f"{storage}/undisturbed:best"):
        found = models("register", reference, "--name", "photos", "--alias", "champion", *place)
        assert found["model"] == "photos@v1"
    assert found["aliases"] == ["champion"]
    assert found["trial"] == best["trial"]
    assert found["sweep"] == str(storage / "undisturbed")
    assert json.loads(found["params"]) == best["params"]
    knn = found["scores"]["knn"]
    assert knn["headline"] == undisturbed["final"]["headline"]
    assert knn["chosen_by"]["headline"] == best["score"]
    assert "on 8 pictures kept from the choice" in found["sweep_score"]
    assert found["data_fingerprint"]
    other = next(t for t in undisturbed["trials"] if t["trial"] != best["trial"])
    second = models("register", f"undisturbed:{int(other['trial'])}", "--name", "photos", *place)
    assert second["model"] == "photos@v2"

    from mimray.service.commands.serve import resolve, serve_config

    config = serve_config(["photos@champion"], None, None, {})
    served = resolve(config.models["photos"].bundle)
    assert served.number == "1"
    assert (served.bundle / "bundle.json").is_file()


@pytest.mark.slow
def test_trials_of_two_workers__nest_a_trainer_each(
    commands: Any, asked: Asked, storage: Path
) -> None:
    pairs = commands.call(*asked("pairs", sets=("resources.num_workers=2",)))
    found = json.loads(commands.finish(pairs))
    assert [t["state"] for t in found["trials"]] == ["finished"] * 2
    assert [len(s) for s in scores(storage / "pairs").values()] == [2, 2]
    assert len(losses(storage / "pairs/trials/0000")) == STEPS
