"""`mimray-client`: built, unpacked, and used where mimray is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mimray import __version__
from mimray.trainers import load_bundle
from tests.serving.heads import save_each

HOME = Path(__file__).parents[3] / "packaging" / "mimray-client"
USE = """
import json, sys
from mimray_client import Detection, FeatureClient, Segmentation, __version__
from mimray_client.wire.errors import EndpointError

url, file = sys.argv[1:]
with FeatureClient(url) as client:
    vectors = client.embed([file], model="alpha")
    dense = client.features(file, model="alpha", layers=(1,))
    (found,) = client.predict([file], model="alpha")
    try:
        client.embed([file], model="nobody")
    except EndpointError as error:
        refused = str(error)
assert isinstance(found["scenes"], Segmentation) and isinstance(found["objects"], Detection)
print(json.dumps({
    "version": __version__,
    "pooled": vectors[0].tolist(),
    "shown": [repr(dense), repr(found)],
    "refused": refused,
    "heavy": sorted({"mimray", "torch", "ray", "timm", "PIL"} & sys.modules.keys()),
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source distribution, as an installer builds it."""
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    folder = tmp_path_factory.mktemp("dist")
    (source,) = SdistBuilder(str(HOME)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(source) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.iterdir() if path.is_dir())
    (built,) = WheelBuilder(str(unpacked)).build(directory=str(folder), versions=["standard"])
    return Path(built)


def test_wheel__is_the_one_built_here_and_holds_the_client_alone(
    wheel: Path, tmp_path: Path
) -> None:
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(HOME)).build(directory=str(tmp_path), versions=["standard"])

    def contents(file: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(file) as opened:
            return {name: opened.read(name) for name in opened.namelist()}

    from_source, here = contents(wheel), contents(Path(built))
    assert from_source == here
    tops = {name.partition("/")[0] for name in here}
    assert tops == {"mimray_client", f"mimray_client-{__version__}.dist-info"}
    assert "mimray_client/LICENSE" in here
    for name, content in here.items():
        if name.endswith(".py"):
            assert b"mimray." not in content.replace(b"`mimray.", b""), name


def test_client__works_without_mimray(
    wheel: Path, tmp_path: Path, application: Callable[..., Any],
    serve_application: Callable[..., Any], bundles: dict[str, Path],
    picture: Callable[..., bytes], reference: Callable[..., Any],
) -> None:  # fmt: skip
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    (tmp_path / "a.png").write_bytes(picture(1))
    heads = save_each(tmp_path / "heads", load_bundle(bundles["alpha"]))
    with serve_application(application(("alpha",), heads={"alpha": heads})) as url:
        done = subprocess.run(
            [sys.executable, "-c", USE, url, str(tmp_path / "a.png")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["version"] == __version__
    assert told["pooled"] == pytest.approx(reference(picture(1))[0].tolist(), abs=1e-5)
    assert told["heavy"] == []
    assert "nobody" in told["refused"]
    assert all(len(text) < 600 for text in told["shown"])
    assert "layers[1] [64, 3, 4]" in told["shown"][0]
