from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from mimray.serving.api import access_log
from mimray.serving.api.access_log import AccessLog, open_access_log
from mimray.trainers.errors import ServingError


def test_access_log__a_line_of_json_each(tmp_path: Path) -> None:
    log = open_access_log(str(tmp_path / "logs" / "access.jsonl"))
    log.write({"status": 200, "path": '/a"b\n'})
    log.write({"status": 500})
    log.close()
    log.write({"status": 200})  # closed: nobody is disturbed
    lines = (tmp_path / "logs" / f"access-{os.getpid()}.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert (first["path"], first["level"], second["level"]) == ('/a"b\n', "info", "error")
    assert first["ts"].endswith("Z")


def test_access_log__long_strings_and_odd_values(tmp_path: Path) -> None:
    log = open_access_log(str(tmp_path / "access.jsonl"))
    log.write({"status": 404, "path": "/" * 60_000, "odd": tmp_path})
    log.close()
    (file,) = tmp_path.iterdir()
    line = json.loads(file.read_text())
    assert (len(line["path"]), line["odd"]) == (500, str(tmp_path))


def test_access_log__a_stuck_disk_costs_lines_not_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "MAX_WAITING", 5)
    stuck, written = threading.Event(), []

    class Disk(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stuck.wait(10)
            written.append(self.format(record))

    log = AccessLog(Disk())
    for _ in range(50):
        log.write({"status": 200})
    stuck.set()
    log.close()
    assert log.lost >= 44  # five wait, and the thread holds one
    assert len(written) + log.lost == 50


def test_access_log__a_full_disk_disturbs_nobody(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AccessLog(access_log._File("/dev/full"))
    for _ in range(3):
        log.write({"status": 200})
    log.close()
    assert "No space left" in caplog.text
    assert len(caplog.records) == 2  # once for the lines, once as it closes
    assert not capsys.readouterr().err


def test_access_log__turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "MAX_BYTES", 2000)
    log = open_access_log(str(tmp_path / "access.jsonl"))
    for number in range(500):
        log.write({"status": 200, "number": number})
    log.close()
    files = list(tmp_path.iterdir())
    assert len(files) == 1 + access_log.KEPT_FILES
    assert all(file.stat().st_size <= 2000 for file in files)
    newest = (tmp_path / f"access-{os.getpid()}.jsonl").read_text().splitlines()
    assert json.loads(newest[-1])["number"] == 499


def test_access_log__written_to_the_end_by_a_process_that_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from mimray.serving.api.access_log import open_access_log\n"
        "log = open_access_log(sys.argv[1])\n"
        "for _ in range(2000): log.write({'status': 200})"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.jsonl"], check=True, timeout=240)
    (file,) = tmp_path.iterdir()
    assert len(file.read_text().splitlines()) == 2000


def test_open_access_log__where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServingError, match="cannot be written"):
        open_access_log(str(tmp_path / "file" / "access.jsonl"))


def test_open_access_log__standard_output_and_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    log = open_access_log("-")
    log.write({"status": 200})
    log.close()
    assert json.loads(capsys.readouterr().out)["status"] == 200
    open_access_log(None).write({"status": 200})


def test_gateway__notes_every_request(
    application: Callable[..., Any], picture: Callable[..., bytes], tmp_path: Path
) -> None:
    from mimray.serving.api.keys import add_key

    key = add_key(tmp_path / "keys.json", "web", pictures_per_minute=2)
    app = application(
        ("alpha",),
        gateway={"keys": tmp_path / "keys.json", "access_log": str(tmp_path / "log.jsonl")},
    )
    with TestClient(app) as client:
        client.headers["X-Request-ID"] = "mine"
        client.get("/v1/models")
        client.headers["X-API-Key"] = key
        files = [("f", ("a", picture(i), "image/png")) for i in range(2)]
        assert client.post("/v1/features", files=files).status_code == 200
        assert client.post("/v1/features", content=b"x").status_code == 429
        refused = client.get("/v1/models")
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30
    (file,) = tmp_path.glob("log-*.jsonl")
    deadline = time.monotonic() + 120
    while len(lines := file.read_text().splitlines()) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    first, answered, *_ = map(json.loads, lines)
    assert (first["status"], first["error"], first["request_id"]) == (401, "unauthorized", "mine")
    assert (answered["key"], answered["pictures"], answered["cache"]) == ("web", 2, "miss")
    assert (answered["version"], answered["operation"]) == ("1", "features")
    assert answered["bytes_in"] > 100
    assert answered["bytes_out"] > 100
    assert 0 < answered["model_ms"] < answered["total_ms"]
    assert key not in file.read_text()
