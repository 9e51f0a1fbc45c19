from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from mimray.trainers import load_bundle
from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.errors import BundleError, ConfigError, StorageError
from mimray.trainers.models import build_encoder
from mimray.trainers.registry import Registry, locate, registered


def bundle(folder: Path, seed: int) -> str:
    shape = ViTConfig(name="vit", width=16, depth=1, num_heads=2, patch_size=8)
    torch.manual_seed(seed)
    card = BundleCard(
        name=folder.name, encoder=shape, image_size=(16, 16), channels=3,
        mean=(0.5,) * 3, std=(0.2,) * 3, method="mae", plan_hash="p" * 8, data_fingerprint="d" * 8,
        scores={"knn": {"metric": "accuracy", "headline": seed / 10}},
    )  # fmt: skip
    save_bundle(folder, card, build_encoder(shape, (16, 16)).state_dict())
    return str(folder)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return Registry.open()


def test_registry__versions_aliases_and_what_they_carry(registry: Registry, tmp_path: Path) -> None:
    first = registry.register(bundle(tmp_path / "one", 1), "photos", "champion")
    second = registry.register(bundle(tmp_path / "two", 2), "photos")
    again = registry.register(bundle(tmp_path / "one", 1), "photos")
    registry.register(bundle(tmp_path / "one", 1), "other")

    assert [first.reference, second.reference, again.reference] == [
        "photos@v1", "photos@v2", "photos@v1",
    ]  # fmt: skip
    assert (first.aliases, second.aliases) == (("champion",), ())
    assert first.facts["plan_hash"] == "p" * 8
    assert first.facts["data_fingerprint"] == "d" * 8
    assert first.scores["knn"]["headline"] == 0.1
    assert registry.find("photos").number == 2
    assert registry.find("photos@champion").number == 1
    assert registry.alias("photos@v2", "champion").aliases == ("champion",)
    assert registry.find("photos@v1").aliases == ()
    assert [v.reference for v in registry.versions()] == ["other@v1", "photos@v1", "photos@v2"]
    registry.add_score(second, "linear", {"metric": "accuracy", "headline": 0.9})
    assert set(registry.find("photos").scores) == {"knn", "linear"}


def test_load__by_name_even_when_the_run_is_gone(registry: Registry, tmp_path: Path) -> None:
    place = bundle(tmp_path / "one", 1)
    weights = load_bundle(place).state_dict()
    registry.register(place, "photos", "champion")
    for file in Path(place).iterdir():
        file.unlink()
    Path(place).rmdir()

    found = load_bundle("photos@champion").state_dict()

    assert all(torch.equal(found[key], weights[key]) for key in weights)
    version = registered("photos")
    assert version is not None
    assert version.reference == "photos@v1"
    with pytest.raises(BundleError, match="has no version 'best'"):
        locate("photos@best")


def test_locate__a_place_on_disk_comes_first(registry: Registry, tmp_path: Path) -> None:
    registry.register(bundle(tmp_path / "one", 1), "two")
    assert locate("two") != bundle(tmp_path / "two", 2)
    assert locate("two") == str(tmp_path / "two")
    assert registered("two") is None


def test_locate__asks_no_database_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(BundleError, match="no model of that name"):
        locate("nothing")
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("word", ["", "a b", "a/b", "@x", "ü"])
def test_names__refused(registry: Registry, tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match="is not allowed"):
        registry.register(bundle(tmp_path / "one", 1), word)


def test_alias__does_not_look_like_a_version(registry: Registry, tmp_path: Path) -> None:
    registry.register(bundle(tmp_path / "one", 1), "photos")
    for word in ("v3", "latest"):
        with pytest.raises(ConfigError, match="names a version"):
            registry.alias("photos", word)


def test_fetch__files_that_are_gone(registry: Registry, tmp_path: Path) -> None:
    version = registry.register(bundle(tmp_path / "one", 1), "photos")
    folder = registry.fetch(version)
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(StorageError, match="are gone"):
        registry.fetch(version)


def test_versions__models_of_others_are_left_alone(registry: Registry) -> None:
    client = MlflowClient()
    client.create_registered_model("theirs")
    client.create_model_version("theirs", "file:///tmp/x")
    assert registry.versions() == []
