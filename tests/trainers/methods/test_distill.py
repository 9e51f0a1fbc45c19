"""Feature targets: the loss against NumPy, the teacher's way through a run, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mimray.trainers import load_method
from mimray.trainers.bundles import BundleCard, load_bundle, save_bundle
from mimray.trainers.config.run import Recipe, parse_recipe, resolve
from mimray.trainers.cost import estimate
from mimray.trainers.data.decoded import Pictures
from mimray.trainers.data.sources import open_source
from mimray.trainers.data.views import make_inputs
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.errors import BundleError, ConfigError, MimrayError
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.distill import Distill
from mimray.trainers.methods.needs import foresee, keep_needs, load_needs, with_needs
from mimray.trainers.methods.reconstruction import reconstruct
from mimray.trainers.models import build_encoder
from mimray.trainers.models.normalise import normalise
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

Array = NDArray[np.float64]

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": {"name": "vit", "width": 16, "depth": 3, "num_heads": 2, "patch_size": 8},
    "swin": {
        "name": "swin", "width": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4,
        "window_size": 2,
    },
    "conv": {"name": "conv", "widths": [8, 8, 12], "depth": 1},
}  # fmt: skip
CODES = {"name": "dalle", "width": 8, "depth": 1}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def recipe_of(student: str = "vit", teacher: Path | str = "", **changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": ENCODERS[student],
        "method": {"name": "distill", "teacher": str(teacher), "min_block_patches": 4},
        "data": {"image_size": [32, 48], "num_workers": 0},
        "optim": {"batch_size": 2, "steps": 4},
    }
    for section, keys in changes.items():
        tree[section] = {**tree[section], **keys}
    return parse_recipe(tree)


def teacher_bundle(
    folder: Path,
    encoder: dict[str, Any] = ENCODERS["vit"],
    size: tuple[int, int] = (32, 48),
    channels: int = 3,
    **card: Any,
) -> Path:
    """A random encoder's bundle, of which no weight is zero."""
    made = BundleCard.model_validate(
        {
            "name": "teacher", "encoder": encoder, "image_size": size, "channels": channels,
            "mean": MEAN[:channels], "std": STD[:channels], **card,
        }
    )  # fmt: skip
    torch.manual_seed(7)
    module = build_encoder(made.encoder, made.image_size, channels)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_bundle(folder, made, module.state_dict())
    return folder


def distill_of(recipe: Recipe) -> Distill:
    """A method with its teacher, and a head whose predictions differ from place to place."""
    recipe = with_needs(recipe)
    torch.manual_seed(1)
    method = build_method(recipe)
    assert isinstance(method, Distill)
    method.attach(load_bundle(recipe.method.teacher))  # type: ignore[attr-defined]
    for parameter in method.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return method.eval()


def pixels_of(size: tuple[int, int], count: int = 3, channels: int = 3) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, *size), generator=rng, dtype=torch.uint8)


# The formula


def layer_norm(x: Array) -> Array:
    centred: Array = x - x.mean(-1, keepdims=True)
    found: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return found


def triangle_weights(old: int, new: int) -> Array:
    """Rows: what each new place takes of the old ones, by a triangle as wide as a new place."""
    scale = old / new
    reach = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centres[:, None])
    weights: Array = np.clip(1 - distance / reach, 0, None)
    weights /= weights.sum(1, keepdims=True)
    return weights


def targets(maps: list[Array], grid: tuple[int, int]) -> Array:
    """Targets [B, N, D] of maps [B, D, h, w]."""
    total: Any = 0.0
    for each in maps:
        normed = layer_norm(each.transpose(0, 2, 3, 1))  # B h w D
        rows = triangle_weights(normed.shape[1], grid[0])
        columns = triangle_weights(normed.shape[2], grid[1])
        total = total + np.einsum("yh,xw,bhwd->byxd", rows, columns, normed)
    mean: Array = total / len(maps)
    return layer_norm(mean).reshape(len(mean), -1, mean.shape[-1])


