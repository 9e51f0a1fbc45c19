from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from mimray.service.cli.data import data
from mimray.trainers.errors import ConfigError, DataError


def test_synth__writes_a_set_and_prints_where(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    sizes = ["--num-train", "3", "--num-val", "2", "--image-size", "32x48", "--classes", "3"]
    result = CliRunner().invoke(data, ["synth", str(out), *sizes, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"train": str(out / "train"), "val": str(out / "val")}
    assert len(list((out / "val/masks").iterdir())) == 2
    again = CliRunner().invoke(data, ["synth", str(out), *sizes])
    assert isinstance(again.exception, DataError)
    assert "--overwrite" in str(again.exception)
    assert CliRunner().invoke(data, ["synth", str(out), *sizes, "--overwrite"]).exit_code == 0
    wrong = CliRunner().invoke(data, ["synth", str(tmp_path / "b"), "--image-size", "big"])
    assert isinstance(wrong.exception, ConfigError)
