from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from mimray.trainers.config.recipes import load_recipe, shipped_recipes
from mimray.trainers.config.run import (
    NEUTRAL,
    OPERATIONAL_KEYS,
    Plan,
    differences,
    known_keys,
    parse_plan,
    parse_recipe,
    resolve,
)
from mimray.trainers.errors import ConfigError
from mimray.trainers.types import DatasetFacts

FACTS = DatasetFacts("s3://here/photos", 10_000, "a" * 64)


def tree_of(**changes: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "encoder": {"name": "vit_tiny"},
        "method": {"name": "mae"},
        "data": {"image_size": 64},
        "optim": {"batch_size": 128, "steps": 300, "warmup_steps": 30, "base_lr": 1e-3},
    }
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return tree


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"mask_ration": 0.5}}, "unknown key 'method.mask_ration', did you mean 'm"),
        ({"method": {"batch_size": 8}}, "did you mean 'optim.batch_size'"),
        ({"method": {"zzzzzzzz": 8}}, r"unknown key 'method.zzzzzzzz' \("),
        ({"method": {"name": "simclr"}}, r"'method.name' is 'simclr'.*'mae'"),
        ({"encoder": {"name": "resnet"}}, r"'encoder.name' is 'resnet'.*'vit_base'"),
        ({"method": {"mask_ratio": 1.5}}, "'method.mask_ratio' is 1.5: .*less than 1"),
        ({"data": {"num_workers": "many"}}, "'data.num_workers' is 'many': .*integer"),
        ({"data": {"image_size": 60}}, "patch_size 16 does not divide .* 60; .* 48 and 64"),
        ({"data": {"image_size": [64, 8]}}, "width 8; .* 16 and 16"),
        ({"data": {"std": [0.5]}}, "data.std has 1 values for 3 channels"),
        ({"data": {"std": [0.5, 0.5, 0]}}, "must be positive"),
        ({"data": {"crop_scale": [0.9, 0.2]}}, "data.crop_scale .* 0 < low <= high <= 1"),
        ({"encoder": {"num_heads": 5}}, "encoder.width 192 is not a multiple of num_heads 5"),
        ({"method": {"decoder_width": 100}}, "method.decoder_width 100"),
        ({"method": {"mask_ratio": 0.99}}, "leaves no visible patch of 16"),
        ({"method": {"mask_ratio": 1e-18}}, "hides no patch of 16"),
        ({"optim": {"epochs": 3}}, "exactly one of 'epochs' and 'steps'"),
        ({"optim": {"warmup_epochs": 3}}, "only one of 'warmup_epochs' and 'warmup_steps'"),
    ],
)
def test_recipe__refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_recipe(tree_of(**changes))

    assert "\n" not in str(caught.value)


def test_recipe__names_every_error_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_recipe(tree_of(method={"mask_ration": 0.5}, optim={"batch_size": -1}))

    assert re.search(r"mask_ration.*optim\.batch_size", str(caught.value))


def test_recipe__a_missing_section_is_named():
    tree = tree_of()
    del tree["method"]

    with pytest.raises(ConfigError, match="missing key 'method'"):
        parse_recipe(tree)


def test_recipe__is_frozen():
    recipe = parse_recipe(tree_of())

    with pytest.raises(ValidationError, match="frozen"):
        recipe.optim.batch_size = 1


def test_recipe__a_name_brings_its_shape_and_its_parts_override():
    whole = parse_recipe(tree_of()).encoder
    part = parse_recipe(tree_of(encoder={"depth": 2})).encoder

    assert (whole.width, whole.depth, whole.num_heads, whole.patch_size) == (192, 12, 3, 16)
    assert (part.width, part.depth) == (192, 2)
    assert parse_recipe(tree_of(data={"channels": 1})).data.mean == (0.5,)
    assert parse_recipe(tree_of()).data.image_size == (64, 64)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe__parses_and_says_what_it_is(name: str):
    recipe = load_recipe(name)

    assert recipe.about is not None
    assert all(recipe.about.model_dump().values())
    # `mimray adapt` takes the recipe that fits the size of the encoder it is given.
    begins = "mimray adapt " if name.startswith("adapt-") else f"mimray pretrain {name} "
    assert recipe.about.command.startswith(begins)


def test_shipped_recipe__mae_vit_b_is_the_paper():
    recipe = load_recipe("mae-vit-b")

    plan = resolve(recipe, DatasetFacts("imagenet", 1_281_167, "f"), world_size=8)

    assert (plan.lr, plan.global_batch) == (pytest.approx(2.4e-3), 4096)
    assert plan.steps == int(1600 * 1_281_167 / 4096)
    assert plan.warmup_steps == round(40 * 1_281_167 / 4096)
    assert (plan.micro_batch_size, plan.accumulation) == (64, 8)
    assert (recipe.optim.betas, recipe.optim.weight_decay.start) == ((0.9, 0.95), 0.05)
    assert recipe.method.norm_pix_loss
    assert recipe.grid == (14, 14)


