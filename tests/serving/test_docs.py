"""Every example of docs/serving.md that asks an endpoint is run, as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mimray.trainers import load_bundle
from tests.serving.heads import save_each

DOCS = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
ASKING = [
    (language, code)
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", DOCS, flags=re.M | re.S)
    if "127.0.0.1:8000" in code
]


@pytest.fixture(scope="module")
def url(
    application: Callable[..., Any],
    serve_application: Callable[..., Any],
    bundles: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    bundles["photos"] = bundles["alpha"]
    heads = save_each(tmp_path_factory.mktemp("heads"), load_bundle(bundles["photos"]))
    with serve_application(application(("photos",), heads={"photos": heads})) as url:
        yield url


@pytest.mark.parametrize(("language", "code"), ASKING, ids=[language for language, _ in ASKING])
def test_example(
    url: str, language: str, code: str, picture: Callable[..., bytes], tmp_path: Path
) -> None:
    (tmp_path / "cat.jpg").write_bytes(picture(1, format="JPEG"))
    code = code.replace("http://127.0.0.1:8000", url)
    code = code.replace("127.0.0.1:8000", url.removeprefix("http://"))
    suffix, command = {
        "sh": (".sh", ["sh", "-eu"]),
        "python": (".py", [sys.executable]),
        "js": (".mjs", ["node"]),
    }[language]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    file = tmp_path / f"example{suffix}"
    file.write_text(code)
    done = subprocess.run(
        [*command, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    if "predict" in code and language == "sh":
        (row,) = json.loads((tmp_path / "found.json").read_text())["data"]
        assert list(row["heads"]) == ["scenes", "objects", "kind"]
    elif "predict" in code:
        assert "(70, 90)" in done.stdout  # the map has the picture's own size
    elif language == "sh":
        with np.load(tmp_path / "maps.npz") as found:
            assert found["layer_2"].shape == (1, 64, 4, 4)
            assert found["layer_2"].dtype == np.float16
    else:
        assert done.stdout.strip()
        assert "64" in done.stdout  # channels of the map, or of the vector


def test_examples__are_in_every_language_promised() -> None:
    assert sorted({language for language, _ in ASKING}) == ["js", "python", "sh"]
    assert len(ASKING) == 7
