"""The frozen encoder that a method began with, and the Gram loss that iBOT holds to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.run import Recipe, essential, parse_recipe, resolve
from mimray.trainers.cost.step import shape_of, trace
from mimray.trainers.errors import ConfigError
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.initial import begin
from mimray.trainers.methods.lora import adapt
from mimray.trainers.methods.needs import foresee, with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.types import DatasetFacts

VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "drop_path": 0.2}
IBOT = {"name": "ibot", "num_local": 1, "local_px": 8, "head_width": 16, "bottleneck_width": 8,
        "num_prototypes": 8, "mask_ratio": [0.2, 0.5]}  # fmt: skip


def recipe_of(**changes: Any) -> Recipe:
    tree: dict[str, Any] = {
        "encoder": VIT, "method": IBOT, "data": {"image_size": 16},
        "optim": {"batch_size": 4, "steps": 3},
    }  # fmt: skip
    for section, keys in changes.items():
        tree[section] = {**tree.get(section, {}), **keys}
    return parse_recipe(tree)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A bundle whose weights no initialisation gives."""
    config = recipe_of().encoder
    card = BundleCard(
        name="start", encoder=config, image_size=(16, 16), channels=3, mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )  # fmt: skip
    torch.manual_seed(3)
    state = build_encoder(config, (16, 16), 3).state_dict()
    save_bundle(tmp_path / "start", card, {k: v * 1.5 + 0.01 for k, v in state.items()})
    return tmp_path / "start"


def begun(start: Path, **changes: Any) -> Method:
    """A method as a run has it before its first update."""
    method_keys = {"init": str(start), "gram_weight": 2.0} | changes.pop("method", {})
    recipe = with_needs(recipe_of(method=method_keys, **changes))
    torch.manual_seed(0)
    method = build_method(recipe)
    begin(method, start)
    adapt(method)
    return method.train()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(2, 3, 16, dtype=torch.bool)
    masks[0, :, :5] = masks[1, 1, 7:] = True
    return {
        "images": torch.randn(3, 3, 16, 16, generator=generator), "mask": masks[0],
        "second_images": torch.randn(3, 3, 16, 16, generator=generator), "second_mask": masks[1],
    }  # fmt: skip


def in_fp64(tokens: torch.Tensor) -> np.ndarray:
    rows = tokens.detach().double().numpy()
    rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows @ rows.transpose(0, 2, 1)


def test_start__is_the_weights_begun_with_and_no_part_of_the_method(start: Path):
    method = begun(start)
    assert method.start is not None
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(method.start.state_dict()[name], value), name
    own = {id(p) for p in method.parameters()} | {id(b) for b in method.buffers()}
    assert not own & {id(p) for p in method.start.parameters()}
    assert not [name for name in method.state_dict() if name.startswith("start")]
    assert not any(p.requires_grad for p in method.start.parameters())
    assert not method.start.training  # no drop path, whatever the method's mode


def test_loss__gains_the_weighted_gram_loss_of_both_masked_views(start: Path):
    method, given = begun(start), batch()
    torch.manual_seed(1)
    found = method(**given)

    views = torch.stack([given["images"], given["second_images"]], dim=1).flatten(0, 1)
    hidden = torch.stack([given["mask"], given["second_mask"]], dim=1).flatten(0, 1)
    torch.manual_seed(1)  # drop path's
    tokens = method.encoder(views, hidden, method.mask_token).tokens
    assert method.start is not None
    theirs = method.start(views).tokens
    wanted = ((in_fp64(tokens) - in_fp64(theirs)) ** 2).mean()
    assert found.terms["gram_loss"].item() == pytest.approx(wanted, rel=1e-4)
    parts = found.terms["view_loss"] + found.terms["patch_loss"] + 2.0 * found.terms["gram_loss"]
    torch.testing.assert_close(found.loss, parts)


def test_start__stays_while_the_encoder_learns(start: Path):
    method = begun(start, encoder={"drop_path": 0.0})
    given = batch()
    whole = given | {"mask": torch.zeros_like(given["mask"]),
                     "second_mask": torch.zeros_like(given["mask"])}  # fmt: skip
    assert method(**whole).terms["gram_loss"] == 0
    assert method.start is not None
    before = {k: v.clone() for k, v in method.start.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in method.parameters() if p.requires_grad), lr=0.5)
    method(**given).loss.backward()
    optimizer.step()
    assert method(**whole).terms["gram_loss"] > 0
    assert all(torch.equal(before[k], v) for k, v in method.start.state_dict().items())


def test_start__goes_without_the_adapters_that_change_it(start: Path):
    method = begun(start, lora={"rank": 2})
    assert method.start is not None
    assert any("lora" in name for name in method.encoder.state_dict())
    assert not any("lora" in name for name in method.start.state_dict())


def test_gram__needs_weights_to_begin_with_and_whole_ones():
    with pytest.raises(ConfigError, match=r"ibot holds on to weights to begin with .*--init"):
        with_needs(recipe_of(method={"gram_weight": 1}))
    with pytest.raises(ConfigError, match=r"gram_weight 1 holds on to whole weights .*--partial"):
        recipe_of(method={"gram_weight": 1, "init": "x", "init_partial": True})
    with pytest.raises(ConfigError, match="gram_weight"):
        recipe_of(method={"gram_weight": -1})


def test_gram__without_weight_is_in_no_digest():
    plan = resolve(recipe_of(), DatasetFacts("here", 100, "f"), 1)
    held = recipe_of(method={"gram_weight": 0.5})
    assert "gram_weight" not in essential(recipe_of(method={"gram_weight": 0}))["method"]
    assert resolve(held, plan.data, 1).hash != plan.hash


def test_cost__counts_the_start(start: Path):
    held, _, notes = foresee(recipe_of(method={"gram_weight": 1, "init": str(start)}))
    assert notes == []
    with_start = shape_of(held, torch.float32, {})
    step = trace(with_start, 2, checkpointing=False, on_gpu=True)
    plain = trace(shape_of(recipe_of(), torch.float32, {}), 2, checkpointing=False, on_gpu=True)
    # Two global views go through the start as they go through the teacher.
    assert step.forward_flops["start"] > 0.5 * step.forward_flops["teacher"]
    assert "start" not in plain.forward_flops
    assert step.training_flops - plain.training_flops == pytest.approx(
        step.forward_flops["start"], rel=0.2
    )
