"""A fine-tuning that is cut short goes on as if nothing had happened, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training, with_classes
from mimray.trainers.methods.needs import with_needs
from mimray.trainers.models import build_encoder
from tests.trainers.runs import Observer, run_of, write_noise

STEPS = 6


def plan_of(folder: Path) -> Plan:
    data = write_noise(folder / "data", 5, ("ant", "bee"))
    config = ViTConfig(name="vit", width=16, depth=2, num_heads=2, patch_size=8)
    card = BundleCard(
        name="it", encoder=config, image_size=(16, 16), channels=3, mean=(0.5,) * 3, std=(0.2,) * 3
    )
    save_bundle(folder / "bundle", card, build_encoder(config, (16, 16)).state_dict())
    tree = config.model_dump() | {"positions": "learned", "drop_path": 0.3}
    recipe = parse_recipe(
        {
            "encoder": tree,
            "method": {
                "name": "finetune", "bundle": str(folder / "bundle"), "mixup": 0.8, "cutmix": 1.0,
                "label_smoothing": 0.1,
            },
            "data": {
                "image_size": 16, "num_workers": 0, "random_erasing": 0.5,
                "auto_augment": "rand-m9-mstd0.5-inc1",
            },
            "optim": {"batch_size": 4, "steps": STEPS, "base_lr": 0.1, "layer_decay": 0.75},
            "engine": {"zero_stage": 1, "precision": "fp32", "micro_batch_size": 2},
            "checkpoint": {"every_steps": 2}, "logging": {"every_steps": 1},
        }
    )  # fmt: skip
    source = open_training(str(data), recipe)
    return resolve(with_classes(with_needs(recipe), source), source.facts, world_size=1)


@pytest.mark.usefixtures("process_group")
def test_train__a_continued_fine_tuning_repeats_an_uninterrupted_one(tmp_path: Path):
    plan, whole, cut = plan_of(tmp_path), Observer(), Observer(cut_at=5)

    wanted = run_of(plan, tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run_of(plan, tmp_path / "cut", cut)
    cut.cut_at = None
    found = run_of(plan, tmp_path / "cut", cut)

    assert (whole.began, cut.began) == ([0], [0, 4])
    assert found.state.keys() == wanted.state.keys()
    assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)
    assert (found.last["loss"], found.last["accuracy"]) == (
        wanted.last["loss"],
        wanted.last["accuracy"],
    )
    assert whole.titles == {"class right (green) or wrong (red)"}
