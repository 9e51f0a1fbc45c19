"""Recipes of every method that begin with weights, and bundles to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mimray.trainers.config.run import Plan, Recipe, parse_recipe, resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import keep_needs, load_needs, with_needs
from mimray.trainers.storage import RunDir
from tests.trainers.methods.cases import CONV, METHODS, SWIN, VIT
from tests.trainers.runs import write_noise

STEPS = 4
CASES = {
    name: {"encoder": CONV if name in ("ae", "vae", "dvae") else VIT, "method": method}
    for name, method in METHODS.items()
} | {
    "simmim-swin": {"encoder": SWIN, "method": METHODS["simmim"]},
    "capi": {"encoder": VIT, "method": {"name": "capi", "num_clusters": 12, "assignment_group": 4,
                                        "momentum": 0.9, "decoder_width": 16, "decoder_depth": 1,
                                        "decoder_num_heads": 2}},
    "mae-cross": {
        "encoder": VIT,
        "method": METHODS["mae"]
        | {"decoder": "cross", "decode_ratio": 0.5, "encoder_layers": [0, 1]},
    },
    "ibot-held": {"encoder": VIT, "method": METHODS["ibot"]},
}  # fmt: skip
BEGUN = {"ibot-held": {"gram_weight": 1.0}}
"""Keys of a method that go with weights to begin with alone, by case."""


def write_donors(place: Path) -> Path:
    """Write twelve pictures of two classes, and a bundle of every method; returns `place`."""
    write_noise(place / "pictures", 6, ("ant", "bee"), side_px=24)
    first = ("dvae", "mae")  # which others need
    for case in (*first, *(CASES.keys() - set(first))):
        donate(case, place)
    return place


def recipe_of(case: str, place: Path, *, stage: int = 0, size: Any = 16, **method: Any) -> Recipe:
    tree = {
        "encoder": CASES[case]["encoder"],
        "method": {**CASES[case]["method"], **method},
        "data": {"image_size": size, "num_workers": 0},
        # A large eps, since Adam makes whole steps of the rounding of gradients that are zero.
        "optim": {"batch_size": 4, "steps": STEPS, "base_lr": 0.05, "eps": 1e-2},
        "engine": {"zero_stage": stage, "precision": "fp32"},
        "checkpoint": {"every_steps": 1},
        "logging": {"every_steps": 1, "num_pictures": 1},
    }
    if case == "beit":
        tree["method"]["tokenizer"] = str(place / "dvae")
    if case == "distill":
        tree["method"]["teacher"] = str(place / "mae")
    return parse_recipe(tree)


def plan_of(recipe: Recipe, place: Path, world_size: int = 1) -> Plan:
    source = open_training(str(place / "pictures"), recipe)
    return resolve(recipe, source.facts, world_size)


def donate(case: str, place: Path, folder: str = "", **method: Any) -> dict[str, torch.Tensor]:
    """Write a bundle whose weights no initialisation gives; returns the method's state."""
    recipe = with_needs(recipe_of(case, place, **method))
    torch.manual_seed(5)
    state = build_method(recipe).state_dict()
    state = {k: v + 0.01 if v.is_floating_point() else v for k, v in state.items()}
    run = RunDir(str(place / (folder or case)))
    plan = plan_of(recipe, place)
    write_bundle(run, plan, state, step=7, name=case, command="test")
    return state


def begun(recipe: Recipe, folder: Path) -> Method:
    """A method as a run has it before its first update."""
    run = RunDir(str(folder))
    keep_needs(recipe, run)
    torch.manual_seed(0)
    method = build_method(recipe)
    load_needs(method, run)
    return method
