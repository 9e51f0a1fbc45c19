from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serving.access_log import open_access_log


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


def test_open_access_log__standard_output_and_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    log = open_access_log("-")
    log.write({"status": 200})
    log.close()
    assert json.loads(capsys.readouterr().out)["status"] == 200
    open_access_log(None).write({"status": 200})


def test_edge__notes_every_request(
    application: Callable[..., Any], picture: Callable[..., bytes], tmp_path: Path
) -> None:
    from serving.keys import add_key

    key = add_key(tmp_path / "keys.json", "web", pictures_per_minute=2)
    app = application(
        ("alpha",), edge={"keys": tmp_path / "keys.json", "access_log": str(tmp_path / "log.jsonl")}
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
    deadline = 200
    while len(lines := file.read_text().splitlines()) < 4 and deadline:
        deadline -= 1
        os.sched_yield()
    first, answered, *_ = map(json.loads, lines)
    assert (first["status"], first["error"], first["request_id"]) == (401, "unauthorized", "mine")
    assert (answered["key"], answered["pictures"], answered["cache"]) == ("web", 2, "miss")
    assert (answered["version"], answered["operation"]) == ("1", "features")
    assert answered["bytes_in"] > 100
    assert answered["bytes_out"] > 100
    assert 0 < answered["model_ms"] < answered["total_ms"]
    assert key not in file.read_text()
