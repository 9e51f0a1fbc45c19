"""`engine.micro_batch_size` and the number of workers change nothing of what is learnt.

Ranks need processes of their own; this file is also what they run.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from mimray.trainers.bundles import BundleCard, save_bundle
from mimray.trainers.config.run import parse_recipe, resolve
from mimray.trainers.data.selection import open_training
from mimray.trainers.engine.deepspeed import prepare_process
from mimray.trainers.engine.export import write_bundle
from mimray.trainers.engine.loop import train
from mimray.trainers.engine.metrics import read_metrics
from mimray.trainers.methods.catalogue import build_method
from mimray.trainers.methods.needs import keep_needs, with_needs
from mimray.trainers.models import build_encoder
from mimray.trainers.storage import RunDir

BATCH, STEPS = 8, 3
VIT = {"name": "vit", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "drop_path": 0.5}
SWIN = {"name": "swin", "width": 8, "depths": [2, 1], "num_heads": [1, 2], "patch_size": 2,
        "window_size": 2, "drop_path": 0.5}  # fmt: skip
CONV = {"name": "conv", "widths": [8, 12], "depth": 1}
BLOCKS = {"min_block_patches": 2, "mask_ratio": 0.5}
DVAE = {"name": "dvae", "codebook_size": 16, "code_dim": 4, "decoder_widths": [12, 8, 8],
        "decoder_blocks": 1}  # fmt: skip
IBOT = {"name": "ibot", "local_px": 8, "head_width": 16, "bottleneck_width": 8,
        "num_prototypes": 12, "momentum": 0.9, "min_std_share": 0}  # fmt: skip
MIXED = {"name": "finetune", "mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "mae": {"encoder": VIT, "method": {"name": "mae", "decoder_width": 16, "decoder_depth": 1,
                                       "decoder_num_heads": 2}},
    "mae-cross": {"encoder": VIT, "method": {"name": "mae", "decoder_width": 16, "decoder_depth": 2,
                                             "decoder_num_heads": 2, "decoder": "cross",
                                             "decode_ratio": 0.5, "encoder_layers": [0, 1]}},
    "simmim": {"encoder": VIT, "method": {"name": "simmim", "mask_unit_px": 8}},
    "maskfeat": {"encoder": VIT, "method": {"name": "maskfeat", "hog_cell_px": 4, **BLOCKS}},
    "beit": {"encoder": VIT, "method": {"name": "beit", "tokenizer_image_size": 16, **BLOCKS}},
    "distill": {"encoder": VIT, "method": {"name": "distill", "teacher_image_size": 24,
                                           "pooled_weight": 0.5, "last_layers": 2, **BLOCKS}},
    "distill-visible": {"encoder": SWIN, "method": {"name": "distill", "predict": "visible",
                                                    "loss": "smooth_l1", **BLOCKS}},
    "ibot": {"encoder": VIT, "method": IBOT | {"num_local": 3}},
    "ibot-sinkhorn": {"encoder": SWIN, "method": IBOT | {
        "pooling": "mean", "shared_head": False, "centring": "sinkhorn", "assignment_group": 4,
        "num_local": 1, "masking": "random"}},
    "ae": {"encoder": CONV, "method": {"name": "ae", "latent_dim": 4,
                                       "decoder_widths": [12, 8, 8]}},
    "vq": {"encoder": CONV, "method": DVAE | {"kmeans_init": True, "ema_decay": 0.9,
                                              "l2_normalize": True, "revive_below_share": 0.3,
                                              "min_usage": 0}},
    "vq-learnt": {"encoder": CONV, "method": DVAE | {"kmeans_init": True, "min_usage": 0}},
    "gumbel": {"encoder": CONV, "method": DVAE | {"quantizer": "gumbel", "kl_weight": 0.1,
                                                  "min_usage": 0}},
    "vae": {"encoder": CONV, "method": {"name": "vae", "latent_dim": 4,
                                        "decoder_widths": [12, 8, 8]}},
    # Fifteen places, which two workers share out unevenly.
    "capi": {"encoder": VIT, "data": {"image_size": [12, 20]},
             "method": {"name": "capi", "num_clusters": 12, "assignment_group": 4,
                        "predict_ratio": 0.5, "momentum": 0.9, "decoder_width": 16,
                        "decoder_depth": 1, "decoder_num_heads": 2}},
    "swin": {"encoder": SWIN, "method": MIXED},
    "finetune": {"encoder": VIT, "method": MIXED, "data": {"random_erasing": 0.5}},
    "finetune-odd": {"encoder": VIT, "method": MIXED, "optim": {"batch_size": 9}},
}  # fmt: skip


def uneven_mask(rng: np.random.Generator, grid: tuple[int, int], **_: Any) -> np.ndarray:
    """A mask in the place of blocks, whose numbers of patches differ little on so small a grid."""
    hidden = np.arange(grid[0] * grid[1]) < rng.integers(1, grid[0] * grid[1])
    found: np.ndarray = rng.permutation(hidden)
    return found


class Nobody:
    """An observer that looks at nothing."""

    def resumed(self, step: int) -> None: ...

    def metrics(self, row: dict[str, Any]) -> None: ...

    def pictures(self, step: int, panels: list[Any]) -> None: ...


def learn(case: str, micro: int, place: Path) -> dict[str, Any]:
    """The rows of metrics and the weights of a short run, in the process group there is."""
    tree = CASES[case]
    tree = {
        "encoder": tree["encoder"],
        "method": dict(tree["method"]),
        "data": {"image_size": 16, "num_workers": 0, **tree.get("data", {})},
        # A large eps, since Adam makes whole steps of the rounding of gradients that are zero.
        "optim": {"batch_size": BATCH, "steps": STEPS, "base_lr": 0.05, "eps": 1e-2,
                  **tree.get("optim", {})},
        "engine": {"zero_stage": 0, "precision": "fp32", "micro_batch_size": micro},
        "logging": {"every_steps": 1, "num_pictures": 1},
    }  # fmt: skip
    if case == "beit":
        tree["method"]["tokenizer"] = str(place / "tokenizer")
    if case.startswith("distill"):
        tree["method"]["teacher"] = str(place / "teacher")
    recipe = with_needs(parse_recipe(tree))
    source = open_training(str(place / "pictures"), recipe)
    if recipe.method.learns_classes:
        method = recipe.method.model_copy(update={"num_classes": 2})
        recipe = recipe.model_copy(update={"method": method})
    plan = resolve(recipe, source.facts, dist.get_world_size())
    run = RunDir(str(place / f"{case}-{micro}-{dist.get_world_size()}"))
    run.create()
    if dist.get_rank() == 0:
        keep_needs(recipe, run)
    dist.barrier()
    with mock.patch("mimray.trainers.methods.draws.block_mask", uneven_mask):
        trained = train(plan, run, source, device=torch.device("cpu"), observer=Nobody())
    assert (micro, plan.accumulation) == (plan.micro_batch_size, plan.global_batch
                                          // micro // plan.world_size)  # fmt: skip
    return {"rows": read_metrics(run), "state": trained.state}


def work(place: Path, rank: int, jobs: list[tuple[str, int]]) -> None:
    """The program of each subprocess."""
    os.environ["LOCAL_RANK"] = str(rank)
    prepare_process(torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    found = {f"{case}-{micro}": learn(case, micro, place) for case, micro in jobs}
    torch.save(found, place / f"found.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of two classes, a tokenizer, and a teacher."""
    place = tmp_path_factory.mktemp("micro")
    for i in range(20):
        folder = place / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((24, 24)).save(folder / f"{i}.png")
    recipe = parse_recipe(
        {"encoder": CONV, "method": DVAE, "data": {"image_size": 16},
         "optim": {"batch_size": BATCH, "steps": 1}}
    )  # fmt: skip
    torch.manual_seed(0)
    plan = resolve(recipe, open_training(str(place / "pictures"), recipe).facts, 1)
    run = RunDir(str(place / "tokenizer"))
    state = {name: value.float() for name, value in build_method(recipe).state_dict().items()}
    write_bundle(run, plan, state, step=1, name="tokenizer", command="test")
    tree = {"name": "t", "encoder": VIT, "image_size": [16, 16], "channels": 3,
            "mean": [0.5] * 3, "std": [0.5] * 3}  # fmt: skip
    card = BundleCard.model_validate(tree)
    encoder = build_encoder(card.encoder, card.image_size, card.channels)
    save_bundle(place / "teacher", card, encoder.state_dict())
    return place


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert len(found["rows"]) == len(wanted["rows"]) == STEPS
    exact = {"samples", "codes_revived", "codebook_usage"}
    for ours, theirs in zip(found["rows"], wanted["rows"], strict=True):
        for key in theirs.keys() - {"images_per_s", "data_wait", "memory_mib", "time"}:
            rel = 0 if key in exact else 2e-5
            assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=1e-6), key
    for name, value in wanted["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole(place: Path, process_group: None) -> Callable[[str], dict[str, Any]]:
    """Runs of a single micro batch a step, by case."""
    known: dict[str, dict[str, Any]] = {}

    def of(case: str) -> dict[str, Any]:
        if case not in known:
            batch = CASES[case].get("optim", {}).get("batch_size", BATCH)
            known[case] = learn(case, batch, place)
            losses = [row["loss"] for row in known[case]["rows"]]
            assert len(set(losses)) == STEPS
        return known[case]

    return of


SIZES = [
    (case, micro)
    for case in CASES
    for micro in (1, 2, 4)
    # A worker's micro batch holds whole assignment groups; two workers share one.
    if case != "finetune-odd" and (case not in ("ibot-sinkhorn", "capi") or micro == 4)
]


@pytest.mark.parametrize(("case", "micro"), [*SIZES, ("finetune-odd", 3), ("finetune-odd", 1)])
def test_micro_batch__changes_nothing(
    case: str, micro: int, place: Path, whole: Callable[[str], dict[str, Any]]
):
    assert_same(learn(case, micro, place), whole(case))


@pytest.fixture(scope="module")
def on_two_ranks(place: Path, run_ranks: Callable[..., None]) -> dict[str, Any]:
    jobs = [(case, 2) for case in CASES if case != "finetune-odd"]
    run_ranks(__file__, place, json.dumps(jobs))
    found: dict[str, Any] = torch.load(place / "found.0")
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case != "finetune-odd"])
def test_workers__change_nothing(
    case: str, on_two_ranks: dict[str, Any], whole: Callable[[str], dict[str, Any]]
):
    assert_same(on_two_ranks[f"{case}-2"], whole(case))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