def test_load_recipe__overrides():
    recipe = load_recipe(
        "mae-tiny",
        [
            "optim.base_lr=1e-4",
            "data.image_size=[32, 64]",
            "optim.epochs=2",
            "method.mask_ratio=.5",
        ],
    )

    assert recipe.optim.base_lr == 1e-4
    assert recipe.data.image_size == (32, 64)
    assert (recipe.optim.epochs, recipe.optim.steps) == (2, None)
    assert recipe.method.mask_ratio == 0.5


def test_load_recipe__a_new_encoder_drops_the_old_numbers_first():
    recipe = load_recipe("mae-tiny", ["encoder.depth=3", "encoder.name=vit_small"])

    encoder = recipe.encoder
    assert (encoder.width, encoder.depth, encoder.patch_size) == (384, 3, 8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.base_lr", "not of the form"),
        ("=3", "not of the form"),
        ("optim..x=3", "not of the form"),
        ("optim.base_lr=[", "not YAML"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("optim.lr=3", "unknown key 'optim.lr', did you mean"),
    ],
)
def test_load_recipe__refuses_an_override(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe("mae-tiny", ["seed=1", override])


def test_load_recipe__refuses_unknown_names_and_broken_files(tmp_path: Any):
    broken, listing = tmp_path / "broken.yaml", tmp_path / "list.yml"
    broken.write_text("a: [")
    listing.write_text("- a")

    with pytest.raises(ConfigError, match="'mae-tinny', did you mean 'mae-tiny'"):
        load_recipe("mae-tinny")
    with pytest.raises(ConfigError, match="no recipe file"):
        load_recipe(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="not YAML"):
        load_recipe(str(broken))
    with pytest.raises(ConfigError, match="mapping of sections, got list"):
        load_recipe(str(listing))


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (3000, 300), (1, 0)])
def test_load_recipe__steps_keep_the_warm_up_in_proportion(steps: int, warmup: int):
    recipe = load_recipe("mae-tiny", steps=steps)  # 300 steps, 30 of them warm-up

    assert (recipe.optim.steps, recipe.optim.warmup_steps) == (steps, warmup)


def test_load_recipe__steps_replace_epochs():
    recipe = load_recipe("mae-vit-b", steps=1000)  # 40 of 1600 epochs

    assert (recipe.optim.epochs, recipe.optim.steps) == (None, 1000)
    assert (recipe.optim.warmup_epochs, recipe.optim.warmup_steps) == (None, 25)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resolve__arithmetic(world_size: int):
    recipe = parse_recipe(tree_of(engine={"micro_batch_size": 16}))

    plan = resolve(recipe, FACTS, world_size)

    assert plan.lr == pytest.approx(1e-3 * 128 / 256)
    assert plan.micro_batch_size * plan.accumulation * world_size == plan.global_batch == 128
    assert plan.accumulation == 8 // world_size
    assert plan.num_samples == 300 * 128
    assert plan.steps_per_epoch == pytest.approx(10_000 / 128)
    assert plan.batch_arithmetic.startswith("global batch 128 = micro batch 16 x accumulation")


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 3, "128 cannot be split over 3 workers .nearest: 126"),
        ({"engine": {"micro_batch_size": 24}}, 1, "128 pictures is not a multiple"),
        ({"optim": {"batch_size": 20_000}}, 1, "10000 pictures, fewer than one global batch"),
        ({"optim": {"warmup_steps": 300}}, 1, "warm-up of 300 steps does not fit"),
    ],
)
def test_resolve__refuses(changes: dict[str, Any], world_size: int, message: str):
    with pytest.raises(ConfigError, match=message):
        resolve(parse_recipe(tree_of(**changes)), FACTS, world_size)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method.codebook_size=1000000"], "10000 pictures x 64 places = 640000"),
        (
            ["method.codebook_size=4096", "optim.batch_size=32"],
            "codes of the first 32 pictures x 64 places = 2048 encodings",
        ),
    ],
)
def test_resolve__refuses_more_codes_than_there_are_encodings(overrides: list[str], message: str):
    recipe = load_recipe("dvae-tiny", [*overrides, "method.kmeans_init=true"])
    with pytest.raises(ConfigError, match=message):
        resolve(recipe, FACTS, 1)


OPERATIONAL_CHANGES: list[dict[str, Any]] = [
    {"data": {"num_workers": 0, "prefetch_batches": 1, "cache_mib": 1}},
    {"engine": {"micro_batch_size": 32}},
    {"checkpoint": {"every_steps": 7}},
    {"logging": {"every_steps": 7}},
    {"resources": {"max_failures": 0}},
    {"about": {"summary": "another"}},
]


@pytest.mark.parametrize("changes", OPERATIONAL_CHANGES)
def test_plan__what_is_operational_leaves_the_hash_alone(changes: dict[str, Any]):
    before = resolve(parse_recipe(tree_of()), FACTS, 1)
    after = resolve(parse_recipe(tree_of(**changes)), FACTS, 2)

    assert before.recipe != after.recipe
    assert before.hash == after.hash
    assert differences(before, after) == []


