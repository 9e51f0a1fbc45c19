"""Heads from the command line and the registry to the replicas' settings, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.service.commands.serve import resolve, serve_config
from mimray.serving.config import check_config
from mimray.serving.deploy.rollout import check_version
from mimray.serving.deploy.serve_schema import ReplicaResources, Served, Version, serve_schema
from mimray.serving.deploy.settings import ModelSettings
from mimray.trainers import load_bundle
from mimray.trainers.errors import ServingError
from mimray.trainers.registry import Registry
from tests.serving.heads import save_linear, save_segmentation


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return Registry.open()


def test_serve_config__heads_of_a_command_line(bundles: dict[str, Path]) -> None:
    alpha, beta = str(bundles["alpha"]), str(bundles["beta"])
    one = serve_config([f"a={alpha}"], None, None, {}, ["scenes=runs/x", "boxes=s3://b/h?k=v"])
    assert one.models["a"].heads == {"scenes": "runs/x", "boxes": "s3://b/h?k=v"}
    two = serve_config([f"a={alpha}", f"b={beta}"], None, None, {}, ["b:scenes=runs/x"])
    assert (two.models["a"].heads, two.models["b"].heads) == ({}, {"scenes": "runs/x"})
    for wrong, said in (
        ("scenes=runs/x", "does not say whose"),
        ("c:scenes=runs/x", "no model 'c'"),
        ("a:scenes", r"\[MODEL:\]NAME=FOLDER"),
    ):
        with pytest.raises(ServingError, match=said):
            serve_config([f"a={alpha}", f"b={beta}"], None, None, {}, [wrong])


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda folder: (folder / "head.json").unlink(), "holds no trained head"),
        (lambda folder: (folder / "head.json").write_text("{}"), "holds no trained head"),
        (lambda folder: _change(folder, encoder_sha256="0"), "was trained on alpha"),
        (lambda folder: _change(folder, config={"finetune": True}), "together with its encoder"),
        (lambda folder: _change(folder, config={"view": "center_crop"}), "view=whole"),
    ],
)
def test_check_version__a_head_that_cannot_be_served(
    bundles: dict[str, Path], tmp_path: Path, break_it: Callable[[Path], object], said: str
) -> None:
    folder = save_linear(tmp_path / "kind", load_bundle(bundles["alpha"]))
    tree = {"models": {"m": {"bundle": "m", "heads": {"kind": str(folder)}}}}
    config = check_config(tree, "serve").models["m"]
    version = Version("m", bundles["alpha"], "1")
    check_version(config, version)
    break_it(folder)
    with pytest.raises(ServingError, match=said):
        check_version(config, version)


def test_build__refuses_a_head_of_another_encoder(bundles: dict[str, Path], tmp_path: Path) -> None:
    folder = save_linear(tmp_path / "kind", load_bundle(bundles["alpha"]))
    arguments = ["serve", f"m={bundles['beta']}", "--head", f"kind={folder}", "--build"]
    refused = CliRunner().invoke(cli, arguments)
    assert (refused.exit_code, "was trained on alpha" in refused.output) == (2, True)
    arguments[1] = f"m={bundles['alpha']}"
    built = CliRunner().invoke(cli, arguments)
    assert built.exit_code == 0, built.output
    assert str(folder) in built.stdout


def test_registered_heads__come_with_their_version_and_no_other(
    bundles: dict[str, Path], tmp_path: Path, registry: Registry
) -> None:
    for name in ("alpha", "beta"):
        registry.register(str(bundles[name]), "m")
    alpha = load_bundle(bundles["alpha"])
    kind = save_linear(tmp_path / "kind", alpha)
    scenes = save_segmentation(tmp_path / "segmentation", alpha)
    run = CliRunner().invoke
    added = run(cli, ["models", "add-head", "m@v1", str(kind), "--json"])
    assert added.exit_code == 0, added.output
    assert json.loads(added.stdout)["heads"] == ["kind"]
    assert run(cli, ["models", "add-head", "m@v1", str(scenes), "--name", "scenes"]).exit_code == 0
    refused = run(cli, ["models", "add-head", "m@v2", str(kind)])
    assert (refused.exit_code, "was trained on alpha" in refused.output) == (2, True)

    first, second = resolve("m@v1"), resolve("m@v2")
    assert [name for name, _ in first.heads] == ["kind", "scenes"]
    assert second.heads == ()
    config = check_config(
        {"models": {"m": {"bundle": "m@v1", "heads": {"kind": str(kind)}}}}, "serve"
    )
    check_version(config.models["m"], first)
    served = Served("m", config.models["m"], first)
    tree = serve_schema(
        config, [served], {"m": ReplicaResources(1, 0, 1)}, key_sha256=None, needs_key=False
    )
    settings = ModelSettings.model_validate(tree["applications"][0]["args"])
    # The configuration's own wins over one that is registered under the same name.
    assert settings.heads == {"kind": str(kind), "scenes": dict(first.heads)["scenes"]}


def test_registered_head__of_the_same_name_takes_the_others_place(
    bundles: dict[str, Path], tmp_path: Path, registry: Registry
) -> None:
    version = registry.register(str(bundles["alpha"]), "m")
    alpha = load_bundle(bundles["alpha"])
    before = registry.add_head(version, "kind", save_linear(tmp_path / "a", alpha))
    after = registry.add_head(before, "kind", save_linear(tmp_path / "b", alpha, solver="ridge"))
    assert list(after.heads) == ["kind"]
    assert after.heads != before.heads
    folder = registry.heads(after)["kind"]
    assert json.loads((folder / "head.json").read_text())["config"]["solver"] == "ridge"


def _change(folder: Path, **members: object) -> None:
    card = json.loads((folder / "head.json").read_text())
    card["config"].update(members.pop("config", {}))  # type: ignore[call-overload]
    (folder / "head.json").write_text(json.dumps({**card, **members}))
