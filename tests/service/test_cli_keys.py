from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mimray.service.cli.main import cli
from mimray.serving.api.keys import KeyRing, default_file


def test_keys__add_list_revoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MIMRAY_KEYS", raising=False)
    assert default_file() == tmp_path / "mimray" / "keys.json"
    run = CliRunner().invoke
    assert (
        run(cli, ["keys", "list"]).stdout,
        json.loads(run(cli, ["keys", "list", "--json"]).stdout),
    ) == ("", [])
    added = run(cli, ["keys", "add", "web", "--pictures-per-minute", "9"])
    assert added.exit_code == 0
    key = added.stdout.removesuffix("\n")  # alone, so that `KEY=$(mimray keys add web)` works
    assert KeyRing(default_file()).admit(key).name == "web"
    assert key not in added.stderr
    listed = json.loads(run(cli, ["keys", "list", "--json"]).stdout)
    assert [(k["name"], k["pictures_per_minute"]) for k in listed] == [("web", 9)]
    assert "sha256" not in listed[0]
    assert "9 pictures a minute" in run(cli, ["keys", "list"]).stdout
    assert run(cli, ["keys", "add", "web"]).exit_code == 2
    assert run(cli, ["keys", "revoke", "web"]).exit_code == 0
    assert run(cli, ["keys", "revoke", "web"]).exit_code == 2
    assert run(cli, ["keys", "list"]).stdout == ""


def test_keys__kept_where_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_variable, by_option = tmp_path / "a.json", tmp_path / "b.json"
    monkeypatch.setenv("MIMRAY_KEYS", str(by_variable))
    assert CliRunner().invoke(cli, ["keys", "add", "one"]).exit_code == 0
    asked = ["keys", "add", "two", "--file", str(by_option)]
    assert CliRunner().invoke(cli, asked).exit_code == 0
    for file, name in ((by_variable, "one"), (by_option, "two")):
        assert [key["name"] for key in json.loads(file.read_text())["keys"]] == [name]