def test_plan__operational_keys_exist():
    assert set(OPERATIONAL_KEYS) <= set(known_keys())


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"optim": {"base_lr": 2e-3}}, "optim.base_lr: 0.001 -> 0.002"),
        ({"data": {"hflip": 0.0}}, "data.hflip: 0.5 -> 0.0"),
        ({"engine": {"zero_stage": 2}}, "engine.zero_stage: 1 -> 2"),
        ({"engine": {"deepspeed": {"a": 1}}}, "engine.deepspeed.a: None -> 1"),
    ],
)
def test_plan__all_else_changes_the_hash_and_is_listed(changes: dict[str, Any], line: str):
    before = resolve(parse_recipe(tree_of()), FACTS, 1)
    after = resolve(parse_recipe(tree_of(**changes)), FACTS, 1)

    assert before.hash != after.hash
    assert line in differences(before, after)


def test_plan__a_new_key_at_its_neutral_value_is_no_other_plan():
    before = resolve(parse_recipe(tree_of()), FACTS, 1)
    changed = resolve(parse_recipe(tree_of(method={"init": "a", "init_partial": True})), FACTS, 1)

    # The digest of a version without any of these keys.
    assert before.hash == "c088ee86ea6a70ba"
    sections = {key.rpartition(".")[0] for key in known_keys()}
    assert set(NEUTRAL) <= set(known_keys()) | sections
    assert differences(before, changed) == ["method.init_partial: None -> True"]


def test_plan__other_data_is_another_plan_wherever_it_lies():
    recipe = parse_recipe(tree_of())
    before = resolve(recipe, FACTS, 1)
    moved = resolve(recipe, DatasetFacts("/elsewhere", 10_000, "a" * 64), 1)
    other = resolve(recipe, DatasetFacts("/elsewhere", 10_000, "b" * 64), 1)

    assert (moved.hash, differences(before, moved)) == (before.hash, [])
    assert other.hash != before.hash
    assert differences(before, other) == [
        "data: s3://here/photos (aaaaaaaaaaaa) -> /elsewhere (bbbbbbbbbbbb)"
    ]


def test_plan__survives_json():
    plan = resolve(load_recipe("mae-vit-b"), DatasetFacts("x", 9999, "f", ("cat", "dog")), 8)

    again = Plan.model_validate_json(plan.model_dump_json())

    assert again == plan
    assert again.data == plan.data


# Keys that plans of format 1 did not have yet.
_LATER_KEYS = (
    *("data.label", "data.val_seed", "data.val_share", "engine.offload"),
    *("method.revive_below_share", "method.revive_until_share"),
    *("method.warn_usage_below", "method.warn_perplexity_below"),
)


def plan_of_format_1(name: str, **method: Any) -> tuple[Plan, str]:
    """A shipped recipe's plan, and as an earlier version wrote it."""
    classes = ["method.num_classes=10"] if name.startswith("finetune") else []
    plan = resolve(load_recipe(name, classes), DatasetFacts("x", 100_000, "f"), 1)
    tree = json.loads(plan.model_dump_json())
    for dotted in _LATER_KEYS:
        section, key = dotted.split(".")
        tree["recipe"][section].pop(key, None)
    if plan.recipe.method.name == "dvae":
        tree["recipe"]["method"] |= {"revive_below": 0.0, **method}
    return plan, json.dumps({**tree, "format": 1})


@pytest.mark.parametrize("name", shipped_recipes())
def test_plan__of_an_earlier_version_is_read_and_not_continued(name: str):
    now, text = plan_of_format_1(name)

    old = parse_plan(text, "plan.json", "a hint")

    assert (old.steps, old.lr, old.data) == (now.steps, now.lr, now.data)
    assert old.recipe.encoder == now.recipe.encoder
    lines = [line for line in differences(old, now) if "revive_below_share" not in line]
    assert lines == ["order and pixels of training pictures: as of an earlier version of mimray"]


@pytest.mark.parametrize("name", ["dvae-tiny", "dvae-vq-8192", "dvae-gumbel-8192"])
def test_plan__a_retired_key_is_a_difference_where_it_had_an_effect(name: str):
    now, text = plan_of_format_1(name, revive_below=2.0)
    now = now.model_copy(update={"format": 1})

    old = parse_plan(text, "plan.json", "a hint")

    assert "method.revive_below: 2.0 -> None" in differences(old, now)
    assert "retired" not in json.loads(old.model_dump_json())


@pytest.mark.parametrize(
    ("text", "message", "cure"),
    [
        ("{", "plan.json is not JSON: .*line 1", "from a backup"),
        (b"\xff", "plan.json is not JSON: ", "from a backup"),
        ("[" * 200_000, "plan.json is not JSON: ", "from a backup"),
        ("[]", "plan.json is not a plan", "from a backup"),
        ('{"recipe": []}', "'recipe' is", "the cure"),
        ('{"recipe": {"method": 3}}', "missing key 'recipe.encoder'", "the cure"),
    ],
)
def test_plan__that_cannot_be_read_is_refused_with_the_cure(
    text: str | bytes, message: str, cure: str
):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_plan(text, "plan.json", "the cure")

    assert cure in caught.value.hint
    assert "\n" not in str(caught.value)
