from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimray.trainers.bundles import FrozenEncoder
from mimray.trainers.config.evaluation.dense_knn import DenseKnnConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.data.synth import write_scenes
from mimray.trainers.errors import BundleError, ConfigError, DataError
from mimray.trainers.evaluation.annotations.base import InvalidLabels, SegmentationSet
from mimray.trainers.evaluation.annotations.segmentation import open_segmentation
from mimray.trainers.evaluation.features.encoders import untrained
from mimray.trainers.evaluation.score import Score, Setting
from mimray.trainers.evaluation.segmentation.dense_knn import DenseKnn, dense_knn, evaluate
from mimray.trainers.models.normalise import normalise
from tests.trainers.evaluation.segmentation.conftest import make_card

Make = Callable[[], FrozenEncoder]
CONFIG = DenseKnnConfig(k=5, image_size=(48, 64))


@pytest.fixture
def run(setting: Callable[..., Setting], scenes: Path) -> Callable[..., Score]:
    def start(make: Any, config: DenseKnnConfig = CONFIG, **changes: Any) -> Score:
        data = changes.pop("data", scenes)
        return evaluate(make, setting(data, **changes), config)

    return start


def _opened(scenes: Path, split: Any = "train") -> SegmentationSet:
    return open_segmentation(str(scenes), split, CONFIG, InvalidLabels(skip=False))


def _probed(make: Make, scenes: Path, config: DenseKnnConfig = CONFIG, seed: int = 0) -> DenseKnn:
    train, val = _opened(scenes), _opened(scenes, "val")
    return dense_knn(
        make(), train, val, config, seed=seed, device="cpu", progress=lambda *args: None
    )


def _enlarged(values: np.ndarray, factor: int) -> np.ndarray:
    """A map [h, w, K] enlarged bilinearly, edges repeated, one axis after the other."""
    for axis in (0, 1):
        size = values.shape[axis]
        at = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, size - 1)
        share = (at - low).reshape([-1 if axis == n else 1 for n in range(3)])
        values = np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share
    return values


def _patches(encoder: FrozenEncoder, image: Image.Image) -> np.ndarray:
    pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
    images = normalise(pixels, encoder.card.mean, encoder.card.std)
    with torch.no_grad():
        (found,) = encoder.features(images, (3,), norm=True)
    rows: np.ndarray = found[0].permute(1, 2, 0).double().numpy()  # h w D
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_dense_knn__equals_brute_force_in_numpy(make_vit: Make, scenes: Path) -> None:
    """Pictures of the input's own size, so that nothing is resized but the posteriors."""
    train, encoder = _opened(scenes), make_vit()
    bank: list[np.ndarray] = []
    labels: list[list[float]] = []
    for image, mask in (train[index] for index in range(len(train))):
        maps = _patches(encoder, image)
        for row in range(6):
            for column in range(8):
                part = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
                known = part[part != train.ignore_index]
                if len(known) >= 32:
                    bank.append(maps[row, column])
                    labels.append([float((known == k).mean()) for k in range(3)])
    found = _probed(make_vit, scenes)
    assert found.num_patches == len(bank)
    checked = 0
    for image, _, _, predicted in found.shown:
        maps = _patches(encoder, Image.fromarray(image))
        similarity = maps.reshape(-1, maps.shape[-1]) @ np.stack(bank).T
        posterior = np.zeros((48, 3))
        for row, values in enumerate(similarity):
            order = np.argsort(-values)[: CONFIG.k]
            weights = np.exp(values[order] / CONFIG.temperature)
            posterior[row] = weights @ np.array(labels)[order] / weights.sum()
        whole = _enlarged(posterior.reshape(6, 8, 3), 8)
        ranked = np.sort(whole, axis=-1)
        clear = ranked[..., -1] - ranked[..., -2] > 1e-3
        np.testing.assert_array_equal(whole.argmax(axis=-1)[clear], predicted[clear])
        checked += int(clear.sum())
    assert checked > 0.95 * 6 * 48 * 64


def test_evaluate__finds_the_training_pictures_in_themselves(
    run: Callable[..., Score], make_vit: Make, scenes: Path
) -> None:
    seen: list[tuple[str, int, int]] = []
    config = CONFIG.model_copy(update={"k": 1})
    score = run(
        make_vit, config, val=str(scenes / "train"), progress=lambda *args: seen.append(args)
    )
    assert score.metric == "mIoU"
    assert score.headline == score.metrics["mIoU"] > 0.6
    assert score.headline > run(make_vit, config).headline
    assert (score.num_train, score.num_val) == (24, 24)
    assert score.standard_error is not None
    assert {phase for phase, _, _ in seen} == {
        "checking masks",
        "patches to retrieve from",
        "scoring",
    }
    assert ("scoring", 24, 24) in seen
    json.dumps(score.metrics)
    for name in ("dense-knn.png", "dense-knn_classes.png"):
        assert Image.open(io.BytesIO(score.pictures[name])).width > 500


