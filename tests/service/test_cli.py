"""The command line as a person meets it: help, answers, refusals. No cluster is started."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from ray.exceptions import ActorUnavailableError, OutOfMemoryError

from mimray.service.cli.main import cli
from mimray.service.cli.options import command_line

PRETRAIN = ["pretrain", "mae-tiny", "--data"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def refused(*arguments: str) -> str:
    """The one line a refused command prints."""
    result = CliRunner().invoke(cli, list(arguments))
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return errors[0]


def test_help__imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['mimray', '--help']\n"
        "from mimray.service.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'timm', 'mlflow', 'numpy', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_interrupt__one_line_and_the_status_of_the_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(context: click.Context) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands["recipes"], "invoke", interrupted)
    result = CliRunner().invoke(cli, ["recipes"])
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")


def test_module__is_the_command() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "mimray", "--version"], check=True, capture_output=True, text=True
    )
    assert told.stdout.startswith("mimray, version ")


COMMANDS = [
    [],
    *([name] for name in cli.commands),
    *(
        [name, below]
        for name, group in cli.commands.items()
        if isinstance(group, click.Group)
        for below in group.commands
    ),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help__every_command_shows_an_example(command: list[str]) -> None:
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    if command not in (["data"], ["models"]):
        assert "Example: mimray" in result.output


def test_recipes__lists_and_prints() -> None:
    listed = CliRunner().invoke(cli, ["recipes"]).output
    assert "mae-tiny" in listed
    assert "mae-vit-b" in listed
    tree = json.loads(CliRunner().invoke(cli, ["recipes", "mae-vit-b", "--json"]).output)
    assert tree["encoder"]["width"] == 768
    assert tree["method"]["decoder_depth"] == 8


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("method.mask_rato=0.5", "did you mean 'method.mask_ratio'"),
        ("method.mask_ratio=1.5", "'method.mask_ratio' is 1.5: input should be less than 1"),
        ("method.mask_ratio=0.999", "leaves no visible patch of 64"),
        ("optim.batch_size=many", "'optim.batch_size' is 'many'"),
        ("encoder.patch_size=7", "encoder.patch_size 7 does not divide data.image_size"),
        ("encoder.name=vit_enormous", "'encoder.name' is 'vit_enormous'"),
        ("engine.zero_stage=4", "'engine.zero_stage' is 4"),
        ("nonsense", "not of the form a.b=value"),
        ("seed=-1", "'seed' is -1"),
    ],
)
def test_pretrain__wrong_key_or_value(pictures: Path, override: str, wanted: str) -> None:
    assert wanted in refused(*PRETRAIN, str(pictures), "--set", override)


def test_pretrain__unknown_recipe(pictures: Path) -> None:
    message = refused("pretrain", "mae-tine", "--data", str(pictures))
    assert "unknown recipe 'mae-tine', did you mean 'mae-tiny'?" in message


def test_pretrain__recipe_file_that_is_not_one(pictures: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("encoder: [unclosed")
    assert "is not YAML" in refused("pretrain", str(broken), "--data", str(pictures))
    assert "no recipe file" in refused("pretrain", "absent.yaml", "--data", str(pictures))


def test_pretrain__data_that_is_not_there(tmp_path: Path) -> None:
    assert "does not exist" in refused(*PRETRAIN, str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refused(*PRETRAIN, str(tmp_path / "empty"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no picture here")
    assert "picture" in refused(*PRETRAIN, str(tmp_path / "text"))


@pytest.mark.parametrize("option", ["--data", "--storage", "--init"])
def test_pretrain__a_password_in_an_address_is_refused_before_anything_is_written(
    pictures: Path, tmp_path: Path, option: str
) -> None:
    given = {"--data": str(pictures), "--storage": str(tmp_path / "runs")}
    given[option] = "s3://AKIA:s3cr3t@bucket/place"
    message = refused("pretrain", "mae-tiny", "--name", "a", *(w for o in given.items() for w in o))
    assert "s3://AKIA:***@bucket/place holds a secret" in message
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("ray_session")
def test_pretrain__a_tracking_server_that_is_not_there(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cr3t@127.0.0.1:9")
    few = (
        "--storage",
        str(tmp_path),
        "--set",
        "optim.batch_size=16",
        "--set",
        "data.num_workers=0",
    )
    message = refused(*PRETRAIN, str(pictures), *few)
    assert message.startswith("error: no MLflow server answers at http://me:***@127.0.0.1:9")


def test_submit__a_password_in_a_command_is_refused() -> None:
    message = refused("submit", "--", "pretrain", "mae-tiny", "--data", "s3://AKIA:s3cr3t@bucket")
    assert "s3://AKIA:***@bucket holds a secret" in message


def test_tune__a_password_in_the_address_of_a_study_is_refused(pictures: Path) -> None:
    place = "storage=postgresql://me:s3cr3t@db/optuna"
    message = refused("tune", "mae-mask-depth", "--data", str(pictures), "--set", place)
    assert "postgresql://me:***@db/optuna holds a secret" in message
    assert "PGPASSWORD" in message


def test_command_line__is_recorded_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mimray", "tune", "--data", "s3://A:s3cr3t@b/c d"])
    assert command_line() == "mimray tune --data 's3://A:***@b/c d'"


def test_pretrain__fewer_pictures_than_a_batch(pictures: Path) -> None:
    message = refused(*PRETRAIN, str(pictures), "--set", "optim.batch_size=128")
    assert "70 pictures, fewer than one global batch of 128" in message


def test_pretrain__batch_that_workers_cannot_share(pictures: Path) -> None:
    assert "cannot be split over 3 workers" in refused(*PRETRAIN, str(pictures), "--workers", "3")


def test_pretrain__unwritable_storage(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(*PRETRAIN, str(pictures), "--storage", str(tmp_path / "file"), "--steps", "1")
    assert str(tmp_path / "file") in message


def test_fresh__deletes_runs_only(pictures: Path, tmp_path: Path) -> None:
    message = refused(
        *PRETRAIN, str(pictures), "--storage", str(tmp_path), "--name", "pictures", "--fresh"
    )
    assert "is not a run" in message
    assert "is not a demo's" in refused("demo", "--out", str(pictures), "--fresh")
    (pictures.parent / "project/data").mkdir(parents=True)
    (pictures.parent / "project/data/mine.png").write_bytes(b"a user's own")
    message = refused("demo", "--out", str(pictures.parent / "project"), "--fresh")
    assert "is not a demo's" in message
    assert len(list(pictures.iterdir())) == 70


def test_serve__what_is_not_a_bundle(tmp_path: Path) -> None:
    assert "no bundle at" in refused("serve", str(tmp_path / "absent"))
    assert "neither a bundle nor a run" in refused("serve", str(tmp_path))


def test_serve__public_address_without_a_key(tmp_path: Path) -> None:
    from mimray.trainers.bundles import BundleCard, save_bundle
    from mimray.trainers.config.recipes import load_recipe
    from mimray.trainers.models import build_encoder

    recipe = load_recipe("mae-tiny", ["encoder.depth=1"])
    encoder = build_encoder(recipe.encoder, (64, 64))
    card = BundleCard(
        name="m",
        encoder=recipe.encoder,
        image_size=(64, 64),
        channels=3,
        mean=recipe.data.mean,
        std=recipe.data.std,
    )
    save_bundle(tmp_path / "bundle", card, encoder.state_dict())
    message = refused("serve", str(tmp_path / "bundle"), "--host", "0.0.0.0")
    assert "no API key is set" in message
    assert "MIMRAY_API_KEY" in message


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG of that size, up to its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


@pytest.mark.usefixtures("ray_session")
def test_ingest__bad_pictures_are_listed_and_too_many_refused(
    pictures: Path, tmp_path: Path
) -> None:
    whole = (pictures / "0.png").read_bytes()
    (pictures / "truncated.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(pictures / "tiny.png")
    (pictures / "huge.png").write_bytes(png_header(30_000, 30_000))
    message = refused("data", "ingest", str(pictures), str(tmp_path / "out"))
    assert "3 of 73" in message
    assert not (tmp_path / "out").exists()

    result = CliRunner().invoke(
        cli,
        ["data", "ingest", str(pictures), str(tmp_path / "out"), "--max-rejected", "0.1", "--json"],
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["num_samples"] == 70
    assert set(report["rejected"]) == {"truncated", "too_small", "too_large"}
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert {Path(json.loads(line)["source"]).name for line in lines} == {
        "truncated.png",
        "tiny.png",
        "huge.png",
    }


@pytest.mark.usefixtures("ray_session")
def test_ingest__facts_of_splits_are_told_by_split(tmp_path: Path) -> None:
    for seed, place in enumerate(("train/cat", "train/dog", "Test/dog", "Test/emu")):
        (tmp_path / "src" / place).mkdir(parents=True)
        Image.new("RGB", (8, 8), (seed, 0, 0)).save(tmp_path / "src" / place / "1.png")
    arguments = ["data", "ingest", str(tmp_path / "src")]
    result = CliRunner().invoke(cli, [*arguments, str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["num_samples"] == 4
    assert not {"class_names", "fingerprint"} & report.keys()
    assert set(report["splits"]) == {"train", "test"}
    for split, found in report["splits"].items():
        written = json.loads((tmp_path / "out" / split / "dataset.json").read_text())
        assert found == {key: written[key] for key in ("num_samples", "class_names", "fingerprint")}
        assert found["class_names"] == ["cat", "dog", "emu"]

    result = CliRunner().invoke(
        cli, [*arguments, str(tmp_path / "one"), "--split", "train", "--json"]
    )
    alone = json.loads(result.stdout)
    assert (alone["class_names"], alone["splits"]) == (["cat", "dog"], {})
    assert len(alone["fingerprint"]) == 64


def test_commands__what_the_machine_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mimray.service.commands.models as models

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/runs/mlflow.db")

    monkeypatch.setattr(models, "list_models", full)
    assert refused("models", "list").startswith("error: /runs/mlflow.db: No space left on device")

    def lost(*_: object) -> None:
        raise ActorUnavailableError("The actor is unavailable: socket closed\nrpc_code: 14", None)

    monkeypatch.setattr(models, "list_models", lost)
    result = CliRunner().invoke(cli, ["models", "list"])
    assert result.exit_code == 75
    assert result.stderr.startswith("error: the Ray cluster is gone, or has lost a process")
    assert result.stderr.count("\n") == 1

    def large(*_: object) -> None:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.\nUsed: …")

    monkeypatch.setattr(models, "list_models", large)
    assert refused("models", "list").startswith("error: a node ran out of memory, and Ray killed a")

    def bug(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "x")

    monkeypatch.setattr(models, "list_models", bug)
    result = CliRunner().invoke(cli, ["models", "list"])
    assert isinstance(result.exception, FileNotFoundError)


def test_commands__a_working_directory_that_was_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the working directory cannot be found" in refused("data", "inspect", "pictures")


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "ascii"},
    ],
)
def test_commands__a_locale_that_is_not_utf8(tmp_path: Path, locale: dict[str, str]) -> None:
    folder = tmp_path / "Größe"
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (9, 9)).save(folder / f"ü{i}.png")
    done = subprocess.run(
        [sys.executable, "-m", "mimray.service", "data", "inspect", str(folder)],
        env={**os.environ, **locale},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"2" in done.stdout


def test_demo__records_the_command_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mimray.service.commands.demo as demo

    seen = {}
    monkeypatch.setattr(demo, "run_demo", lambda out, **asked: seen.update(out=out, **asked) or {})
    line = ["demo", "--out", "runs/my demo", "--steps", "7", "--fresh"]
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/mimray", *line])
    assert CliRunner().invoke(cli, line).exit_code == 0
    assert seen["command"] == "mimray demo --out 'runs/my demo' --steps 7 --fresh"
