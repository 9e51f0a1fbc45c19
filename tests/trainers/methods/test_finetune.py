"""Fine-tuning against timm: mixing, targets, the network; what it begins with and costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.data import mixup as timm_mixup
from timm.models.vision_transformer import VisionTransformer

from mimray.trainers.bundles import ENCODER, BundleCard, read_card, save_bundle
from mimray.trainers.config.finetune import FinetuneConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe, parse_recipe, resolve
from mimray.trainers.cost import estimate
from mimray.trainers.errors import BundleError, ConfigError, RunConflictError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.finetune import Finetune
from mimray.trainers.methods.initial import trainable_encoder
from mimray.trainers.methods.mixing import draw_mixing, mix, smoothed_targets
from mimray.trainers.methods.needs import check_outside, keep_needs, load_needs, with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.models.resize import resized
from mimray.trainers.storage import RunDir
from mimray.trainers.types import DatasetFacts

VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
LEARNED = VIT | {"positions": "learned"}
SHARED = VIT | {"positions": "none", "rel_pos_bias": "shared", "layer_scale": 0.1}
SWIN = {"name": "swin", "width": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
CONV = {"name": "conv", "widths": [16, 32]}
NUM_CLASSES = 5


def recipe_of(encoder: dict[str, Any] = LEARNED, size: Any = 32, **method: Any) -> Recipe:
    return parse_recipe(
        {
            "encoder": encoder,
            "method": {"name": "finetune", "num_classes": NUM_CLASSES, **method},
            "data": {"image_size": size},
            "optim": {"batch_size": 4, "steps": 10},
        }
    )


def method_of(encoder: dict[str, Any] = LEARNED, **method: Any) -> Finetune:
    torch.manual_seed(0)
    built = build_method(recipe_of(encoder, **method))
    assert isinstance(built, Finetune)
    return built


def batch_of(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 32, 32, generator=rng)
    return images, torch.randint(NUM_CLASSES, (count,), generator=rng)


def _next(given: Iterator[Any], *_: Any, **__: Any) -> Any:
    return next(given)


def _given(lam: np.ndarray, cut: np.ndarray, _: int) -> tuple[np.ndarray, np.ndarray]:
    return lam, cut


MIXING = pytest.mark.parametrize(
    "options",
    [
        {"mixup": 0.8, "cutmix": 1.0},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"mixup": 0.2, "cutmix": 0.7, "mixup_prob": 0.5, "mixup_switch_prob": 0.8},
    ],
)
SIZE = (32, 32)


def mixing_of(config: FinetuneConfig, seed: int, count: int = 4) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    drawn = [draw_mixing(rng, config, SIZE) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn)).float()


@MIXING
def test_mix__is_that_of_timm_a_picture(options: dict[str, float], monkeypatch: pytest.MonkeyPatch):
    config = FinetuneConfig(name="finetune", label_smoothing=0.1, **options)
    theirs = timm_mixup.Mixup(
        mixup_alpha=config.mixup or 1, label_smoothing=0.1, num_classes=NUM_CLASSES, mode="elem"
    )
    images, labels = batch_of()
    before, kinds = images.clone(), set()
    opposite = torch.arange(4).flip(0)  # timm's partners

    for seed in range(20):
        mixing = mixing_of(config, seed)
        kept, boxes = mixing[:, 0].numpy(), mixing[:, 1:].int().tolist()
        cut = np.array([box[1] > box[0] and box[3] > box[2] for box in boxes])
        shares = np.array([1 - (b - a) * (d - c) / (32 * 32) for a, b, c, d in boxes])
        given = iter([(box, share) for box, share, c in zip(boxes, shares, cut, strict=True) if c])
        monkeypatch.setattr(timm_mixup, "cutmix_bbox_and_lam", partial(_next, given))
        lam = np.where(cut, 0.5, kept).astype(np.float32)  # any share below 1 for a box
        monkeypatch.setattr(theirs, "_params_per_elem", partial(_given, lam, cut))
        wanted, wanted_targets = theirs(images.clone(), labels)
        smooth = smoothed_targets(labels, NUM_CLASSES, 0.1)
        found, targets = mix(images, smooth, mixing, opposite)

        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(targets, wanted_targets)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(4))
        kinds |= {
            (bool((ours == one).all()), bool((ours == one).any()))
            for ours, one in zip(found, images, strict=True)
        }
    assert torch.equal(images, before)
    # Whole pictures were blended, or parts of them replaced, and sometimes nothing was done.
    assert ((False, False) in kinds) == ("mixup" in options)
    assert ((False, True) in kinds) == ("cutmix" in options)
    assert ((True, True) in kinds) >= ("mixup_prob" in options)


@MIXING
def test_mixing__has_the_distributions_of_the_papers(options: dict[str, float]):
    config = FinetuneConfig(name="finetune", **options)
    drawn = mixing_of(config, 0, count=20_000).numpy()
    kept, (top, bottom, left, right) = drawn[:, 0], drawn[:, 1:].T

    mixup = kept < 1
    cutmix = (bottom > top) & (right > left)
    assert not (mixup & cutmix).any()
    switch = config.mixup_switch_prob if config.mixup and config.cutmix else bool(config.cutmix)
    assert mixup.mean() == pytest.approx(config.mixup_prob * (1 - switch), abs=0.03)
    # A box may come out with no pixel at all.
    assert cutmix.mean() == pytest.approx(config.mixup_prob * switch, abs=0.06)
    if mixup.any():
        assert kept[mixup].mean() == pytest.approx(0.5, abs=0.02)
        wanted = 0.25 / (2 * config.mixup + 1)  # the variance of Beta(alpha, alpha)
        assert kept[mixup].var() == pytest.approx(wanted, abs=0.01)
    assert (top >= 0).all()
    assert (bottom <= 32).all()
    assert (right <= 32).all()


def test_network__is_maes_classifier_in_timm():
    ours = method_of().eval()
    theirs = VisionTransformer(
        img_size=32, patch_size=8, num_classes=NUM_CLASSES, global_pool="avg", embed_dim=16,
        depth=2, num_heads=2, fc_norm=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    ).eval()  # fmt: skip
    assert abs(ours.head.weight.std().item() - 2e-5) < 1e-5
    torch.nn.init.normal_(ours.head.weight)
    torch.nn.init.normal_(ours.encoder.get_parameter("norm.weight"))
    state = {k.removeprefix("encoder."): v for k, v in ours.state_dict().items()}
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
             for k, v in state.items()}  # fmt: skip
    theirs.load_state_dict(state)
    images, labels = batch_of()

    with torch.no_grad():
        output = ours(images, labels=labels)
        logits = theirs(images)

    torch.testing.assert_close(output.prediction, logits, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-5)
    right = (logits.argmax(dim=1) == labels).float().mean()
    torch.testing.assert_close(output.terms["accuracy"], right)


@pytest.mark.parametrize(
    ("encoder", "pooling"), [(LEARNED, "mean"), (LEARNED, "cls"), (SWIN, "mean"), (CONV, "mean")]
)
def test_forward__every_parameter_learns(encoder: dict[str, Any], pooling: str):
    method = method_of(encoder, pooling=pooling, label_smoothing=0.1, mixup=0.8, cutmix=1).train()
    torch.nn.init.normal_(method.head.weight)  # else gradients behind it are all but zero
    images, labels = batch_of()

    method(images, labels=labels).loss.backward()

    still = {n for n, p in method.named_parameters() if p.requires_grad and p.grad is None}
    assert still == set()


def test_class_token__is_what_the_head_sees():
    method = method_of(pooling="cls").eval()
    images, _ = batch_of()

    found = method.logits(images)

    torch.testing.assert_close(found, method.head(method.encoder(images).prefix[:, 0]))


def test_forward__mixes_in_training_only():
    method = method_of(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    torch.nn.init.normal_(method.head.weight)
    images, labels = batch_of()
    partners = torch.tensor([1, 0, 3, 2])

    def loss(seed: int) -> float:
        mixing = mixing_of(method.config, seed)
        return method(images, labels=labels, mixing=mixing, partners=partners).loss.item()

    method.train()
    assert loss(3) == loss(3)
    assert len({loss(seed) for seed in range(5)}) == 5
    method.eval()
    assert len({loss(seed) for seed in range(5)}) == 1
    assert set(method(images, labels=labels).target.unique().tolist()) == {0.0, 1.0}


def test_forward__scores_no_partner_that_is_of_another_micro_batch():
    method = method_of(mixup=0.8, cutmix=1.0).train()
    torch.nn.init.normal_(method.head.weight)
    images, labels = batch_of(6)
    mixing = mixing_of(method.config, 0, count=6)
    pairs = torch.tensor([1, 0, 3, 2, 5, 4])

    whole = method(images, labels=labels, mixing=mixing, partners=pairs)
    order = torch.tensor([0, 1, 2, 3])  # 0 to 2, and 3, the partner of 2
    first = method(
        images[order], labels=labels[order], mixing=mixing[order],
        partners=torch.tensor([1, 0, 3]),
    )  # fmt: skip
    order = torch.tensor([3, 4, 5, 2])
    second = method(
        images[order], labels=labels[order], mixing=mixing[order],
        partners=torch.tensor([3, 2, 1]),
    )  # fmt: skip

    torch.testing.assert_close((first.loss + second.loss) / 2, whole.loss)
    torch.testing.assert_close(torch.cat([first.target, second.target]), whole.target)


def test_panels__frame_what_is_right_in_green():
    method = method_of().eval()
    images, _ = batch_of(2)
    output = method(images, labels=torch.tensor([0, 0]))
    output = output._replace(prediction=torch.eye(NUM_CLASSES)[:2])  # says 0 and 1

    (panel,) = method.panels(images, output)

    colours = [tuple(picture[0, 0]) for picture in panel.pixels]
    assert colours == [(40, 160, 70), (205, 50, 45)]
    inside = method.pixels(images)[:, 4:-4, 4:-4]
    np.testing.assert_array_equal(panel.pixels[:, 4:-4, 4:-4], inside)


def bundle(folder: Path, encoder: dict[str, Any] = VIT, size: tuple[int, int] = (16, 24)) -> str:
    config = recipe_of(encoder, size=size).encoder
    torch.manual_seed(5)
    card = BundleCard(
        name="it", encoder=config, image_size=size, channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    state = build_encoder(config, size).state_dict()
    state = {name: value + 0.1 for name, value in state.items()}  # no norm is as it begins
    for name, value in state.items():
        if name.endswith("relative_position_bias_table"):
            state[name] = torch.randn_like(value)
    save_bundle(folder, card, state)
    return str(folder)


def test_initial__a_run_begins_with_the_bundle_at_its_own_size(tmp_path: Path):
    place, run = bundle(tmp_path / "bundle"), RunDir(str(tmp_path / "run"))
    recipe = with_needs(recipe_of(bundle=place))
    assert isinstance(recipe.method, FinetuneConfig)
    keep_needs(recipe, run)
    method = build_method(recipe)

    load_needs(method, run)

    card = BundleCard.model_validate_json((tmp_path / "bundle/bundle.json").read_bytes())
    assert recipe.method.bundle_sha256 == card.weights_sha256
    torch.manual_seed(5)
    old = build_encoder(card.encoder, (16, 24)).state_dict()
    old = {name: value + 0.1 for name, value in old.items()}
    wanted = resized(old, (card.encoder, (16, 24)), (recipe.encoder, (32, 32)))
    for name, value in method.encoder.state_dict().items():
        expected = torch.full_like(value, name == "norm.weight") if name[:5] == "norm." else None
        assert torch.equal(value, wanted[name] if expected is None else expected), name
    assert method.encoder.get_parameter("pos_embed").requires_grad
    with pytest.raises(RunConflictError, match=r"--fresh would delete .* and method\.bundle with"):
        check_outside(recipe, RunDir(str(tmp_path / "bundle")))
    check_outside(recipe, run)


def test_initial__another_bundle_than_the_plans_is_refused(tmp_path: Path):
    recipe = with_needs(recipe_of(bundle=bundle(tmp_path / "a")))
    run = RunDir(str(tmp_path / "run"))
    keep_needs(recipe, run)
    method = recipe.method.model_copy(update={"bundle_sha256": "0" * 64})
    other = recipe.model_copy(update={"method": method})

    with pytest.raises(BundleError, match=r"is not the one of the plan \(000000000000\)"):
        load_needs(build_method(other), run)
    with pytest.raises(BundleError, match="is not the one of the plan"):
        with_needs(other)
    (tmp_path / "run" / "initial" / "encoder.safetensors").write_bytes(b"broken")
    with pytest.raises(BundleError, match="does not match its checksum"):
        load_needs(build_method(recipe), run)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (LEARNED | {"positions": "none"}, r"'none', there 'learned'.*encoder\.positions=learned"),
        (LEARNED | {"depth": 3}, r"encoder\.depth 3.*--set encoder\.depth=2"),
        (SWIN, "an encoder: section for vit"),
    ],
)
def test_initial__another_architecture_is_refused_with_the_cure(
    encoder: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ConfigError, match=message):
        with_needs(recipe_of(encoder, bundle=bundle(tmp_path / "bundle")))


def test_initial__drop_path_is_the_runs_own(tmp_path: Path):
    place = bundle(tmp_path / "bundle", LEARNED)

    assert with_needs(recipe_of(LEARNED | {"drop_path": 0.3}, bundle=place)).method.bundle == place


@pytest.mark.parametrize("size", [(16, 24), (32, 32)])
@pytest.mark.parametrize("kind", ["per_block", "shared"])
def test_initial__relative_positions_shared_by_all_blocks_become_each_blocks(
    kind: str, size: tuple[int, int], tmp_path: Path
):
    """Before training the outputs are those of the bundle's encoder at the same size."""
    ours = SHARED | {"rel_pos_bias": kind}
    recipe = with_needs(recipe_of(ours, size, bundle=bundle(tmp_path / "bundle", SHARED)))
    keep_needs(recipe, run := RunDir(str(tmp_path / "run")))
    method = build_method(recipe)
    load_needs(method, run)

    card, state = read_card(tmp_path / "bundle"), load_file(tmp_path / "bundle" / ENCODER)
    assert state["rel_pos_bias.relative_position_bias_table"].std() > 0.5
    shared = build_encoder(card.encoder, size)
    shared.load_state_dict(resized(state, (card.encoder, (16, 24)), (card.encoder, size)))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = shared.eval()(images, norm=False).tokens
        found = method.encoder.eval()(images, norm=False).tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for parameter in method.encoder.parameters():
        parameter.grad = None
    method.encoder(images).tokens.square().sum().backward()
    tables = [p for name, p in method.encoder.named_parameters() if name.endswith("bias_table")]
    assert len(tables) == (2 if kind == "per_block" else 1)
    assert all(table.grad is not None and table.grad.abs().sum() > 0 for table in tables)