def test_evaluate__the_same_seed_gives_the_same_figures_whatever_is_encoded_at_once(
    run: Callable[..., Score], make_vit: Make
) -> None:
    config = CONFIG.model_copy(update={"bank_size": 300, "batch_size": 1})
    one = run(make_vit, config)
    assert one.metrics == run(make_vit, config).metrics
    wide = run(make_vit, config.model_copy(update={"batch_size": 7}))
    assert one.metrics["bank_patches"] == wide.metrics["bank_patches"] == 300 // 24 * 24 + 300 % 24
    assert abs(one.headline - wide.headline) < 1e-3
    assert one.metrics["confusion"] != run(make_vit, config, seed=1).metrics["confusion"]


@pytest.mark.parametrize("bank_size", [1, 5, 24, 100, 10_000])
def test_dense_knn__never_keeps_more_than_the_bank_holds(
    make_vit: Make, scenes: Path, bank_size: int
) -> None:
    config = CONFIG.model_copy(update={"bank_size": bank_size})
    found = _probed(make_vit, scenes, config)
    # 24 pictures of 48 patches.
    assert found.num_patches == min(bank_size, 24 * 48)


def test_dense_knn__majority_retrieves_whole_labels(make_vit: Make, scenes: Path) -> None:
    majority = CONFIG.model_copy(update={"patch_labels": "majority", "k": 1})
    soft = CONFIG.model_copy(update={"k": 1})
    one, other = (_probed(make_vit, scenes, config) for config in (majority, soft))
    assert one.num_patches == other.num_patches
    assert one.by_picture.confusion.sum() == other.by_picture.confusion.sum()


def test_dense_knn__takes_windows_of_full_resolution(make_vit: Make, scenes: Path) -> None:
    """Windows of half the picture, which overlap: more patches than the picture has."""
    config = CONFIG.model_copy(update={"scale": 1.0, "image_size": (32, 32)})
    assert _probed(make_vit, scenes, config).num_patches > 24 * 48


def test_dense_knn__takes_layers_of_any_stride_side_by_side(make_swin: Make, scenes: Path) -> None:
    config = CONFIG.model_copy(update={"layers": (-1, 1), "image_size": (64, 64)})
    found = _probed(make_swin, scenes, config)
    assert found.layers == (1, 3)  # the finest map first, whose places are the patches
    # 48 x 64 in 64 x 64: the last quarter of the rows is padding.
    assert found.num_patches == 24 * (64 // 4) ** 2 * 3 // 4


def test_evaluate__takes_a_gray_encoder(run: Callable[..., Score]) -> None:
    card = make_card(
        ViTConfig(name="vit", width=16, depth=4, num_heads=2, patch_size=8), (48, 64)
    ).model_copy(update={"channels": 1, "mean": (0.5,), "std": (0.25,)})
    assert run(lambda: untrained(card)).headline > 0


def test_evaluate__bad_options_are_told_in_one_line(
    run: Callable[..., Score], make_vit: Make
) -> None:
    def refused(error: type[Exception], says: str, **options: Any) -> None:
        with pytest.raises(error, match=says):
            run(make_vit, CONFIG.model_copy(update=options))

    refused(ConfigError, "image_size: 50x64 pixels are not a multiple", image_size=(50, 64))
    refused(ConfigError, "layers .9.: there are 0 to 3", layers=(9,))


def test_evaluate__labels_on_too_little_of_each_patch_are_told(
    run: Callable[..., Score], make_vit: Make, tmp_path: Path
) -> None:
    """Scribbles: a pixel in each patch."""
    write_scenes(tmp_path / "s", num_train=3, num_val=2, image_size=(48, 64), num_classes=2)
    for file in (tmp_path / "s").glob("*/masks/*.png"):
        mask = np.asarray(Image.open(file))
        sparse = np.full_like(mask, 255)
        sparse[::8, ::8] = np.where(mask == 255, 0, mask)[::8, ::8]
        Image.fromarray(sparse).save(file)
    with pytest.raises(DataError, match="no patch of .* has labels on 50% of its pixels"):
        run(make_vit, data=tmp_path / "s")
    config = CONFIG.model_copy(update={"min_labelled": 0.0})
    assert run(make_vit, config, data=tmp_path / "s").metrics["bank_patches"] == 3 * 48


def test_evaluate__features_that_are_not_finite_are_refused(
    run: Callable[..., Score], make_vit: Make
) -> None:
    def broken() -> FrozenEncoder:
        encoder = make_vit()
        with torch.no_grad():
            next(iter(encoder.parameters())).fill_(float("nan"))
        return encoder

    with pytest.raises(BundleError, match="not finite"):
        run(broken)


def test_dense_knn__no_layer_is_no_description() -> None:
    layers: Sequence[int] = ()
    with pytest.raises(ValueError, match="layers"):
        DenseKnnConfig.model_validate({"layers": layers})
