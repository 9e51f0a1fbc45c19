"""`mimray extract` as a person meets it: killed in the middle, and run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from mimray.service.cli.main import cli

NUM_PARTS = 40


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(2 * NUM_PARTS):
        path = tmp_path / "pictures" / ("cat", "dog")[number % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


@pytest.fixture(autouse=True)
def without_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is called in this process is done in it, without Ray."""
    monkeypatch.setattr("mimray.service.commands.extract.connected_if_larger", nullcontext)
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def command(pictures: Path, out: Path) -> list[str]:
    return [
        "extract", "untrained:vit_tiny", str(pictures), str(out), "--part-pictures", "2",
        "--pooled", "cls", "--layers", "5,-1", "--image-size", "32", "--dtype", "float16", "--json",
    ]  # fmt: skip


def parts(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in sorted(out.glob("part-*.parquet"))}


def test_extract__killed_and_run_again_does_what_is_missing(
    pictures: Path, tmp_path: Path, ray_session: str
):
    out, whole = tmp_path / "out", tmp_path / "whole"
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(
            [sys.executable, "-m", "service", *command(pictures, out)],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": ray_session},
        )
    try:
        while len(parts(out)) < 3:
            assert first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.01)
    finally:
        first.kill()  # it alone writes; its workers end with it
        first.wait()
    kept = parts(out)
    assert 3 <= len(kept) < NUM_PARTS
    assert not (out / "extraction.json").exists()

    again = CliRunner().invoke(cli, command(pictures, out))

    assert again.exit_code == 0, again.output
    result = json.loads(again.stdout)
    assert result["num_written"] == NUM_PARTS - len(kept)
    assert (result["num_rows"], result["num_parts"]) == (2 * NUM_PARTS, NUM_PARTS)
    assert kept.items() <= parts(out).items()
    line = again.stderr.splitlines()[-1]
    assert line.startswith(f"{out}: 80 rows, ")
    undisturbed = CliRunner().invoke(cli, command(pictures, whole))
    assert undisturbed.exit_code == 0, undisturbed.output
    for name in parts(out):
        ours, theirs = pq.read_table(out / name), pq.read_table(whole / name)
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        assert ours.select(["id", "index", "label"]) == theirs.select(["id", "index", "label"])
        for column in ("cls", "layer_5", "layer_11"):
            a, b = (t[column].combine_chunks().to_numpy_ndarray() for t in (ours, theirs))
            assert a.dtype == np.float16
            np.testing.assert_allclose(a.astype(float), b.astype(float), atol=5e-3)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--layers", "2,x"], "'2,x' is not a list of layers"),
        (["--layers", "12"], "untrained:vit_tiny has no layer 12 (its layers are 0 to 11)"),
        (["--image-size", "30"], "30x30 pixels are not a multiple of the encoder's stride 16"),
        (["--split", "val"], "has no split 'val'"),
    ],
)
def test_extract__mistakes_are_told_in_one_line(
    pictures: Path, tmp_path: Path, options: list[str], wanted: str
):
    refused = CliRunner().invoke(
        cli, ["extract", "untrained:vit_tiny", str(pictures), str(tmp_path / "out"), *options]
    )

    assert refused.exit_code == 2, refused.output
    assert wanted in refused.stderr
    assert "Traceback" not in refused.stderr
