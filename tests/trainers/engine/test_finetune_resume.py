"""A fine-tuning that is cut short goes on as if nothing had happened, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training, with_classes
from mimray.trainers.engine.loop import Trained, train
from mimray.trainers.methods.needs import keep_needs, with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.storage import RunDir
from mimray.trainers.types import Panel

STEPS = 6


class Observer:
    """Ends the run with an error at a step, as a lost worker would."""

    def __init__(self, cut_at: int | None = None) -> None:
        self.cut_at = cut_at
        self.began: list[int] = []
        self.titles: set[str] = set()

    def resumed(self, step: int) -> None:
        self.began.append(step)

    def metrics(self, row: dict[str, Any]) -> None:
        if row["step"] == self.cut_at:
            raise KeyboardInterrupt

    def pictures(self, step: int, panels: list[Panel]) -> None:
        self.titles |= {panel.title for panel in panels}


def plan_of(folder: Path) -> Plan:
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / "data" / name).mkdir(parents=True)
        for number in range(5):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "data" / name / f"{number}.png")
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
    source = open_training(str(folder / "data"), recipe)
    return resolve(with_classes(with_needs(recipe), source), source.facts, world_size=1)


def run_of(plan: Plan, place: Path, observer: Observer) -> Trained:
    run = RunDir(str(place))
    run.create()
    keep_needs(plan.recipe, run)
    source = open_training(plan.data.uri, plan.recipe)
    return train(plan, run, source, device=torch.device("cpu"), observer=observer)


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
