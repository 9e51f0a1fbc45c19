from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.evaluation.extract import ExtractSpec
from mimray.trainers.config.model import SwinConfig
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.data.sources import open_source
from mimray.trainers.data.transforms import inference_view
from mimray.trainers.errors import ConfigError, DataError, EmptyDatasetError, RunConflictError
from mimray.trainers.evaluation.features import extraction, pooled
from mimray.trainers.evaluation.features.encoders import EncoderRef, untrained
from mimray.trainers.evaluation.features.extraction import Extracted, extract, read_columns
from mimray.trainers.evaluation.features.parts import EXTRACTION_KEY
from mimray.trainers.evaluation.features.pooled import labelled_features
from mimray.trainers.evaluation.score import Setting
from mimray.trainers.models.normalise import normalise
from mimray.trainers.storage import RunDir

pytestmark = pytest.mark.usefixtures("without_ray")

MakeSetting = Callable[..., Setting]
EVERYTHING = ExtractSpec(
    pooled=("mean", "cls"), tokens=True, layers=(0, -1), part_pictures=25, image_size=(24, 32)
)


def rows(found: Extracted, *columns: str) -> list[np.ndarray]:
    table = read_columns(found.out, found.manifest, columns)
    return [
        column.combine_chunks().to_numpy_ndarray()
        if str(column.type).startswith("extension")
        else column.to_numpy()
        for column in map(table.column, columns)
    ]


def test_extract__is_what_the_encoder_says_of_each_picture_alone(
    ref: EncoderRef, card: BundleCard, colours: Path, tmp_path: Path
):
    source = open_source(str(colours))
    seen: list[tuple[str, int, int]] = []

    found = extract(
        ref,
        source,
        RunDir(str(tmp_path / "out")),
        EVERYTHING,
        phase="p",
        progress=lambda *told: seen.append(told),
    )

    assert seen == [("p", 0, 60), ("p", 25, 60), ("p", 50, 60), ("p", 60, 60)]
    ids, index, labels = rows(found, "id", "index", "label")
    assert index.tolist() == list(range(60))
    assert labels.tolist() == source.labels().tolist()
    mean, cls, tokens, first, last = rows(found, "mean", "cls", "tokens", "layer_0", "layer_1")
    encoder = ref.load()
    for place in (0, 24, 25, 59):
        view = inference_view(Image.open(ids[place]), (24, 32), "bicubic")
        image = normalise(torch.from_numpy(view)[None], card.mean, card.std)
        alone = encoder(image)
        maps = encoder.features(image, (0, 1))
        wanted = (alone.tokens.mean(1), alone.prefix[:, 0], alone.tokens, *maps)
        for column, values in zip((mean, cls, tokens, first, last), wanted, strict=True):
            np.testing.assert_allclose(column[place], values[0].numpy(), atol=1e-5)
    manifest = json.loads(found.out.read("extraction.json"))
    about = manifest["extraction"]
    assert (about["identity"], about["grid"], about["stride"]) == (ref.identity, [3, 4], 8)
    assert [part["num_rows"] for part in manifest["parts"]] == [25, 25, 10]
    names = [part["file"] for part in manifest["parts"]]
    assert names == [f"part-0000{n}-of-00003.parquet" for n in range(3)]
    schema = pq.read_schema(found.out.path(names[0]))
    assert schema.field("layer_0").type.shape == [16, 3, 4]
    assert json.loads(schema.metadata[EXTRACTION_KEY])["mean"] == list(card.mean)


@pytest.mark.parametrize("finished", [True, False])
def test_extract__refuses_a_folder_of_another_and_says_what_differs(
    ref: EncoderRef, colours: Path, tmp_path: Path, finished: bool
):
    out, source = RunDir(str(tmp_path / "out")), open_source(str(colours))
    spec = ExtractSpec(pooled=("mean",))
    extract(ref, source, out, spec)
    if not finished:
        (tmp_path / "out/extraction.json").unlink()

    with pytest.raises(RunConflictError, match="dtype: float32 there, float16 asked for"):
        extract(ref, source, out, spec.model_copy(update={"dtype": "float16"}))
    with pytest.raises(RunConflictError, match="data_fingerprint"):
        extract(ref, open_source(str(colours), split="val"), out, spec)
    # The card's own size, spelt out, is the same.
    same = spec.model_copy(update={"image_size": (16, 24)})
    assert extract(ref, source, out, same).num_written == 0


