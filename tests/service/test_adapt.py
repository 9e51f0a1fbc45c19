"""`mimray adapt`: what follows from the start, what is refused before anything runs, and a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from pydantic import TypeAdapter

from mimray.service.cli.main import cli
from mimray.service.commands import adapt as command
from mimray.trainers.bundles import BundleCard, read_card, save_bundle
from mimray.trainers.config.model import EncoderConfig
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.errors import StorageError
from mimray.trainers.methods.needs import with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.registry import Registry

VIT = {"name": "vit", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SWIN = {"name": "swin", "width": 16, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4,
        "window_size": 4}  # fmt: skip
CONV = {"name": "conv", "widths": [8, 12], "depth": 1}
SETS = [
    "optim.batch_size=8", "method.num_prototypes=16", "method.assignment_group=8",
    "method.head_width=16", "data.num_workers=0",
    "logging.num_pictures=2", "logging.every_steps=1", "resources.cpus_per_worker=1",
]  # fmt: skip


def a_bundle(place: Path, encoder: dict[str, Any], size: tuple[int, int], **card: Any) -> Path:
    config: EncoderConfig = TypeAdapter(EncoderConfig).validate_python(encoder)
    torch.manual_seed(0)
    state = build_encoder(config, size, card.get("channels", 3)).state_dict()
    described = {"channels": 3, "mean": (0.4,) * 3, "std": (0.2,) * 3, "layers": (1,)} | card
    save_bundle(place, BundleCard(name="s", encoder=config, image_size=size, **described), state)
    return place


@pytest.fixture
def start(tmp_path: Path) -> Path:
    return a_bundle(tmp_path / "start", VIT, (32, 32))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Forty pictures without labels."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = rng.integers(0, 255, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty storage, with a registry of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return tmp_path / "runs"


def adapt(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["adapt", *map(str, arguments)])


def refusal(*arguments: object) -> str:
    """The one line of a command that is refused."""
    result = adapt(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


def completed(start: Path, recipe: str, **asked: Any) -> Any:
    """The recipe as the run gets it: completed by the start."""
    request = command.AdaptRequest(str(start), "pictures", **asked)
    following = list(command._following(read_card(start), recipe, request))
    return with_needs(load_recipe(recipe, following))


def test_recipe__goes_by_the_size_of_the_start():
    assert [command.recipe_for(n * 1e6) for n in (0.8, 5.7, 22, 86, 300)] == [
        "adapt-tiny", "adapt-vit-s", "adapt-vit-s", "adapt-vit-b", "adapt-vit-b",
    ]  # fmt: skip


def test_recipe__takes_shape_size_and_pooling_of_the_start(tmp_path: Path):
    encoder = {**VIT, "patch_size": 4, "norm_eps": 1e-5, "mlp_ratio": 2.0}
    place = a_bundle(tmp_path / "small", encoder, (48, 24), pooling="cls")
    found = completed(place, "adapt-tiny")
    assert (found.encoder.width, found.encoder.depth, found.encoder.patch_size) == (32, 2, 4)
    assert (found.encoder.norm_eps, found.encoder.mlp_ratio) == (1e-5, 2.0)
    assert found.data.image_size == (48, 24)  # no more than the start's and the recipe's
    assert found.method.local_px == 12  # of 32 at 64, as of 24
    assert (found.data.mean, found.method.pooling) == ((0.4,) * 3, "cls")
    assert found.method.gram_weight == 1


def test_recipe__is_no_larger_than_it_says_and_whole_in_patches(tmp_path: Path):
    encoder = {**VIT, "patch_size": 14}
    found = completed(a_bundle(tmp_path / "large", encoder, (518, 518)), "adapt-vit-s", lora=3)
    assert found.data.image_size == (224, 224)
    assert found.method.local_px == 84
    assert (found.lora.rank, found.lora.alpha) == (3, 16)
    assert found.encoder.drop_path == 0.1  # the recipe's own
    set_ = completed(tmp_path / "large", "adapt-vit-s", overrides=("data.image_size=[56,112]",))
    assert (set_.data.image_size, set_.method.local_px) == ((56, 112), 14)


def test_recipe__of_a_start_that_sees_grey(tmp_path: Path):
    place = a_bundle(tmp_path / "grey", VIT, (32, 32), channels=1, mean=(0.3,), std=(0.2,))
    found = completed(place, "adapt-tiny")
    assert (found.data.channels, found.data.mean) == (1, (0.3,))


def test_recipe__of_a_swin(tmp_path: Path):
    found = completed(a_bundle(tmp_path / "swin", SWIN, (64, 64)), "adapt-tiny")
    assert (found.encoder.depths, found.encoder.window_size) == ((1, 1), 4)


def test_start__without_tokens_is_refused(tmp_path: Path, pictures: Path, storage: Path):
    conv = a_bundle(tmp_path / "conv", CONV, (32, 32))
    line = refusal(conv, "--data", pictures, "--storage", storage)
    assert "has encoder conv, which makes no patch tokens" in line
    assert "no bundle at nowhere" in refusal("nowhere", "--data", pictures)


def test_pictures__are_refused_before_anything_runs(
    start: Path, pictures: Path, storage: Path, labelled: Path
):
    given = (start, "--data", pictures, "--storage", storage)
    assert "is the data adapted to" in refusal(*given, "--retain", pictures)
    assert "has no labels" in refusal(*given, "--labelled", pictures)
    assert "(--labelled DATA)" in refusal(*given, "--verdict-set", "k=3")
    small = ("--set", "optim.batch_size=8", "--set", "method.assignment_group=8")
    assert "num_prototypes 256 is more than the 40 pictures" in refusal(*given, *small)
    assert "rank 99 is not below the full rank" in refusal(
        *given, *small, "--lora", 99, "--set", "method.num_prototypes=16"
    )
    assert not storage.exists()


def test_register__a_name_is_looked_at_before_anything_runs(
    start: Path, pictures: Path, storage: Path
):
    given = (start, "--data", pictures, "--storage", storage)
    assert "--register 'a b' is not allowed" in refusal(*given, "--register", "a b")
    Registry.open(str(storage)).register(str(start), "photos")
    result = adapt(*given, "--register", "photos")  # which goes on to fail for its prototypes
    assert "photos has 1 version; with a gain photos@v2 is registered beside" in result.stderr


def judged(monkeypatch: pytest.MonkeyPatch, start: Path, gain: bool | None) -> list[Any]:
    """Put a verdict in place of training and scoring; gives the requests that it gets."""
    requests: list[Any] = []

    def give(request: Any) -> dict[str, Any]:
        requests.append(request)
        files = {"md": "verdict.md", "png": "verdict.png", "pca": "pca.png"}
        return {"gain": gain, "reasons": ["it was so"], "lines": ["knn 1 -> 2"], "notes": [],
                "files": files}  # fmt: skip

    done = {"run": "r", "bundle": str(start), "plan_hash": "h", "step": 1, "loss": 0.5}
    monkeypatch.setattr(command, "run_pretrain", lambda recipe, **asked: done)
    monkeypatch.setattr(command, "run_verdict", give)
    return requests


@pytest.mark.parametrize(("gain", "why"), [(False, "no gain was shown"), (None, "no labels")])
def test_register__is_refused_without_a_gain_unless_told(
    gain: bool | None, why: str, start: Path, pictures: Path, storage: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    judged(monkeypatch, start, gain)
    given = (start, "--data", pictures, "--storage", storage, "--register", "photos")

    result = adapt(*given)
    assert result.exit_code == 1
    assert f"not registered as photos: {why}" in result.stderr
    assert Registry.open(str(storage)).versions("photos") == []

    result = adapt(*given, "--without-gain", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["registered"] == "photos@v1"
    (version,) = Registry.open(str(storage)).versions("photos")
    assert version.facts["gain"] == json.dumps(gain)
    assert version.facts["adapted_from"].startswith(f"{start} ")


def test_register__a_gain_is_registered(
    start: Path, pictures: Path, storage: Path, monkeypatch: pytest.MonkeyPatch
):
    requests = judged(monkeypatch, start, True)
    result = adapt(
        start, "--data", pictures, "--storage", storage, "--name", "mine", "--register", "photos",
        "--limit", 9,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    *_, said, registered = result.stdout.splitlines()
    assert said == "verdict: gain: it was so"
    assert registered == "registered as photos@v1"
    (request,) = requests
    # The run's own copy of the start, which stays whatever becomes of the start.
    assert (request.adapted, request.start) == (f"{storage}/mine", f"{storage}/mine/initial")
    assert request.limit == 9


@pytest.mark.slow
def test_adapt__trains_judges_and_goes_on_from_what_is_there(
    start: Path, pictures: Path, labelled: Path, storage: Path, monkeypatch: pytest.MonkeyPatch,
    ray_session: str,
):  # fmt: skip
    sets = [word for item in SETS for word in ("--set", item)]
    given = (
        start, "--data", pictures, "--labelled", labelled, "--retain", labelled / "val" / "red",
        "--storage", storage, "--steps", 4, "--verdict-set", "k=3", *sets, "--json",
    )  # fmt: skip
    with monkeypatch.context() as patch:  # killed as the verdict begins
        patch.setattr(command, "run_verdict", _full)
        assert "disk full" in refusal(*given)
    run = storage / "adapt-tiny"
    trained = (run / "bundle" / "encoder.safetensors").read_bytes()
    start.rename(start.with_name("gone"))

    result = adapt(*given, "--name", "adapt-tiny")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads(result.stdout)
    assert (run / "bundle" / "encoder.safetensors").read_bytes() == trained
    assert found["step"] == 4
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["gram_loss"] > 0
    verdict = found["verdict"]
    assert {figure["task"] for figure in verdict["figures"]} == {"knn", "rankme", "cka"}
    assert verdict["gain"] in (True, False)
    for name in ("verdict.md", "verdict.json", "verdict.png", "pca.png"):
        assert (run / "verdict" / name).is_file(), name

    monkeypatch.setattr("mimray.service.commands.verdict_figures.evaluate_subjects", _full)
    again = json.loads(adapt(*given, "--name", "adapt-tiny").stdout)
    assert again["verdict"]["figures"] == verdict["figures"]


def _full(*_: Any) -> Any:
    raise StorageError("disk full")
