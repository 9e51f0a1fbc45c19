"""A method with a teacher, several views and masks, which the rest of the house does not know.

It comes as another distribution (`tests/plugin`): one file, one recipe, one line of entry points.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimray.trainers.bundles import load_bundle
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.storage import RunDir

ROOT = Path(__file__).parents[3]
PLUGIN = ROOT / "tests" / "plugin"
RANKS = Path(__file__).with_name("selfdistil_ranks.py")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(PLUGIN), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((48, 48)).save(folder / f"{i}.png")
    return folder


class Trainings:
    """Trainings by processes of their own; a run of the same name is continued."""

    def __init__(self, pictures: Path, folder: Path) -> None:
        self.pictures, self.folder = pictures, folder
        self._meetings = itertools.count()

    def job(self, name: str, *overrides: str, stop: int = 9, kill_at: int = 0) -> dict[str, Any]:
        """One training, to a step."""
        (self.folder / name).mkdir(exist_ok=True)
        return {
            "run": str(self.folder / name),
            "pictures": str(self.pictures),
            "overrides": overrides,
            "stop": stop,
            "kill_at": kill_at,
        }

    def run(self, *jobs: dict[str, Any], ranks: int = 1, device: str = "cpu") -> None:
        """Train one after the other, on so many ranks; a process costs the time of its imports."""
        meeting = str(self.folder / f"meeting-{next(self._meetings)}")
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    str(RANKS),
                    json.dumps(jobs),
                    meeting,
                    str(rank),
                    str(ranks),
                    device,
                ],  # fmt: skip
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            said = [process.communicate(timeout=800)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        wanted = -signal.SIGKILL if jobs[-1]["kill_at"] else 0
        assert [p.returncode for p in processes] == [wanted] * ranks, "\n".join(
            text[-3000:] for text in said
        )

    def state(self, name: str, step: int = 9) -> dict[str, torch.Tensor]:
        """The weights of a run at a step."""
        state: dict[str, torch.Tensor] = torch.load(self.folder / name / f"state-{step}.pt")
        return state

    def losses(self, name: str) -> list[float]:
        """The losses of a run, a value a step."""
        return losses(self.folder / name)


@pytest.fixture
def trainings(pictures: Path, tmp_path: Path) -> Trainings:
    return Trainings(pictures, tmp_path)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(RunDir(str(folder)))]


def test_house__does_not_know_the_method():
    rooms = ["trainers", "tuning", "serving", "service"]
    files = [path for room in rooms for path in (ROOT / room).rglob("*.py")]

    assert len(files) > 200
    assert [p for p in files if "selfdistil" in p.read_text().lower()] == []


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_run__killed_goes_on_bit_for_bit_and_exports_its_teacher(
    trainings: Trainings, tmp_path: Path, stage: int
):
    overrides = (f"engine.zero_stage={stage}", "engine.precision=fp32")
    trainings.run(
        trainings.job("whole", *overrides), trainings.job("killed", *overrides, kill_at=8)
    )
    trainings.run(trainings.job("killed", *overrides))
    state, resumed = trainings.state("whole"), trainings.state("killed")

    assert trainings.losses("killed") == trainings.losses("whole")
    assert state.keys() == resumed.keys()
    for name, value in state.items():
        assert torch.equal(value, resumed[name]), name

    encoder = load_bundle(tmp_path / "killed").encoder.state_dict()
    assert len(encoder) > 20
    for name, value in encoder.items():
        assert torch.equal(value, state[f"averages.encoder.{name}"]), name
    start = trainings.state("whole", 1)
    moved = "averages.encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(state[moved], start[moved])
    assert not torch.equal(state[moved], state[moved.removeprefix("averages.")])
    # Frozen for two updates, then trained.
    assert torch.equal(start["head.last.weight"], start["averages.head.last.weight"])
    assert not torch.equal(start["head.last.weight"], state["head.last.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_run__goes_on_with_other_numbers_of_workers(trainings: Trainings, stage: int):
    # A larger eps, since Adam makes whole steps of the rounding of gradients that are zero.
    overrides = (f"engine.zero_stage={stage}", "engine.precision=fp32", "optim.eps=1e-4")

    trainings.run(
        trainings.job("whole", *overrides), trainings.job("cut", *overrides, stop=3), ranks=2
    )
    trainings.run(trainings.job("cut", *overrides, stop=6), ranks=1)
    trainings.run(trainings.job("cut", *overrides), ranks=2)

    np.testing.assert_allclose(trainings.losses("cut"), trainings.losses("whole"), rtol=1e-5)
    cut = trainings.state("cut")
    for name, value in trainings.state("whole").items():
        torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("group", [pytest.param(1, marks=pytest.mark.slow), 8])
def test_targets__do_not_depend_on_workers_or_accumulation(trainings: Trainings, group: int):
    def job(name: str, micro_batch_size: int) -> dict[str, Any]:
        return trainings.job(
            name,
            "engine.precision=fp32",
            f"method.assignment_group={group}",
            "optim.batch_size=16",
            f"engine.micro_batch_size={micro_batch_size}",
            stop=4,
        )

    trainings.run(job("one", 16), job("parts", 8))
    trainings.run(job("two", 8), job("quarters", 4), ranks=2)

    for way in ("parts", "two", "quarters"):
        np.testing.assert_allclose(
            trainings.losses(way), trainings.losses("one"), rtol=2e-5, err_msg=way
        )


@pytest.mark.gpu
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_run__on_a_gpu(trainings: Trainings, stage: int):
    overrides = (f"engine.zero_stage={stage}", "engine.precision=bf16")

    trainings.run(trainings.job("run", *overrides, stop=6), device="cuda")
    trainings.run(trainings.job("run", *overrides), device="cuda")

    assert np.isfinite(trainings.losses("run")).all()
    state = trainings.state("run")
    assert not torch.equal(state["averages.encoder.norm.bias"], state["encoder.norm.bias"])


def command(*arguments: str, returncode: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == returncode, done.stderr[-3000:]
    return done.stderr if returncode else done.stdout


def test_plan__counts_the_teacher():
    said = command("-m", "service", "plan", str(PLUGIN / "selfdistil-tiny.yaml"), "--json")

    found: dict[str, Any] = json.loads(said)
    parts = {part["name"]: part for part in found["parts"]}
    assert parts["teacher"]["parameters"] > parts["encoder"]["parameters"] > 0
    # It sees two whole views; the student two views under two masks of a half, and two local ones.
    tokens, local, hidden = 17, 5, 9
    blocks = [2 * tokens, 2 * 2 * hidden + 2 * local]
    ratio = parts["encoder"]["forward_flops"] / parts["teacher"]["forward_flops"]
    assert ratio == pytest.approx(blocks[1] / blocks[0], rel=0.1)
    assert found["tokens"]["encoder"] == blocks[1]


def test_plan__refuses_a_group_that_micro_batches_do_not_hold():
    recipe = str(PLUGIN / "selfdistil-tiny.yaml")

    said = command(
        "-m", "service", "plan", recipe, "--set", "method.assignment_group=3", returncode=2
    )

    assert "normalises over 3 pictures" in " ".join(said.split())


@pytest.mark.slow
def test_pretrain__trains_it_on_two_workers_of_ray_and_begins_again_with_it(
    pictures: Path, tmp_path: Path
):
    recipe = str(PLUGIN / "selfdistil-tiny.yaml")

    command(
        "-m", "service", "pretrain", recipe, "--data", str(pictures), "--storage", str(tmp_path),
        "--name", "run", "--workers", "2", "--set", "engine.zero_stage=2",
    )  # fmt: skip

    assert len(losses(tmp_path / "run")) == 9
    assert load_bundle(tmp_path / "run").card.method == "selfdistil"
    # Its teacher and its student both begin with what the first left, its teacher.
    command(
        "-m", "service", "pretrain", recipe, "--data", str(pictures), "--storage", str(tmp_path),
        "--name", "again", "--init", str(tmp_path / "run"), "--set", "optim.base_lr=1.0e-9",
    )  # fmt: skip

    run, again = load_bundle(tmp_path / "run"), load_bundle(tmp_path / "again")
    assert again.card.recipe["method"]["init"] == str(tmp_path / "run")
    assert len(again.card.recipe["method"]["init_sha256"]) == 64
    for name, value in run.encoder.state_dict().items():
        found = again.encoder.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5, msg=name)
