"""Encoders that people have, imported, evaluated and served: their features are the bundle's."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

from mimray.service.commands.remote_encoder import RemoteEncoder
from mimray.serving.client import FeatureClient
from mimray.trainers.bundles import load_bundle
from mimray.trainers.config.evaluation.dense_knn import DenseKnnConfig
from mimray.trainers.config.evaluation.knn import KnnConfig
from mimray.trainers.convert import import_weights
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.evaluation.annotations.base import InvalidLabels
from mimray.trainers.evaluation.annotations.segmentation import open_segmentation
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.probes import knn
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.evaluation.segmentation.dense_knn import DenseKnn, dense_knn
from mimray.trainers.models.normalise import normalise
from tests.trainers.convert.small_timm import small_timm

SIZE = (32, 48)
KINDS = {
    "dinov2": "dinov2",
    "dinov2-reg": "dinov2 registers",
    "dinov3": "dinov3",
    "eva02": "eva02",
    "siglip": "siglip",
}
CONFIG = DenseKnnConfig(k=1, image_size=SIZE)


@pytest.fixture(scope="module")
def imported(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A bundle of each kind, by the name that it is served under."""
    folder = tmp_path_factory.mktemp("imported")
    for name, kind in KINDS.items():
        save_for_hf(small_timm(kind), str(folder / "timm" / name), safe_serialization=True)
        import_weights(str(folder / "timm" / name), folder / name, image_size=SIZE)
        bundles[name] = folder / name
    return {name: folder / name for name in KINDS}


@pytest.fixture(scope="module")
def url(
    imported: dict[str, Path],
    application: Callable[..., Any],
    serve_application: Callable[[Any], Any],
) -> Iterator[str]:
    with serve_application(application(tuple(imported))) as url:
        yield url


@pytest.mark.parametrize("name", KINDS)
def test_served__every_route_has_the_bundles_features(
    name: str, url: str, imported: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    encoder, data = load_bundle(imported[name]), picture(1, SIZE[::-1])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)[None]
    images = normalise(torch.from_numpy(pixels.copy()), encoder.card.mean, encoder.card.std)
    whole = encoder(images)
    pooled = whole.prefix[:, 0] if encoder.card.pooling == "cls" else whole.pooled
    first, last = encoder.features(images, (0, 2))
    wanted = {"pooled": pooled, "tokens": whole.tokens, "layer_0": first, "layer_2": last}

    def agree(found: dict[str, Any]) -> None:
        for key, value in found.items():
            np.testing.assert_allclose(
                np.asarray(value), wanted[key][0], rtol=0, atol=1e-5, err_msg=key
            )

    with FeatureClient(url) as client:
        features = client.features(data, name, layers=(0, 2))
        agree({"pooled": features.pooled, "tokens": features.tokens})
        agree({f"layer_{number}": maps for number, maps in features.layers.items()})
        agree({"pooled": client.embed([data], name)[0]})
    asked = f"{url}/v1/features?model={name}&outputs=pooled,tokens&layers=0,2"
    files = httpx2.post(asked, content=data, headers={"Accept": "application/x-npz"}, timeout=240)
    with np.load(io.BytesIO(files.content)) as arrays:
        agree({key: arrays[key][0] for key in wanted})
    plain = f"{url}/v1/features?model={name}"
    (row,) = httpx2.post(plain, content=data, timeout=240).json()["data"]
    agree({"pooled": row["pooled"]})
    text = base64.b64encode(data).decode()
    openai = {"model": name, "input": [text]}
    (row,) = httpx2.post(f"{url}/v1/embeddings", json=openai, timeout=240).json()["data"]
    agree({"pooled": row["embedding"]})


def probed(encoder: Any, scenes: Path) -> DenseKnn:
    train, val = (
        open_segmentation(str(scenes), split, CONFIG, InvalidLabels(skip=False))
        for split in ("train", "val")
    )
    return dense_knn(encoder, train, val, CONFIG, seed=0, device="cpu", progress=lambda *args: None)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(out, num_train=6, num_val=3, image_size=SIZE, num_classes=2)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_evaluated__alike_from_the_bundle_and_through_the_endpoint(
    name: str, url: str, imported: dict[str, Path], scenes: Path
) -> None:
    near = probed(load_bundle(imported[name]), scenes)
    far = probed(RemoteEncoder(url, name), scenes)

    assert near.num_patches == far.num_patches > 100
    np.testing.assert_array_equal(far.by_picture.confusion, near.by_picture.confusion)
    assert 0 < near.figures(["ground", "a", "b"])["mIoU"] < 1


@pytest.mark.parametrize("name", KINDS)
def test_evaluated__tells_colours_apart(
    name: str,
    imported: dict[str, Path],
    labelled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    setting = Setting(
        data=str(labelled), val=None, limit=None, seed=0, skip_invalid=False, device="cpu",
        folder=tmp_path, progress=lambda *args: None,
    )  # fmt: skip

    score = knn.evaluate(EncoderRef.parse(str(imported[name])), setting, KnnConfig())

    assert (score.num_train, score.num_val) == (32, 16)
    assert score.headline > 0.8
