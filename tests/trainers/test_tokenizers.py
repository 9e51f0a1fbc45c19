"""A tokenizer on its way: from the recipe that names it, into the run, into the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import fs as pafs

from mimray.trainers import load_bundle, load_method
from mimray.trainers.bundles import (
    CARD,
    ENCODER,
    METHOD,
    BundleCard,
    bundle_folder,
    read_card,
    save_bundle,
)
from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.run import Plan, Recipe, differences, parse_recipe
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.errors import BundleError, ConfigError, MimrayError, RunConflictError
from mimray.trainers.launch import Job, prepare
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.beit import BEiT
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import keep_needs, supply, with_needs
from mimray.trainers.storage import RunDir


class Remote(RunDir):
    """A directory that is reached through pyarrow alone, as one in an object store is."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri.removeprefix("mock://"))
        self.filesystem = pafs.SubTreeFileSystem("/", pafs.LocalFileSystem())
        self.root, self.uri = self.uri.lstrip("/"), f"mock://{self.uri}"


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mock://` paths as an object store's."""
    monkeypatch.setattr("mimray.trainers.bundles.RunDir", Remote)


TOKENIZER = "tokenizer"


def dvae_recipe(**changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": {"name": "conv", "widths": [8, 8], "depth": 1},
        "method": {
            "name": "dvae",
            "codebook_size": 32,
            "code_dim": 4,
            "decoder_widths": [8, 8, 8],
            "decoder_blocks": 1,
        },
        "data": {"image_size": [16, 24], "mean": [0.5] * 3, "std": [0.5] * 3},
        "optim": {"batch_size": 2, "steps": 10},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse_recipe(tree)


def beit_recipe(tokenizer: Path | str = "", **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": {"name": "vit", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8},
        "method": {
            "name": "beit",
            "tokenizer": str(tokenizer),
            "tokenizer_image_size": [16, 24],
            "min_block_patches": 2,
        },
        "data": {"image_size": [32, 48], "num_workers": 0},
        "optim": {"batch_size": 2, "steps": 4},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse_recipe(tree)


def save(method: Method, folder: Path, tokenizer: Path | None = None) -> Path:
    recipe = method.recipe
    card = BundleCard(
        name="tiny",
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        mean=recipe.data.mean,
        std=recipe.data.std,
        method=recipe.method.name,
        recipe=recipe.model_dump(mode="json"),
    )
    rest = {k: v for k, v in method.state_dict().items() if not k.startswith("encoder.")}
    networks = {TOKENIZER: tokenizer} if tokenizer is not None else {}
    save_bundle(folder, card, method.encoder.state_dict(), rest, networks)
    return folder


def dvae_bundle(folder: Path, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    return save(build_method(dvae_recipe(**changes)), folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of dvae, as far as its bundle goes."""
    run = tmp_path_factory.mktemp("runs") / "dvae"
    dvae_bundle(run / "bundle")
    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def method_of(recipe: Recipe) -> BEiTConfig:
    assert isinstance(recipe.method, BEiTConfig)
    return recipe.method


def test_with_tokenizer__fills_in_what_it_finds(tokenizer: Path):
    recipe = with_needs(beit_recipe(tokenizer))
    found = method_of(recipe)

    assert found.vocab_size == 32
    (need,) = BEiT.needs()
    assert found.tokenizer_sha256 == need.digest(recipe, read_card(tokenizer))
    assert len(found.tokenizer_sha256) == 64
    other = dvae_recipe()
    assert with_needs(other) is other


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"data": {"channels": 1}},
            r"reads 3 channels, data\.channels is 1 \(--set data\.channels=3",
        ),
        (
            {"method": {"tokenizer_image_size": [32, 48]}},
            r"trained at 16x24 pixels.* is 32x48 \(--set method\.tokenizer_image_size=\[16,24\]",
        ),
        (
            {"data": {"image_size": [64, 48]}},
            r"makes 4x6 codes of 16x24 pixels, the encoder 8x6 tokens of 64x48 "
            r"\(--set data\.image_size=\[32,48\], or a tokenizer trained at 32x24 pixels",
        ),
        (
            {"method": {"vocab_size": 8192}},
            r"has 32 codes, method\.vocab_size is 8192 \(--set method\.vocab_size=32",
        ),
        ({"method": {"tokenizer_sha256": "0" * 64}}, r"is not the one of the plan \(0{12}\)"),
        ({"method": {"tokenizer": ""}}, r"names no tokenizer \(train one with `mimray pretrain"),
        ({"method": {"tokenizer": "/nowhere"}}, "no bundle at /nowhere"),
    ],
)  # fmt: skip
def test_prepare__refuses_a_tokenizer_that_does_not_fit(
    changes: dict[str, Any], match: str, tokenizer: Path, pictures: Path, tmp_path: Path
):
    recipe = beit_recipe(tokenizer, **changes)

    with pytest.raises((ConfigError, BundleError), match=match):
        prepare(Job(recipe, str(pictures), "run", str(tmp_path / "runs")))

    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", [ENCODER, METHOD])
def test_prepare__refuses_a_damaged_tokenizer(file: str, pictures: Path, tmp_path: Path):
    bundle = dvae_bundle(tmp_path / "dvae")
    data = bytearray((bundle / file).read_bytes())
    data[-1] ^= 1
    (bundle / file).write_bytes(data)

    with pytest.raises(BundleError, match=rf"{file} does not match its checksum"):
        prepare(Job(beit_recipe(bundle), str(pictures), "run", str(tmp_path)))


def test_prepare__refuses_what_is_no_tokenizer(pictures: Path, tmp_path: Path):
    mae = parse_recipe({
        "encoder": {"name": "vit", "width": 8, "depth": 1, "num_heads": 1, "patch_size": 8},
        "method": {"name": "mae", "decoder_width": 8, "decoder_depth": 1, "decoder_num_heads": 1},
        "data": {"image_size": 16},
        "optim": {"batch_size": 2, "steps": 10},
    })  # fmt: skip
    bundle = save(build_method(mae), tmp_path / "mae")

    with pytest.raises(ConfigError, match="is no tokenizer: its method is 'mae'"):
        prepare(Job(beit_recipe(bundle), str(pictures), "run", str(tmp_path)))


def job(recipe: Recipe, pictures: Path, folder: Path, fresh: bool = False) -> Job:
    return Job(recipe, str(pictures), "beit", str(folder), fresh)


def started(recipe: Recipe, pictures: Path, folder: Path) -> Plan:
    """A run as `pretrain` lays it out before workers start."""
    this = job(recipe, pictures, folder)
    plan = prepare(this)
    this.run.create()
    this.run.write("plan.json", plan.model_dump_json().encode())
    keep_needs(plan.recipe, this.run)
    return plan


def test_plan__is_about_which_tokenizer_not_where(tokenizer: Path, pictures: Path, tmp_path: Path):
    plan = started(beit_recipe(tokenizer), pictures, tmp_path)
    same = dvae_bundle(tmp_path / "moved")
    other = dvae_bundle(tmp_path / "other", seed=1)

    assert prepare(job(beit_recipe(same), pictures, tmp_path)).hash == plan.hash
    with pytest.raises(RunConflictError, match=r"method\.tokenizer_sha256: '\w{64}' -> '\w{64}'"):
        prepare(job(beit_recipe(other), pictures, tmp_path))
    elsewhere = prepare(Job(beit_recipe(other), str(pictures), "new", str(tmp_path)))
    assert elsewhere.hash != plan.hash
    [line] = differences(plan, elsewhere)
    assert line.startswith("method.tokenizer_sha256")


def test_run__keeps_the_tokenizer_and_can_go_on_with_its_own_copy(
    tokenizer: Path, pictures: Path, tmp_path: Path
):
    plan = started(beit_recipe(tokenizer), pictures, tmp_path)
    copy = tmp_path / "beit" / TOKENIZER

    assert read_card(copy) == read_card(tokenizer)
    for name in (ENCODER, METHOD):
        assert (copy / name).read_bytes() == (tokenizer / "bundle" / name).read_bytes()
    for way in (copy, tmp_path / "beit" / ".." / "beit" / TOKENIZER):
        assert started(beit_recipe(way), pictures, tmp_path).hash == plan.hash
        assert load_method(copy)


def test_prepare__fresh_does_not_delete_the_tokenizer(
    tokenizer: Path, pictures: Path, tmp_path: Path
):
    started(beit_recipe(tokenizer), pictures, tmp_path)

    for way in ("beit", "beit/../beit"):
        inside = beit_recipe(tmp_path / way / TOKENIZER)
        with pytest.raises(RunConflictError, match=r"--fresh would delete .*/beit and method\.tok"):
            prepare(job(inside, pictures, tmp_path, fresh=True))

    prepare(job(beit_recipe(tokenizer), pictures, tmp_path, fresh=True))


@pytest.mark.usefixtures("remote")
def test_tokenizer__may_lie_in_an_object_store_and_so_may_the_run(
    tokenizer: Path, pictures: Path, tmp_path: Path
):
    near = with_needs(beit_recipe(tokenizer))

    far = with_needs(beit_recipe(f"mock://{tokenizer}"))
    keep_needs(far, Remote(f"mock://{tmp_path}/run"))

    assert method_of(far).tokenizer_sha256 == method_of(near).tokenizer_sha256
    assert read_card(tmp_path / "run" / TOKENIZER) == read_card(tokenizer)


def trained(recipe: Recipe) -> BEiT:
    torch.manual_seed(2)
    method = build_method(recipe)
    assert isinstance(method, BEiT)
    return method.eval()


def test_attach__takes_the_tokenizer_of_the_plan_alone(tokenizer: Path, tmp_path: Path):
    method = trained(with_needs(beit_recipe(tokenizer)))
    pixels = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)

    supply(method, TOKENIZER, bundle_folder(tokenizer))

    codes = load_method(tokenizer).codes((pixels.float() / 255 - 0.5) / 0.5)
    assert torch.equal(method.codes(pixels), codes.flatten(1))
    with pytest.raises(BundleError, match="is not the one of the plan"):
        supply(method, TOKENIZER, dvae_bundle(tmp_path / "other", seed=1))


def test_bundle__carries_its_tokenizer(tokenizer: Path, pictures: Path, tmp_path: Path):
    plan = started(beit_recipe(tokenizer), pictures, tmp_path)
    method, run = trained(plan.recipe), RunDir(str(tmp_path / "beit"))
    supply(method, TOKENIZER, bundle_folder(tokenizer))
    images, mask = torch.randn(2, 3, 32, 48), torch.rand(2, 24) < 0.4

    write_bundle(run, plan, method.state_dict(), step=4, name="beit", command="test")
    # Nothing of the run but the bundle is needed from here on.
    (tmp_path / "beit" / "bundle").rename(tmp_path / "alone")
    loaded = load_method(tmp_path / "alone")

    ours, theirs = method(images, mask), loaded(images, mask)
    assert torch.equal(ours.target, theirs.target)
    assert torch.equal(ours.loss, theirs.loss)
    drawn = loaded.panels(images, theirs)
    assert [p.pixels.shape for p in drawn] == [(2, 32, 48, 3)] * 4
    # The encoder serves without it.
    encoder = load_bundle(tmp_path / "alone")
    assert torch.equal(encoder(images).pooled, method.encoder(images).pooled)


@pytest.mark.usefixtures("remote")
def test_bundle__carries_its_tokenizer_into_an_object_store(
    tokenizer: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plan = started(beit_recipe(tokenizer), pictures, tmp_path)
    run, sent = Remote(f"mock://{tmp_path}/beit"), list[str]()
    (tmp_path / "beit" / "bundle" / TOKENIZER).mkdir(parents=True)  # stores need no folders
    upload = Remote.upload
    monkeypatch.setattr(Remote, "upload", lambda *a: sent.append(a[2]) or upload(*a))

    write_bundle(run, plan, trained(plan.recipe).state_dict(), step=4, name="b", command="test")

    assert sorted(sent[:-1]) == sorted(
        f"bundle/{name}"
        for name in (ENCODER, METHOD, *(f"{TOKENIZER}/{n}" for n in (CARD, ENCODER, METHOD)))
    )
    assert sent[-1] == f"bundle/{CARD}"
    assert load_method(tmp_path / "beit").tokenizer is not None


def test_bundle__with_another_tokenizer_in_it_is_refused(tokenizer: Path, tmp_path: Path):
    recipe = with_needs(beit_recipe(tokenizer))
    other = dvae_bundle(tmp_path / "other", seed=1)
    save(trained(recipe), tmp_path / "beit", other)

    with pytest.raises(MimrayError, match="is not the one of the plan"):
        load_method(tmp_path / "beit")


def test_bundle__without_its_tokenizer_still_encodes(tokenizer: Path, tmp_path: Path):
    method = trained(with_needs(beit_recipe(tokenizer)))
    save(method, tmp_path / "beit")
    images = torch.randn(2, 3, 32, 48)

    loaded = load_method(tmp_path / "beit")

    assert torch.equal(loaded.encoder(images).pooled, method.encoder(images).pooled)
    with pytest.raises(BundleError, match="has no tokenizer"):
        loaded(images)