def errors(loss: str, prediction: Array, target: Array, beta: float = 1.0) -> Array:
    """The error of each vector of [..., D]."""
    found: Array
    if loss == "cosine":
        norms = np.linalg.norm(prediction, axis=-1) * np.linalg.norm(target, axis=-1)
        found = 1 - (prediction * target).sum(-1) / norms
        return found
    gap: Array = np.abs(prediction - target)
    found = np.where(gap < beta, gap**2 / (2 * beta), gap - beta / 2).mean(-1)
    return found


def mask_of(num_patches: int, count: int = 3) -> Tensor:
    """Masks that hide another number in each picture."""
    rng = np.random.default_rng(3)
    hidden = [rng.permutation(np.arange(num_patches) < 3 + 5 * i) for i in range(count)]
    return torch.from_numpy(np.stack(hidden))


def arrays(*tensors: Tensor) -> list[Array]:
    return [t.detach().double().numpy() for t in tensors]


@pytest.mark.parametrize("predict", ["hidden", "visible", "all"])
@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
@pytest.mark.parametrize(
    ("encoder", "size", "chosen", "layers"),
    [
        ({}, (32, 48), {}, [2]),  # the student's own grid
        ({}, (32, 48), {"last_layers": 3}, [0, 1, 2]),
        ({"patch_size": 4}, (28, 28), {"layers": [-1, 0]}, [0, 2]),  # 7 x 7: finer and coarser
        ({"patch_size": 16}, (32, 32), {}, [2]),  # 2 x 2: coarser
    ],
    ids=["same", "three", "finer", "coarser"],
)
def test_loss__is_the_formula(
    encoder: dict[str, Any],
    size: tuple[int, int],
    chosen: dict[str, Any],
    layers: list[int],
    loss: str,
    predict: str,
    tmp_path: Path,
) -> None:
    place = teacher_bundle(tmp_path / "teacher", ENCODERS["vit"] | encoder, size)
    keys = {"loss": loss, "predict": predict, **chosen}
    method = distill_of(recipe_of("vit", place, method=keys))
    images, pixels, mask = torch.randn(3, 3, 32, 48), pixels_of(size), mask_of(24)
    hidden_mean = torch.tensor(7.5)  # of a global batch whose other pictures hide less

    found = method(images, mask, pixels, hidden_mean)

    card = load_bundle(place).card
    assert card.mean == MEAN
    maps = load_bundle(place).features(normalise(pixels, MEAN, STD), layers)
    target = targets(arrays(*maps), (4, 6))
    with torch.no_grad():
        tokens = method.encoder(images, mask, method.mask_token).tokens
        (prediction,) = arrays(method.head(tokens))
    hidden = mask.numpy()
    places = {"hidden": hidden, "visible": ~hidden, "all": np.ones_like(hidden)}[predict]
    mean = {"hidden": 7.5, "visible": 24 - 7.5, "all": 24}[predict]
    error = errors(loss, prediction, target)
    assert found.loss.item() == pytest.approx((error * places).sum() / (3 * mean), abs=1e-5)
    np.testing.assert_allclose(found.target.numpy(), target, atol=2e-5)
    similarity = 1 - errors("cosine", prediction, target)
    wanted = (similarity * places).sum() / (3 * mean)
    assert found.terms["similarity"].item() == pytest.approx(wanted, abs=1e-5)
    # By itself a batch's mean is over its own places.
    assert method(images, mask, pixels).loss.item() == pytest.approx(error[places].mean(), abs=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("theirs", ["mean", "cls"])
def test_loss__has_the_pooled_feature(pooling: str, theirs: str, tmp_path: Path) -> None:
    place = teacher_bundle(tmp_path / "teacher", pooling=theirs)
    keys = {"pooled_weight": 0.5, "pooling": pooling, "loss": "smooth_l1", "smooth_l1_beta": 0.3}
    method = distill_of(recipe_of("vit", place, method=keys))
    images, pixels, mask = torch.randn(3, 3, 32, 48), pixels_of((32, 48)), mask_of(24)

    found = method(images, mask, pixels)

    (target,) = arrays(load_bundle(place)(normalise(pixels, MEAN, STD)).pooled)
    with torch.no_grad():
        features = method.encoder(images, mask, method.mask_token)
        mine = features.prefix[:, 0] if pooling == "cls" else features.tokens.mean(1)
        assert method.pooled_head is not None
        (prediction,) = arrays(method.pooled_head(mine))
    pooled = errors("smooth_l1", prediction, layer_norm(target), beta=0.3).mean()
    terms = {name: value.item() for name, value in found.terms.items()}
    assert terms["pooled_loss"] == pytest.approx(pooled, abs=1e-5)
    assert found.loss.item() == pytest.approx(terms["token_loss"] + 0.5 * pooled, abs=1e-5)
    assert method.recipe.method.pooled_by == pooling


@pytest.mark.parametrize("teacher", ENCODERS)
@pytest.mark.parametrize("student", ENCODERS)
def test_plain_distillation__predicts_every_token(
    student: str, teacher: str, tmp_path: Path
) -> None:
    place = teacher_bundle(tmp_path / "teacher", ENCODERS[teacher], (64, 64))
    method = distill_of(recipe_of(student, place, method={"mask_ratio": 0, "pooled_weight": 1}))
    assert "mask" not in dict(method.named_parameters())
    images, pixels = torch.randn(3, 3, 32, 48), pixels_of((64, 64))

    found = method(images, teacher_images=pixels)
    found.loss.backward()

    maps = load_bundle(place).features(normalise(pixels, MEAN, STD), [-1])
    target = targets(arrays(*maps), (4, 6))
    with torch.no_grad():
        (prediction,) = arrays(method.head(method.encoder(images).tokens))
    token_loss = errors("cosine", prediction, target).mean()
    assert found.terms["token_loss"].item() == pytest.approx(token_loss, abs=1e-5)
    assert found.mask.all()
    trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []


# The teacher


def test_teacher__is_frozen_and_no_part_of_the_state(tmp_path: Path) -> None:
    drops = ENCODERS["vit"] | {"drop_path": 0.9}
    method = distill_of(recipe_of("vit", teacher_bundle(tmp_path / "t", drops)))
    without = build_method(method.recipe)
    assert list(method.state_dict()) == list(without.state_dict())
    assert not [n for n, _ in method.named_modules() if "teacher" in n]
    (teacher,) = method.parts()["teacher"]
    assert not any(p.requires_grad for p in teacher.parameters())

    method.train()
    pixels, images, mask = pixels_of((32, 48)), torch.randn(3, 3, 32, 48), mask_of(24)
    once, again = method(images, mask, pixels).target, method(images, mask, pixels).target
    assert torch.equal(once, again)  # no path of the teacher is dropped
    assert not once.requires_grad


def test_teacher__is_computed_as_autocast_wants_and_its_targets_in_fp32(tmp_path: Path) -> None:
    method = distill_of(recipe_of("vit", teacher_bundle(tmp_path / "t")))
    (teacher,) = method.parts()["teacher"]
    seen = []
    for module in teacher.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        found = method(torch.randn(3, 3, 32, 48), mask_of(24), pixels_of((32, 48)))
    assert set(seen) == {torch.bfloat16}
    assert found.target.dtype == found.loss.dtype == torch.float32


def test_teacher__sees_the_same_crop_at_its_own_size(tmp_path: Path) -> None:
    place = teacher_bundle(tmp_path / "t", size=(64, 96))
    recipe = with_needs(recipe_of("vit", place, data={"color_jitter": 0.4, "hflip": 0.5}))
    image = Image.fromarray(pixels_of((12, 18), 1)[0].permute(1, 2, 0).numpy())
    (tmp_path / "pictures").mkdir()
    image.resize((144, 96), Image.Resampling.BICUBIC).save(tmp_path / "pictures" / "0.png")
    picture = Pictures(open_source(str(tmp_path / "pictures")))[0]
    for index in range(4):
        made = make_inputs(
            inputs_of(recipe), picture, seed=0, epoch=0, index=index, channels=3
        )  # fmt: skip
        assert made["teacher_images"].shape == (3, 64, 96)
        theirs = torch.from_numpy(made["teacher_images"]).float().unsqueeze(0)
        reduced = torch.nn.functional.interpolate(theirs, (32, 48), mode="area")[0].numpy()
        assert np.corrcoef(reduced.ravel(), made["images"].ravel())[0, 1] > 0.97


def test_run__keeps_its_teacher_and_does_not_export_it(tmp_path: Path) -> None:
    place = teacher_bundle(tmp_path / "teacher", size=(64, 64))
    recipe = with_needs(recipe_of("vit", place))
    config = recipe.method.model_dump()
    assert (config["teacher_image_size"], config["teacher_width"]) == ((64, 64), 16)
    run = RunDir(str(tmp_path / "run"))
    run.create()
    keep_needs(recipe, run)
    shutil.rmtree(place)  # the run has its own
    torch.manual_seed(0)
    method = build_method(recipe)
    load_needs(method, run)
    plan = resolve(recipe, DatasetFacts("here", 100, "f"), 1)
    run.write("plan.json", plan.model_dump_json().encode())
    state = {name: value.clone() for name, value in method.state_dict().items()}
    card = write_bundle(run, plan, state, step=1, name="student", command="test")

    files = sorted(p.name for p in (tmp_path / "run" / "bundle").iterdir())
    assert files == ["bundle.json", "encoder.safetensors", "method.safetensors"]
    assert (card.method, card.pooling) == ("distill", "mean")
    # From its run a method is drawn with the teacher, from elsewhere it says what is missing.
    pictures = [Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 30), "blue")]
    again = load_method(tmp_path / "run")
    panels = reconstruct(again, pictures).panels
    titles = ["original", "masked", "teacher's tokens", "predicted tokens"]
    assert [panel.title for panel in panels] == titles
    assert {panel.pixels.shape for panel in panels} == {(2, 32, 48, 3)}
    shutil.copytree(tmp_path / "run" / "bundle", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="has no teacher.*run's own folder"):
        reconstruct(load_method(tmp_path / "elsewhere"), pictures)