def test_evaluated__begins_with_relative_positions_of_each_block(tmp_path: Path):
    card = read_card(Path(bundle(tmp_path / "bundle", SHARED)))
    found = trainable_encoder(card, (32, 32))
    assert isinstance(found, ViTConfig)
    assert found.rel_pos_bias == "per_block"


@pytest.mark.parametrize("pooling", ["cls"])
@pytest.mark.parametrize("encoder", [SWIN, CONV])
def test_composition__no_class_token_no_pooling_by_it(encoder: dict[str, Any], pooling: str):
    with pytest.raises(ConfigError, match="has no class token"):
        recipe_of(encoder, pooling=pooling)


def test_cost__counts_head_and_encoder():
    recipe = load_recipe("finetune-vit-b", ["method.num_classes=1000"])

    cost = estimate(resolve(recipe, DatasetFacts("here", 10**6, "f"), 1), "bf16")

    assert cost.parameters["head"] == 768 * 1000 + 1000
    # He et al. 2022 fine-tune 86 M parameters; a ViT-B/16 takes 17.6 G multiply-adds at 224.
    assert cost.parameters["encoder"] == pytest.approx(85.8e6, rel=1e-3)
    assert cost.plain.forward_flops["encoder"] == pytest.approx(2 * 17.5e9, rel=0.02)
    assert cost.plain.encoder_tokens == 197