def test_extract__views_are_counted_crops(ref: EncoderRef, colours: Path, tmp_path: Path):
    spec = ExtractSpec(pooled=("mean",), num_views=3, seed=4, limit=7)
    source = open_source(str(colours))

    found = extract(ref, source, RunDir(str(tmp_path / "out")), spec, batch_size=4)
    again = extract(ref, source, RunDir(str(tmp_path / "again")), spec, batch_size=64)
    other = spec.model_copy(update={"seed": 5})
    drawn = extract(ref, source, RunDir(str(tmp_path / "other")), other)

    mean, index, view = rows(found, "mean", "index", "view")
    assert index.tolist() == np.repeat(evenly_spread(60, 7), 3).tolist()
    assert view.tolist() == [0, 1, 2] * 7
    assert len(np.unique(mean.round(4), axis=0)) == 21
    np.testing.assert_allclose(rows(again, "mean")[0], mean, atol=1e-5)
    assert not np.allclose(rows(drawn, "mean")[0], mean, atol=1e-3)


def test_extract__bad_pictures_are_named_or_skipped_and_listed(
    ref: EncoderRef, colours: Path, tmp_path: Path
):
    broken = colours / "train/green/07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source, spec = open_source(str(colours)), ExtractSpec(pooled=("mean",), part_pictures=1)

    with pytest.raises(DataError, match=r"green/07\.png.*--skip-invalid"):
        extract(ref, source, RunDir(str(tmp_path / "out")), spec)
    skipping = spec.model_copy(update={"skip_invalid": True})
    found = extract(ref, source, RunDir(str(tmp_path / "skipped")), skipping)

    assert [Path(item.id).name for item in found.manifest.skipped] == ["07.png"]
    assert (found.manifest.num_rows, len(found.manifest.parts)) == (59, 60)
    assert 27 not in rows(found, "index")[0]
    assert rows(found, "mean")[0].shape == (59, 16)


def test_extract__refuses_what_the_encoder_does_not_have(
    ref: EncoderRef, colours: Path, tmp_path: Path
):
    swin = EncoderRef.parse("untrained:swin_tiny", image_size=(32, 32))
    source, out = open_source(str(colours)), RunDir(str(tmp_path / "out"))

    with pytest.raises(ConfigError, match="no layer 2.*0 to 1"):
        extract(ref, source, out, ExtractSpec(layers=(2,)))
    with pytest.raises(ConfigError, match="stride 8"):
        extract(ref, source, out, ExtractSpec(pooled=("mean",), image_size=(20, 24)))
    with pytest.raises(ConfigError, match="no class token"):
        extract(swin, source, out, ExtractSpec(pooled=("cls",)))