def test_digest__tells_teachers_apart_by_weights_and_normalisation(tmp_path: Path) -> None:
    first = with_needs(recipe_of("vit", teacher_bundle(tmp_path / "a")))
    same = with_needs(recipe_of("vit", teacher_bundle(tmp_path / "b")))
    other = with_needs(recipe_of("vit", teacher_bundle(tmp_path / "c", mean=(0.5, 0.5, 0.5))))
    plans = [resolve(r, DatasetFacts("here", 100, "f"), 1) for r in (first, same, other)]
    assert plans[0].hash == plans[1].hash != plans[2].hash
    run = RunDir(str(tmp_path / "run"))
    run.create()
    keep_needs(other, run)
    with pytest.raises(BundleError, match="the teacher in .* is not the one of the plan"):
        load_needs(build_method(first), run)


def test_plan__counts_the_teacher(tmp_path: Path) -> None:
    place = teacher_bundle(tmp_path / "t", size=(64, 64))
    recipe, networks, notes = foresee(recipe_of("vit", place))
    assert notes == []
    facts = DatasetFacts("here", 100, "f")
    counted = estimate(resolve(recipe, facts, 1), "bf16", networks=networks)
    without = estimate(resolve(recipe, facts, 1), "bf16")
    encoder = load_bundle(place).encoder
    assert counted.parameters["teacher"] == sum(p.numel() for p in encoder.parameters())
    extra = counted.plain.forward_flops["teacher"]
    # 64 patches of the teacher and a class token, 3 blocks of width 16; projections of 8 x 8 x 3.
    products = 3 * (2 * 65 * 12 * 16**2 + 2 * 2 * 65**2 * 16) + 2 * 64 * 192 * 16
    assert extra == pytest.approx(products)
    assert counted.plain.training_flops - without.plain.training_flops == pytest.approx(extra)
    added = counted.memory[1, False].parameters - without.memory[1, False].parameters
    assert added == sum(t.nbytes for t in [*encoder.parameters(), *encoder.buffers()])
    assert counted.trained == without.trained
    # Its weights are not counted once more as activations, which are few here.
    in_fp32 = [estimate(resolve(recipe, facts, 1), "fp32", networks=n) for n in (networks, {})]
    more = in_fp32[0].plain.activations - in_fp32[1].plain.activations
    assert more < added / 2

    for missing in ("", "nowhere"):
        _, networks, notes = foresee(recipe_of("vit", missing))
        assert not networks
        assert "teacher" in notes[0]