@pytest.mark.parametrize(
    ("name", "lr", "ends", "decay", "drop_path", "epochs", "warmup", "clip", "from_recipe"),
    [
        # The official peak rate at the recipe's batch, and the rates at the start and the end.
        ("finetune-simmim-vit-b", 5e-3, (1e-6, 1e-6), 0.65, 0.1, 100, 20, 5.0, "simmim-vit-b"),
        ("finetune-simmim-swin-b", 5e-3, (1e-6, 1e-6), 0.8, 0.1, 100, 20, 5.0, "simmim-swin-b"),
        ("finetune-simmim-swin-l", 5e-3, (1e-6, 1e-6), 0.7, 0.2, 100, 20, 5.0, "simmim-swin-l"),
        ("finetune-beit-vit-b", 4e-3, (0, 1e-6), 0.65, 0.1, 100, 20, None, "beit-vit-b"),
        ("finetune-beit-vit-l", 1e-3, (0, 1e-6), 0.75, 0.2, 50, 5, None, "beit-vit-l"),
        ("finetune-maskfeat-vit-b", 2e-3, (1e-8, 1e-6), 0.65, 0.1, 100, 20, None, "maskfeat-vit-b"),
        ("finetune-vit-b", 2e-3, (0, 1e-6), 0.65, 0.1, 100, 5, None, "mae-vit-b"),
        ("finetune-vit-l", 4e-3, (0, 1e-6), 0.75, 0.2, 50, 5, None, "mae-vit-l"),
    ],
)
def test_recipes__fine_tune_what_their_methods_pre_train(
    name: str, lr: float, ends: tuple[float, float], decay: float, drop_path: float, epochs: int,
    warmup: int, clip: float | None, from_recipe: str,
):  # fmt: skip
    recipe, before = load_recipe(name), load_recipe(from_recipe)
    plan = resolve(recipe, DatasetFacts("imagenet", 1_281_167, "f", ("a", "b")), world_size=8)
    optim = recipe.optim
    assert plan.lr == pytest.approx(lr)
    assert (optim.warmup_lr, optim.min_lr) == ends
    assert (optim.epochs, optim.warmup_epochs) == (epochs, warmup)
    assert (optim.layer_decay, optim.clip_grad_norm) == (decay, clip)
    assert (optim.betas, optim.weight_decay.start) == ((0.9, 0.999), 0.05)
    assert recipe.encoder.model_dump()["drop_path"] == drop_path
    # Its encoder takes the weights that the other recipe's run leaves.
    card = BundleCard(
        name="it", encoder=before.encoder, image_size=before.data.image_size, channels=3,
        mean=(0.5,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    wanted = trainable_encoder(card, recipe.data.image_size)
    free = {"name", "init", "drop_path"}
    assert recipe.encoder.model_dump(exclude=free) == wanted.model_dump(exclude=free)


@pytest.mark.parametrize(("name", "lr"), [("beit-vit-l", 1.5e-3), ("simmim-swin-l", 4e-4)])
def test_recipes__large_ones_are_the_base_ones_of_another_size(name: str, lr: float):
    base = {"beit-vit-l": "beit-vit-b", "simmim-swin-l": "simmim-swin-b"}[name]
    large, small = load_recipe(name), load_recipe(base)
    plan = resolve(large, DatasetFacts("imagenet", 1_281_167, "f"), world_size=16)
    assert plan.lr == pytest.approx(lr)
    assert large.method == small.method
    assert large.optim == small.optim
    assert large.data == small.data


@pytest.mark.parametrize("name", ["mae-vit-s", "mae-cross-vit-s", "simmim-vit-s"])
@pytest.mark.parametrize("pictures", [10_000, 200_000])
def test_recipes__for_small_jobs_are_as_long_whatever_the_data(name: str, pictures: int):
    recipe = load_recipe(name)
    plan = resolve(recipe, DatasetFacts("own", pictures, "f"), world_size=1)
    assert (plan.steps, plan.global_batch, plan.warmup_steps) == (40_000, 512, 2000)
    assert recipe.encoder.model_dump()["width"] == 384


def test_recipes__are_table_9_of_the_paper():
    for name, lr, decay, drop_path, epochs in (
        ("finetune-vit-b", 2e-3, 0.65, 0.1, 100),
        ("finetune-vit-l", 4e-3, 0.75, 0.2, 50),
    ):
        recipe = load_recipe(name, ["method.num_classes=1000"])
        plan = resolve(recipe, DatasetFacts("imagenet", 1_281_167, "f"), world_size=8)
        assert (plan.lr, recipe.optim.layer_decay) == (pytest.approx(lr), decay)
        assert plan.steps == int(epochs * 1_281_167 / 1024)
        assert plan.warmup_steps == round(5 * 1_281_167 / 1024)
        assert recipe.encoder.drop_path == drop_path
        method, data = recipe.method, recipe.data
        assert (method.mixup, method.cutmix, method.label_smoothing) == (0.8, 1.0, 0.1)
        assert (data.auto_augment, data.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