def test_extract__native_stages_of_swin(colours: Path, tmp_path: Path):
    shape = SwinConfig(name="swin", width=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    card = BundleCard(
        name="swin", encoder=shape, image_size=(16, 16), channels=1, mean=(0.5,), std=(0.5,)
    )
    save_bundle(tmp_path / "swin", card, untrained(card).encoder.state_dict())
    ref = EncoderRef.parse(str(tmp_path / "swin"))

    found = extract(
        ref,
        open_source(str(colours)),
        RunDir(str(tmp_path / "out")),
        ExtractSpec(layers=(1, 0), limit=3),
    )

    late, early = rows(found, "layer_1", "layer_0")
    assert (late.shape, early.shape) == ((3, 16, 2, 2), (3, 8, 4, 4))
    assert [m.stride for m in found.manifest.extraction.maps] == [8, 4]


@pytest.fixture
def no_more_encoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the encoder was called")

    return lambda: monkeypatch.setattr(extraction, "PartEncoder", refuse)


def test_vectors__are_encoded_once_whatever_the_pooling(
    ref: EncoderRef, colours: Path, setting: MakeSetting, no_more_encoding: Callable[[], None]
):
    source = open_source(str(colours))
    mean, _ = labelled_features(ref, source, setting(colours), "mean", phase="p")

    no_more_encoding()
    again, _ = labelled_features(ref, source, setting(colours), "mean", phase="p")
    both, _ = labelled_features(ref, source, setting(colours), "both", phase="p")

    np.testing.assert_array_equal(again.x, mean.x)
    np.testing.assert_array_equal(both.x[:, :16], mean.x)
    assert both.x.shape == (60, 32)


@pytest.mark.parametrize("what", ["weights", "data", "transform"])
def test_vectors__anything_that_changes_is_encoded_again(
    what: str,
    ref: EncoderRef,
    card: BundleCard,
    colours: Path,
    setting: MakeSetting,
    no_more_encoding: Callable[[], None],
    tmp_path: Path,
):
    labelled_features(ref, open_source(str(colours)), setting(colours), "mean", phase="p")
    if what == "weights":
        ref = dataclasses.replace(ref, untrained=True, seed=1)
    elif what == "data":
        (colours / "train/red/00.png").unlink()
    else:
        other = card.model_copy(update={"mean": (0.1, 0.1, 0.1)})
        save_bundle(tmp_path / "tiny", other, untrained(card).encoder.state_dict())

    no_more_encoding()
    with pytest.raises(AssertionError, match="the encoder was called"):
        labelled_features(ref, open_source(str(colours)), setting(colours), "mean", phase="p")


def test_vectors__a_full_cache_loses_what_was_unread_for_longest(
    ref: EncoderRef, colours: Path, setting: MakeSetting, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):  # fmt: skip
    cache = tmp_path / "cache/mimray/features"
    source = open_source(str(colours))
    labelled_features(ref, source, setting(colours, limit=10), "mean", phase="p")
    (first,) = cache.iterdir()
    labelled_features(ref, source, setting(colours, limit=11), "mean", phase="p")
    (second,) = set(cache.iterdir()) - {first}
    labelled_features(ref, source, setting(colours, limit=10), "mean", phase="p")  # read again
    sizes = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())

    monkeypatch.setattr(pooled, "CACHE_BYTES", sizes)
    labelled_features(ref, source, setting(colours, limit=9), "mean", phase="p")

    assert first.exists()
    assert not second.exists()
    assert len(list(cache.iterdir())) == 2


def test_vectors__labels_outside_the_classes(
    ref: EncoderRef, colours: Path, setting: MakeSetting, monkeypatch: pytest.MonkeyPatch
):
    source = open_source(str(colours))
    labels = source.labels()
    labels[[5, 6]] = -1, 3

    with pytest.raises(DataError, match=r"blue/05\.png has no label, and so it is with 1 more"):
        labelled_features(ref, source, setting(colours), "mean", phase="p")
    found, notes = labelled_features(
        ref, source, setting(colours, skip_invalid=True), "mean", phase="p"
    )
    assert [note.partition(":")[2] for note in notes] == [
        " it has no label", " its label 3 lies outside 0 to 2",
    ]  # fmt: skip
    assert (len(found.x), found.y.min(), found.y.max()) == (58, 0, 2)
    labels[:] = -1
    with pytest.raises(EmptyDatasetError, match="no picture of"):
        labelled_features(
            ref, source, setting(colours, skip_invalid=True, limit=30), "mean", phase="p"
        )


@pytest.mark.parametrize(
    ("nodes", "wanted"),
    [
        ([{"CPU": 2}], (2, 1, 0)),
        ([{"CPU": 16}, {"CPU": 64}, {}], (20, 4, 0)),
        ([{"CPU": 32, "GPU": 8}, {"CPU": 64, "GPU": 4}, {"CPU": 8}], (12, 4, 1)),
        ([{"CPU": 64, "GPU": 1}], (1, 8, 1)),
    ],
)
def test_pool__fits_every_node(
    nodes: list[dict[str, float]], wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    lost = {"Alive": False, "Resources": {"CPU": 1, "GPU": 9}}
    monkeypatch.setattr("ray.nodes", lambda: [*alive, lost])

    assert extraction._pool(use_gpus=True) == wanted
    assert extraction._pool(use_gpus=False).num_gpus == 0


def test_chosen__evenly_spread():
    assert evenly_spread(10, None).tolist() == list(range(10))
    assert evenly_spread(10, 99).tolist() == list(range(10))
    assert evenly_spread(10, 3).tolist() == [0, 3, 6]
