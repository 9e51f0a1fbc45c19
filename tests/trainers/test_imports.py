"""Imports of decode processes, of the driver and of workers, whose seconds everybody waits for."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mimray.trainers.config.recipes import load_recipe, shipped_recipes
from mimray.trainers.methods.catalogue import inputs_of
from tests.trainers.runs import write_noise

HEAVY = ("timm", "torchvision", "torch._dynamo", "deepspeed", "mlflow", "sklearn", "skimage", "ray")


def imported_by(code: str, given: bytes = b"") -> set[str]:
    """Those of `HEAVY` that a process has imported at the end of some code."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*sys.modules)"],
        input=given, capture_output=True, check=True,
    )  # fmt: skip
    return {*HEAVY} & {*done.stdout.decode().split()}


def test_decode_processes__import_no_network():
    recipes = [load_recipe(name) for name in shipped_recipes()]
    inputs = pickle.dumps([inputs_of(recipe) for recipe in recipes])

    found = imported_by(
        "import pickle, mimray.trainers.data.loader\npickle.loads(sys.stdin.buffer.read())", inputs
    )

    assert found == set()


def test_prepare__imports_no_network(tmp_path: Path):
    write_noise(tmp_path / "pictures", 8)

    found = imported_by(
        "from mimray.trainers.config.recipes import load_recipe\n"
        "from mimray.trainers.launch import Job, prepare\n"
        "recipe = load_recipe('mae-tiny', ['optim.batch_size=4', 'data.image_size=32'])\n"
        f"prepare(Job(recipe, {str(tmp_path / 'pictures')!r}, 'run', {str(tmp_path)!r}))"
    )

    assert found == {"ray"}


@pytest.mark.parametrize("before", ["", "import mlflow"])
def test_prepare_process__leaves_mlflow_to_others(before: str):
    found = imported_by(
        f"{before}\nimport torch\n"
        "from mimray.trainers.engine.deepspeed import prepare_process\n"
        "prepare_process(torch.device('cpu'))\n"
        f"assert ('mlflow' in sys.modules) == {bool(before)}\n"
        "import mlflow\n"
        "assert mlflow.__version__"
    )

    assert {"deepspeed", "mlflow"} <= found
