"""A tokenizer examined at its end by pictures that it was not trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.assess import assess_method
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.storage import RunDir

DVAE = {"name": "dvae", "codebook_size": 16, "code_dim": 4, "decoder_widths": [12, 8]}
CONV = {"name": "conv", "widths": [8, 12], "depth": 1}


def plan_of(data: Path, method: dict[str, Any]) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": CONV,
            "method": method,
            "data": {"image_size": 16},
            "optim": {"batch_size": 8, "steps": 1},
        }
    )
    return resolve(recipe, open_training(str(data), recipe).facts, 1)


def state_of(plan: Plan) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_method(plan.recipe).state_dict()


def test_tokenizer__is_examined_by_the_validation_split(labelled: Path, tmp_path: Path):
    plan = plan_of(labelled, DVAE)

    figures, warnings = assess_method(plan, state_of(plan))

    # 16 codes x 10 encodings over 4 x 4 places are 10 pictures; the split has 16.
    said = {"pictures": 10, "undecodable": 0, "split": "val", "data": plan.data.uri}
    assert said.items() <= figures.items()
    assert 0 < figures["codebook_usage"] <= 1
    assert 1 <= figures["codebook_perplexity"] <= 16
    card = write_bundle(
        RunDir(str(tmp_path)), plan, state_of(plan), step=1, name="it", command="test"
    )
    assert card.held_out == figures
    assert card.warnings == warnings


def test_tokenizer__of_a_single_code_is_warned_of(labelled: Path):
    plan = plan_of(labelled, DVAE)
    state = state_of(plan)
    # All places have the same encoding.
    state["quantizer.project.weight"] = torch.zeros_like(state["quantizer.project.weight"])

    figures, (usage, perplexity) = assess_method(plan, state)

    assert figures["codebook_usage"] == 1 / 16
    assert figures["codebook_perplexity"] == pytest.approx(1)
    assert usage.startswith("10 pictures of split val: 1 of 16 codes (6.2%) are used")
    assert "perplexity is 1 of 16" in perplexity


def test_tokenizer__without_held_out_pictures_says_which_it_saw(tmp_path: Path):
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    plan = plan_of(tmp_path, DVAE)
    broken = tmp_path / "0.png"
    broken.write_bytes(broken.read_bytes()[:200])

    figures, _ = assess_method(plan, state_of(plan))

    assert figures["split"] == "train"
    assert (figures["pictures"], figures["undecodable"]) == (9, 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_tokenizer__without_a_readable_picture_is_not_examined(
    labelled: Path, split: str, tmp_path: Path
):
    data = Path(shutil.copytree(labelled, tmp_path / "data"))
    if split == "train":
        shutil.rmtree(data / "val")
    plan = plan_of(data, DVAE)
    for file in (data / split).rglob("*.png"):
        file.write_bytes(b"no picture")

    figures, (warning,) = assess_method(plan, state_of(plan))

    assert figures == {}
    assert f"none of the 10 pictures of split {split} of {data} can be decoded" in warning


def test_other_methods__are_not_examined(labelled: Path):
    plan = plan_of(labelled, {"name": "ae", "latent_dim": 4, "decoder_widths": [12, 8]})

    assert assess_method(plan, state_of(plan)) == ({}, ())


def test_data__that_is_gone_is_a_warning(labelled: Path):
    plan = plan_of(labelled, DVAE)
    gone = plan.model_copy(
        update={"data": plan.data.__class__(uri="/nowhere", num_samples=1, fingerprint="f")}
    )

    figures, (warning,) = assess_method(gone, state_of(plan))

    assert figures == {}
    assert "not examined by held-out pictures" in warning
    assert "/nowhere" in warning