# Pictures


def test_panels__leave_grey_what_is_not_predicted(tmp_path: Path) -> None:
    method = distill_of(recipe_of("vit", teacher_bundle(tmp_path / "t"), data={"channels": 3}))
    images, mask = torch.randn(3, 3, 32, 48), mask_of(24)
    panels = method.panels(images, method(images, mask, pixels_of((32, 48))))
    predicted = panels[-1].pixels[:, ::8, ::8].reshape(3, 24, 3)
    assert (predicted[~mask.numpy()] == 127).all()
    assert len(np.unique(predicted[mask.numpy()], axis=0)) > 5


# Refusals


@pytest.mark.parametrize(
    ("student", "keys", "message"),
    [
        ("conv", {}, "hides tokens, which encoder conv does not have; take method.mask_ratio 0"),
        ("swin", {"pooled_weight": 1, "pooling": "cls"}, "encoder swin has no class token"),
        ("vit", {"pooling": "cls"}, "leaves the class token untrained"),
        ("vit", {"layers": [1], "last_layers": 2}, "both choose layers"),
        ("vit", {"smooth_l1_beta": 0.1}, "of no use to loss cosine"),
        ("vit", {"loss": "l2"}, "'method.loss' is 'l2'"),
        ("vit", {"mask_ratio": 1}, "'method.mask_ratio' is 1"),
        ("vit", {"masking": "random", "mask_ratio": 0.99}, "leaves no visible patch of 24"),
        ("vit", {"mask_ratio": 0.1}, "method.min_block_patches 4 is more than the 2 patches"),
        ("vit", {"last_layers": 0}, "'method.last_layers' is 0"),
    ],
)
def test_recipe__is_refused(student: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(student, method=keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bundle", "keys", "message"),
    [
        ({"channels": 1}, {}, "reads 1 channels, data.channels is 3 (--set data.channels=1"),
        ({}, {"layers": [3]}, "has 3 layers: method.layers [3] must lie in -3..2"),
        ({}, {"layers": [-1, 2]}, "has 3 layers: method.layers [-1, 2] names a layer twice"),
        ({}, {"last_layers": 4}, "has 3 layers: method.last_layers 4 is more than that"),
        ({"encoder": ENCODERS["swin"]}, {"last_layers": 2}, "layers of widths (8, 16)"),
        (
            {"encoder": ENCODERS["swin"]},
            {"layers": [0], "pooled_weight": 1},
            "the pooled feature's last one included",
        ),
        ({}, {"teacher_image_size": [30, 48]}, "teacher_image_size [30, 48] does not fit"),
        ({}, {"teacher_width": 8}, "has tokens of width 16, method.teacher_width is 8"),
        ({"encoder": CODES}, {}, "is a tokenizer, which makes codes and no features"),
    ],
)
def test_teacher__that_does_not_fit_is_refused(
    bundle: dict[str, Any], keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    place = teacher_bundle(tmp_path / "teacher", **bundle)
    with pytest.raises(ConfigError) as caught:
        with_needs(recipe_of("vit", place, method=keys))
    assert message in str(caught.value)
    assert f"method.teacher {place}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_teacher__that_is_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    damaged = teacher_bundle(tmp_path / "damaged")
    weights = damaged / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for place, message in (
        ("", "method.teacher names no teacher .*`mimray import` makes one"),
        (tmp_path / "nowhere", "no bundle at .*nowhere"),
        (tmp_path / "run", "neither a bundle nor a run that has exported one"),
        (damaged, "does not match its checksum"),
    ):
        with pytest.raises(MimrayError, match=message) as caught:
            with_needs(recipe_of("vit", place))
        assert "\n" not in str(caught.value)


def test_augmentation__that_moves_one_view_alone_is_refused(tmp_path: Path) -> None:
    place = teacher_bundle(tmp_path / "t")
    with pytest.raises(ConfigError, match="data.auto_augment rand-m9 moves the student's pixels"):
        with_needs(recipe_of("vit", place, data={"auto_augment": "rand-m9"}))


def test_mask__for_an_encoder_that_learnt_without_one_is_refused(tmp_path: Path) -> None:
    method = distill_of(recipe_of("vit", teacher_bundle(tmp_path / "t"), method={"mask_ratio": 0}))
    with pytest.raises(ConfigError, match="there is no mask token"):
        reconstruct(method, [Image.new("RGB", (9, 9))], mask_ratio=0.5)
