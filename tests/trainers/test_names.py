"""Names that people give are one segment of a path, wherever one is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.trainers.config.names import check_name
from mimray.trainers.errors import ConfigError


@pytest.mark.parametrize("name", ["mae-tiny", "Köln 2", "v1.2", "-", "x" * 200])
def test_check_name__one_segment_is_allowed(name: str) -> None:
    check_name("run", name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/a", "a/", "a\\b", "a\nb", "a\0b", ".hidden", "x" * 201]
)
def test_check_name__anything_else_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a run"):
        check_name("run", name)


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", "mae-tiny", "--data", "colours", "--name", "a/b"],
        ["pretrain", "mae-tiny", "--data", "colours", "--name", ".."],
        ["tune", "mae-mask-depth", "--data", "colours", "--name", "a/b"],
        ["tune", "--resume", "../b"],
        ["import", "weights.pth", "out", "--name", "a/b"],
    ],
)
def test_commands__refuse_a_nested_name_and_write_nothing(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 2, result.output
    assert "cannot be the name of a" in result.stderr
    assert list(tmp_path.iterdir()) == []
