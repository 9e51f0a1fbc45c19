"""Pre-training through the front door: real Ray, real DeepSpeed, real kills."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

STEPS = 12
TINY = [
    "encoder.depth=1", "method.decoder_depth=1", "optim.batch_size=16", "data.num_workers=1",
    "data.image_size=32", "checkpoint.every_steps=4", "logging.every_steps=1",
    "logging.num_pictures=2",
]  # fmt: skip
Asked = Callable[..., list[str]]


@pytest.fixture(scope="module")
def asked(photos: Path, storage: Path) -> Asked:
    """Arguments of a short `pretrain` under a name."""
    sets = [arg for item in TINY for arg in ("--set", item)]

    def arguments(name: str, *extra: str) -> list[str]:
        return [
            "pretrain", "mae-tiny", "--data", str(photos), "--storage", str(storage),
            "--name", name, "--steps", str(STEPS), *sets, *extra,
        ]  # fmt: skip

    return arguments


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def reached(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").is_file() and len(losses(run)) >= step


@pytest.fixture(scope="module")
def undisturbed(commands: Any, asked: Asked, storage: Path) -> dict[int, float]:
    """Losses of a run that nothing happened to; its process printed its result and nothing else."""
    # The others have no probe, and learn the same.
    probe = ("--set", "evaluation.every_steps=5")
    result = json.loads(commands.finish(commands.start(*asked("undisturbed", "--json", *probe))))
    assert result["step"] == STEPS
    assert [step for step, *_ in result["probe"]["curve"]] == [5, 10, STEPS]
    assert result["probe"]["last"] == result["probe_rankme"] > 1
    found = losses(storage / "undisturbed")
    assert list(found) == list(range(1, STEPS + 1))
    return found


def tracked(storage: Path, name: str) -> tuple[Any, Any]:
    """MLflow's client, and its run of a name."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    [found] = client.search_runs(
        [client.get_experiment_by_name("mimray").experiment_id], f"attributes.run_name = '{name}'"
    )
    return client, found


def status_of(storage: Path, name: str) -> str:
    return str(tracked(storage, name)[1].info.status)


def test_run__leaves_everything_it_promises(undisturbed: dict[int, float], storage: Path) -> None:
    run = storage / "undisturbed"
    for name in ("plan.json", "reconstruction.png", "loss.png", "bundle/encoder.safetensors"):
        assert (run / name).is_file(), name
    assert [p.name for p in (run / "checkpoints").iterdir()] != []
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"samples", "epoch", "lr", "grad_norm", "images_per_s", "data_wait", "memory_mib"} < set(
        row
    )
    client, found = tracked(storage, "undisturbed")
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {m.step: m.value for m in history} == pytest.approx(undisturbed)
    probed = client.get_metric_history(found.info.run_id, "probe_rankme")
    assert [m.step for m in probed] == [5, 10, STEPS]
    assert (run / "probe/rankme.json").is_file()
    assert (run / "probe.png").is_file()
    assert found.info.status == "FINISHED"


