"""Pre-training through the front door: real Ray, real DeepSpeed, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

STEPS = 12
TINY = [
    "encoder.depth=1", "method.decoder_depth=1", "optim.batch_size=16", "data.num_workers=1",
    "data.image_size=32", "checkpoint.every_steps=4", "logging.every_steps=1",
    "logging.num_pictures=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(48):
        smooth = rng.integers(0, 255, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize((50, 60)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def start(
    ray_session: str, pictures: Path, storage: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m service pretrain mae-tiny` against the session's cluster."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, *extra: str, data: Path = pictures) -> subprocess.Popen[str]:
        sets = [arg for item in TINY for arg in ("--set", item)]
        command = [
            sys.executable, "-m", "service", "pretrain", "mae-tiny", "--data", str(data),
            "--storage", str(storage), "--name", name, "--steps", str(STEPS), *sets, *extra,
        ]  # fmt: skip
        environment = {**os.environ, "RAY_ADDRESS": ray_session, "RAY_AUTH_MODE": "token"}
        process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, lines)}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (run / "metrics.jsonl").is_file() and len(losses(run)) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("training never got there")


def training_worker() -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
            return process
    raise AssertionError("no training worker is running")


@pytest.fixture(scope="module")
def undisturbed(start: Callable[..., subprocess.Popen[str]], storage: Path) -> dict[int, float]:
    """Losses of a run that nothing happened to."""
    result = json.loads(finish(start("undisturbed", "--json")))
    assert result["step"] == STEPS
    found = losses(storage / "undisturbed")
    assert list(found) == list(range(1, STEPS + 1))
    return found


def test_run__leaves_everything_it_promises(undisturbed: dict[int, float], storage: Path) -> None:
    run = storage / "undisturbed"
    for name in ("plan.json", "reconstruction.png", "loss.png", "bundle/encoder.safetensors"):
        assert (run / name).is_file(), name
    assert [p.name for p in (run / "checkpoints").iterdir()] != []
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"samples", "epoch", "lr", "grad_norm", "images_per_s", "data_wait", "memory_mib"} < set(
        row
    )
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    [found] = client.search_runs(
        [client.get_experiment_by_name("mimray").experiment_id],
        "attributes.run_name = 'undisturbed'",
    )
    history = client.get_metric_history(found.info.run_id, "loss")
    assert {m.step: m.value for m in history} == pytest.approx(undisturbed)
    assert found.info.status == "FINISHED"


def test_killed_driver__continued_run_repeats_it_bit_for_bit(
    start: Callable[..., subprocess.Popen[str]], storage: Path, undisturbed: dict[int, float]
) -> None:
    # 48 pictures, batches of 16: step 7 lies in the middle of the third epoch.
    process = start("driver-killed", "--set", "checkpoint.every_steps=2")
    wait_for_step(storage / "driver-killed", 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(start("driver-killed", "--set", "checkpoint.every_steps=2"))
    assert losses(storage / "driver-killed") == undisturbed


def test_killed_worker__run_goes_on_by_itself_bit_for_bit(
    start: Callable[..., subprocess.Popen[str]], storage: Path, undisturbed: dict[int, float]
) -> None:
    process = start("worker-killed", "--set", "checkpoint.every_steps=2")
    wait_for_step(storage / "worker-killed", 5, process)
    training_worker().kill()
    finish(process)
    assert losses(storage / "worker-killed") == undisturbed


def test_two_workers__learn_the_same_as_one(
    start: Callable[..., subprocess.Popen[str]], storage: Path, undisturbed: dict[int, float]
) -> None:
    finish(start("two", "--workers", "2"))
    found = losses(storage / "two")
    # Sums over two ranks round differently; the batches and masks are the same.
    assert found.keys() == undisturbed.keys()
    np.testing.assert_allclose(list(found.values()), list(undisturbed.values()), rtol=2e-5)


def test_same_name__finished_run_is_not_run_again(
    start: Callable[..., subprocess.Popen[str]], undisturbed: dict[int, float]
) -> None:
    result = json.loads(finish(start("undisturbed", "--json")))
    assert result["already_done"]


def test_same_name__changed_recipe_is_refused_with_the_difference(
    start: Callable[..., subprocess.Popen[str]], undisturbed: dict[int, float]
) -> None:
    process = start("undisturbed", "--set", "method.mask_ratio=0.5")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "method.mask_ratio: 0.75 -> 0.5" in err
    assert "--fresh" in err
    assert "Traceback" not in err


def test_too_many_workers__refused_with_the_arithmetic(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    process = start("crowd", "--workers", "16")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "16 workers x 1 CPUs = 16 CPUs; the cluster has 2" in err


def test_diverging_run__stops_before_the_update_and_says_where(
    start: Callable[..., subprocess.Popen[str]], storage: Path
) -> None:
    process = start("diverging", "--set", "optim.base_lr=1e35", "--set", "optim.warmup_steps=1")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the loss is not finite at step" in err
    assert "samples" in err
    assert "Traceback" not in err
    assert all(np.isfinite(list(losses(storage / "diverging").values())))


@pytest.mark.slow
def test_full_disk__last_whole_checkpoint_survives_and_the_run_goes_on(
    start: Callable[..., subprocess.Popen[str]],
    storage: Path,
    tmp_path: Path,
    undisturbed: dict[int, float],
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
        process = start("full", *keep_all)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 2, err
        assert "space" in err or "disk full" in err, err
        assert "Traceback" not in err
        whole = [p.parent.name for p in (small / "full").glob("checkpoints/*/manifest.json")]
        assert whole
        subprocess.run(["mount", "-o", "remount,size=256m", str(small)], check=True)
        finish(start("full", *keep_all))
        assert losses(small / "full") == undisturbed
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
