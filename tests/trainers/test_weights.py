"""Weights by any name that a person has for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mimray.trainers.convert import export_timm
from mimray.trainers.errors import BundleError, MissingBundleError
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import keep_needs, load_needs, with_needs
from mimray.trainers.storage import RunDir
from mimray.trainers.weights import fetch_weights
from tests.trainers.methods.initial_cases import donate, recipe_of
from tests.trainers.runs import write_noise


def test_fetch__checkpoints_of_other_libraries_are_imported_on_the_way(tmp_path: Path):
    write_noise(tmp_path / "pictures", 4)
    donor = donate("mae", tmp_path)
    export_timm(tmp_path / "mae" / "bundle", tmp_path / "timm")
    recipe = with_needs(recipe_of("simmim", tmp_path, init=str(tmp_path / "timm")), fetch_weights)
    run = RunDir(str(tmp_path / "run"))
    keep_needs(recipe, run, fetch_weights)
    method = build_method(recipe)

    load_needs(method, run)

    weight = "blocks.1.mlp.fc1.weight"
    assert torch.equal(method.encoder.state_dict()[weight], donor[f"encoder.{weight}"])
    assert len(recipe.method.init_sha256) == 64


def test_fetch__what_holds_no_weights_is_refused_in_a_line(tmp_path: Path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"a": torch.ones(2)}, tmp_path / "odd.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    write_noise(tmp_path / "pictures", 1)
    # Where there are weights, an option of the import may say what they are.
    for name, message, options_help in (
        ("whole.pth", "is a pickle that is not plain tensors", False),
        ("cut.safetensors", "cannot be read", False),
        ("notes.txt", "is no checkpoint: neither safetensors nor a file of torch.save", False),
        ("pictures", "is no model's folder: it needs config.json", False),
        ("odd.safetensors", "these are weights of neither a vit nor a swin", True),
    ):
        with pytest.raises(BundleError, match=message) as refused:
            fetch_weights(str(tmp_path / name))
        assert ("takes further options" in str(refused.value)) == options_help, name
    with pytest.raises(BundleError, match=r"timm cannot give 'no_such_model'.*cache\)$"):
        fetch_weights("timm:no_such_model")
    with pytest.raises(MissingBundleError, match="no bundle at /nowhere, no checkpoint"):
        fetch_weights("/nowhere")