@pytest.mark.slow
def test_killed_driver__continued_run_repeats_it_bit_for_bit(
    commands: Any, asked: Asked, storage: Path, undisturbed: dict[int, float]
) -> None:
    # 48 pictures, batches of 16: step 7 lies in the middle of the third epoch.
    arguments = asked("driver-killed", "--set", "checkpoint.every_steps=2")
    process = commands.start(*arguments)
    commands.wait_until(lambda: reached(storage / "driver-killed", 7), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    commands.finish(commands.call(*arguments))
    assert losses(storage / "driver-killed") == undisturbed


# Long enough for a signal to be heard; no checkpoint is due before its end.
LONG = ("--steps", "400", "--set", "checkpoint.every_steps=1000")


@pytest.fixture(scope="module")
def long_run(commands: Any, asked: Asked, storage: Path) -> dict[int, float]:
    """Losses of the long run that nothing happened to."""
    commands.finish(commands.call(*asked("long", *LONG)))
    return losses(storage / "long")


@pytest.mark.slow
def test_signal__run_ends_after_a_checkpoint_and_goes_on_bit_for_bit(
    commands: Any, asked: Asked, storage: Path, long_run: dict[int, float]
) -> None:
    arguments = asked("stopped", *LONG)
    process = commands.start(*arguments)
    commands.wait_until(lambda: reached(storage / "stopped", 5), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 75, said
    [checkpoint] = (storage / "stopped/checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert 5 <= step < 400
    assert f"stopped as asked after step {step} of 400" in said
    assert status_of(storage, "stopped") == "KILLED"

    commands.finish(commands.start(*arguments))
    assert losses(storage / "stopped") == long_run
    assert status_of(storage, "stopped") == "FINISHED"


@pytest.mark.slow
def test_hung_worker__is_found_and_the_run_goes_on_bit_for_bit(
    commands: Any, asked: Asked, storage: Path, long_run: dict[int, float]
) -> None:
    every = ("--steps", "400", "--set", "checkpoint.every_steps=20")
    process = commands.start(*asked("hung", *every, "--set", "resources.hang_timeout_s=5"))
    commands.wait_until(lambda: reached(storage / "hung", 25), process)
    commands.kill_ray("RayTrainWorker", by=signal.SIGSTOP)
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert re.search(r"rank 0 .* no sign of life for [5-9] s: all workers are ended", said)
    assert re.search(r"start 2, .*: 1 worker from step \d+", said)
    assert "no sign of life" in (storage / "hung/hang.log").read_text()
    assert losses(storage / "hung") == long_run


# `test_methods.py` kills one of two workers, every time.
@pytest.mark.slow
def test_killed_worker__run_goes_on_by_itself_bit_for_bit(
    commands: Any, asked: Asked, storage: Path, undisturbed: dict[int, float]
) -> None:
    process = commands.start(*asked("worker-killed", "--set", "checkpoint.every_steps=2"))
    commands.wait_until(lambda: reached(storage / "worker-killed", 5), process)
    commands.kill_ray("RayTrainWorker")
    commands.finish(process)
    assert losses(storage / "worker-killed") == undisturbed


@pytest.mark.slow
def test_two_workers__learn_the_same_as_one(
    commands: Any, asked: Asked, storage: Path, undisturbed: dict[int, float]
) -> None:
    probe = ("--set", "evaluation.every_steps=5")  # of rank 0, while the other one waits
    commands.finish(commands.call(*asked("two", "--workers", "2", *probe)))
    found = losses(storage / "two")
    # Sums over two ranks round differently; the batches and masks are the same.
    assert found.keys() == undisturbed.keys()
    np.testing.assert_allclose(list(found.values()), list(undisturbed.values()), rtol=2e-5)


def test_same_name__finished_run_is_not_run_again(
    commands: Any, asked: Asked, undisturbed: dict[int, float]
) -> None:
    result = json.loads(commands.finish(commands.call(*asked("undisturbed", "--json"))))
    assert result["already_done"]


def test_library__does_what_the_command_does(
    commands: Any, photos: Path, storage: Path, undisturbed: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import mimray

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{storage}/mlflow.db")
    settings = {key: yaml.safe_load(value) for key, _, value in (s.partition("=") for s in TINY)}
    probe = {"evaluation.every_steps": 5}
    run = mimray.pretrain(
        "mae-tiny", photos, name="undisturbed", storage=storage, steps=STEPS,
        settings={**settings, **probe},
    )  # fmt: skip
    assert run.details["already_done"]
    assert (run.folder, run.step) == (str(storage / "undisturbed"), STEPS)
    assert run.loss == undisturbed[STEPS]
    assert run.encoder().card.step == STEPS
    png = run._repr_png_()
    assert png == (storage / "undisturbed/reconstruction.png").read_bytes()
    with pytest.raises(mimray.MimrayError, match=r"method\.mask_ratio: 0\.75 -> 0\.5"):
        mimray.pretrain(
            "mae-tiny", photos, name="undisturbed", storage=storage, steps=STEPS,
            settings={**settings, **probe, "method.mask_ratio": 0.5},
        )  # fmt: skip

    score = mimray.evaluate(run.bundle, "knn", photos, settings={"k": 3}, val_share=0.25)
    assert (score.task, score.metric) == ("knn", "accuracy")
    assert score.headline == score.metrics["accuracy"] == score.details["headline"]
    assert score._repr_png_() == Path(score.pictures[0]).read_bytes()
    assert score.head is not None
    head = mimray.load_head(score.head, run.encoder())
    assert head.class_names == ("a", "b")
    assert len(repr(score)) < 400

    told = mimray.extract(run.bundle, photos, storage / "features", settings={"limit": 5})
    assert told["num_rows"] == 5
    with pytest.raises(mimray.MimrayError, match="dtype"):
        mimray.extract(run.bundle, photos, storage / "other", settings={"dtype": "float8"})
    with pytest.raises(mimray.MimrayError, match="unheard-of"):
        mimray.tune("unheard-of", photos, storage=storage)
    with pytest.raises(mimray.MimrayError, match="--head 'photos:kind=nowhere'|holds no trained"):
        mimray.serve({"photos": run.bundle}, heads={"photos": {"kind": "nowhere"}})


def test_same_name__changed_recipe_is_refused_with_the_difference(
    commands: Any, asked: Asked, undisturbed: dict[int, float]
) -> None:
    changed = asked("undisturbed", "--set", "method.mask_ratio=0.5")
    said = commands.refused(commands.call(*changed))
    assert "method.mask_ratio: 0.75 -> 0.5" in said
    assert "--fresh" in said


def test_too_many_workers__refused_with_the_arithmetic(commands: Any, asked: Asked) -> None:
    said = commands.refused(commands.call(*asked("crowd", "--workers", "16")))
    assert "16 workers x 1 CPUs = 16 CPUs; the cluster has 2" in said


def test_diverging_run__stops_before_the_update_and_says_where(
    commands: Any, asked: Asked, storage: Path
) -> None:
    sets = ("--set", "optim.base_lr=1e35", "--set", "optim.warmup_steps=1")
    said = commands.refused(commands.call(*asked("diverging", *sets)), code=1)
    assert "the loss is not finite at step" in said
    assert "samples" in said
    assert all(np.isfinite(list(losses(storage / "diverging").values())))


@pytest.mark.slow
def test_full_disk__last_whole_checkpoint_survives_and_the_run_goes_on(
    commands: Any, asked: Asked, tmp_path: Path, undisturbed: dict[int, float]
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    keep_all = ["--storage", str(small)]
    for item in ("checkpoint.every_steps=1", "checkpoint.keep=100"):
        keep_all += ["--set", item]
    try:
        said = commands.refused(commands.call(*asked("full", *keep_all)))
        assert "space" in said or "disk full" in said, said
        whole = [p.parent.name for p in (small / "full").glob("checkpoints/*/manifest.json")]
        assert whole
        subprocess.run(["mount", "-o", "remount,size=256m", str(small)], check=True)
        commands.finish(commands.call(*asked("full", *keep_all)))
        assert losses(small / "full") == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
