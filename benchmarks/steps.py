"""Claim: a training step is no slower here than where people otherwise take it from.

    python benchmarks/steps.py [--only mae,memory,…] [--batch 8] [--rounds 5] [--json FILE]

A step is forward, backward and fused AdamW in fp32 on random pictures of 224 pixels, by one thread
of a CPU. The ways of a part take turns in one process; seconds are those of the process, so that
other work on the machine changes little. Parts:

- `mae`: ViT-B/16 here, in transformers (SDPA), and in lightly on timm where that is installed.
- `simmim`: ViT-B/16 here, in transformers' shape and in the recipe's, and in transformers, which
  has neither relative positions nor layer scale nor drop path.
- `beit`: ViT-B/16 here and in transformers, both with random codes in place of a tokenizer's.
- `ibot`, `maskfeat`: ours alone; iBOT's step has the teacher follow.
- `cross`: MAE with the cross decoder of `mae-cross-vit-b` beside that of `mae-vit-b`.
- `visible`: forward and backward of MAE's encoder alone, of the visible quarter and of all patches.
- `memory`: resident memory of a step of `mae` at batch 16, each way in a process of its own:
  the peak over two steps, and its growth since model and optimiser were made, with and without
  activation checkpointing.

Beside images a second stand the FLOPs of forward and backward, counted with attention in parts,
and the share of this machine's own product of 2048 x 2048 matrices that a step reaches, which is
measured before and after every step. It is no upper bound: products of other shapes may be faster.
Figures are medians, ratios those of one round, with the least and the most.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zero_memory import ALLOCATOR, resident_mib

SIZE, NUM_PATCHES, NUM_CODES = 224, 196, 8192
MEMORY_BATCH = 16
PRODUCT, PRODUCTS = 2048, 5
# The encoder of transformers' ViTForMaskedImageModeling.
PLAIN = ("encoder.positions=learned", "encoder.rel_pos_bias=none", "encoder.layer_scale=null",
         "encoder.drop_path=0")  # fmt: skip

Step = Callable[[], None]


class Model(NamedTuple):
    """A network and the loss of one batch that it holds.

    Attributes:
        module: the network.
        loss: computes the loss.
    """

    module: nn.Module
    loss: Callable[[], Any]


class Figures(NamedTuple):
    """Figures of one way.

    Attributes:
        gflop: GFLOP a picture, forward and backward.
        images_per_s: of each round.
        share: of each round, FLOP/s over those of a matrix product just then.
    """

    gflop: float
    images_per_s: list[float]
    share: list[float]


class RandomCodes:
    """A stand-in for a tokenizer, whose codes are random and cost nothing.

    Attributes:
        recipe: the recipe whose normalisation the tokenizer shares.
    """

    def __init__(self, recipe: Any, batch: int) -> None:
        self.recipe = recipe
        self.given: Tensor = torch.unflatten(random_codes(batch), 1, recipe.grid)

    def codes(self, images: Tensor) -> Tensor:
        """Codes int64 [B, h, w], whatever the pictures."""
        return self.given

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Refuse: no training step decodes codes."""
        raise NotImplementedError

    def to(self, device: torch.device) -> RandomCodes:
        """Stay on the CPU."""
        return self


# --- models; libraries are imported where they are used, since `memory` counts them --------------


def ours(recipe_name: str, batch: int, *sets: str) -> Model:
    from mimray.trainers.config.recipes import load_recipe
    from mimray.trainers.methods.beit import BEiT
    from mimray.trainers.methods.catalogue import build_method

    recipe = load_recipe(recipe_name, sets)
    method = build_method(recipe).train()
    if isinstance(method, BEiT):
        method.attach(RandomCodes(recipe, batch))
    inputs = inputs_for(recipe, batch)
    return Model(method, lambda: method(**inputs).loss)


def inputs_for(recipe: Any, batch: int) -> dict[str, Tensor]:
    """Random pictures, and masks as the recipe draws them."""
    from mimray.trainers.methods.catalogue import inputs_of
    from mimray.trainers.methods.inputs import placeholders

    inputs = placeholders(inputs_of(recipe), recipe, batch, torch.float32)
    for name, value in inputs.items():
        if value.is_meta:
            pixels = torch.randint(0, 256, value.shape, dtype=torch.uint8)
            inputs[name] = torch.randn(value.shape) if value.is_floating_point() else pixels
    return inputs


def checkpointed(batch: int) -> Model:
    from mimray.trainers.models.blocks import checkpoint_activations

    model = ours("mae-vit-b", batch)
    checkpoint_activations(model.module)
    return model


def transformers_mae(batch: int, checkpointing: bool = False) -> Model:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(norm_pix_loss=True, attn_implementation="sdpa")
    model: Any = ViTMAEForPreTraining(config).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    images = torch.randn(batch, 3, SIZE, SIZE)
    return Model(model, lambda: model(pixel_values=images).loss)


def transformers_simmim(batch: int) -> Model:
    from transformers import ViTConfig, ViTForMaskedImageModeling

    model: Any = ViTForMaskedImageModeling(ViTConfig(attn_implementation="sdpa")).train()
    images, mask = given("simmim-vit-b", batch)
    return Model(model, lambda: model(pixel_values=images, bool_masked_pos=mask).loss)


def transformers_beit(batch: int) -> Model:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        vocab_size=NUM_CODES, use_mask_token=True, use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1, drop_path_rate=0.1, attn_implementation="sdpa",
    )  # fmt: skip
    model: Any = BeitForMaskedImageModeling(config).train()
    images, mask = given("beit-vit-b", batch)
    labels = random_codes(batch)[mask]
    return Model(
        model, lambda: model(pixel_values=images, bool_masked_pos=mask, labels=labels).loss
    )


def given(recipe_name: str, batch: int) -> tuple[Tensor, Tensor]:
    """The pictures and masks of a recipe."""
    from mimray.trainers.config.recipes import load_recipe

    inputs = inputs_for(load_recipe(recipe_name), batch)
    return inputs["images"], inputs["mask"]


def random_codes(batch: int) -> Tensor:
    """Codes int64 [B, N], always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, NUM_CODES, (batch, NUM_PATCHES), generator=generator)


class LightlyMAE(nn.Module):
    """MAE of lightly's parts, put together as in its documentation, with the paper's decoder."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        import timm

        parts: Any = importlib.import_module("lightly.models.modules")
        self.utils: Any = importlib.import_module("lightly.models.utils")
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        self.encoder = parts.MaskedVisionTransformerTIMM(vit=vit)
        self.embed = nn.Linear(768, width)
        self.decoder = parts.MaskedVisionTransformerDecoderTIMM(
            num_patches=NUM_PATCHES, embed_dim=width, depth=8, num_heads=16
        )
        self.pred = nn.Linear(width, 3 * 16**2)

    def forward(self, images: Tensor) -> Tensor:
        """The loss of a batch."""
        utils, size = self.utils, (len(images), NUM_PATCHES + 1)
        keep, hide = utils.random_token_mask(size=size, mask_ratio=0.75)
        tokens = self.embed(self.encoder.encode(images=images, idx_keep=keep))
        full = utils.set_at_index(utils.repeat_token(self.decoder.mask_token, size), keep, tokens)
        prediction = self.pred(utils.get_at_index(self.decoder(full), hide))
        patches = utils.get_at_index(utils.patchify(images, 16), hide - 1)
        return nn.functional.mse_loss(prediction, utils.normalize_mean_var(patches))


def lightly_mae(batch: int) -> Model:
    model = LightlyMAE().train()
    images = torch.randn(batch, 3, SIZE, SIZE)
    return Model(model, lambda: model(images))


def has_lightly() -> bool:
    if importlib.util.find_spec("lightly"):
        return True
    print("  lightly is skipped: it is not installed")
    return False


# --- time ----------------------------------------------------------------------------------------


def training_step(model: Model) -> Step:
    """A function that makes one whole update."""
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-4, fused=True)
    averages: Any = getattr(model.module, "averages", None)

    def step() -> None:
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        if averages is not None:
            weights = model.module.named_parameters()
            averages.update(((n, w.detach()) for n, w in weights if averages.follows(n)), 0.9995)

    return step


def encoder_steps(batch: int) -> dict[str, Step]:
    """Forward and backward of MAE's encoder, of visible patches and of all."""
    from mimray.trainers.config.recipes import load_recipe

    encoder: Any = ours("mae-vit-b", batch).module.get_submodule("encoder")
    inputs = inputs_for(load_recipe("mae-vit-b"), batch)

    def step(mask: Tensor | None) -> Step:
        shape = encoder(inputs["images"], mask).tokens.shape
        gradient = torch.randn(shape)

        def run() -> None:
            encoder.zero_grad()
            encoder(inputs["images"], mask).tokens.backward(gradient)

        return run

    return {"a quarter of the patches": step(inputs["mask"]), "all patches": step(None)}


def steps_of(part: str, batch: int) -> dict[str, Step]:
    """The ways of a part."""
    torch.manual_seed(0)
    if part == "visible":
        return encoder_steps(batch)
    if part == "mae":
        models = {"mimray": ours("mae-vit-b", batch), "transformers": transformers_mae(batch)}
        if has_lightly():
            models["lightly"] = lightly_mae(batch)
    elif part == "simmim":
        models = {
            "mimray, plain ViT": ours("simmim-vit-b", batch, *PLAIN),
            "transformers": transformers_simmim(batch),
            "mimray, the recipe": ours("simmim-vit-b", batch),
        }
    elif part == "beit":
        models = {"mimray": ours("beit-vit-b", batch), "transformers": transformers_beit(batch)}
    elif part == "cross":
        models = {
            "decoder=cross": ours("mae-cross-vit-b", batch),
            "decoder=self": ours("mae-vit-b", batch),
        }
    else:
        models = {"mimray": ours({"ibot": "ibot-vit-s", "maskfeat": "maskfeat-vit-b"}[part], batch)}
    return {name: training_step(model) for name, model in models.items()}


def counted_gflop(step: Step) -> float:
    """GFLOP of a step; torch has no formula for the fused attention of CPUs."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops() / 1e9


def seconds(step: Step) -> float:
    """Seconds of the process in a step."""
    began = time.process_time()
    step()
    return time.process_time() - began


def measured(part: str, batch: int, rounds: int) -> tuple[dict[str, Figures], list[float]]:
    """Measure the ways of a part in turns.

    Returns:
        The figures by way, and GFLOP/s of a matrix product before and after every step.
    """
    ways, left, right = steps_of(part, batch), *torch.randn(2, PRODUCT, PRODUCT)

    def product() -> None:
        for _ in range(PRODUCTS):
            torch.mm(left, right)

    found = {name: Figures(counted_gflop(step) / batch, [], []) for name, step in ways.items()}
    for step in (product, *ways.values()):
        step()  # warm up
    product_gflop = PRODUCTS * 2 * PRODUCT**3 / 1e9
    speeds = [product_gflop / seconds(product)]
    for _ in range(rounds):
        for name, step in ways.items():
            figures, rate = found[name], batch / seconds(step)
            speeds.append(product_gflop / seconds(product))
            figures.images_per_s.append(rate)
            figures.share.append(rate * figures.gflop / statistics.mean(speeds[-2:]))
    return found, speeds


def spread(values: list[float], form: str) -> str:
    """The median, with the least and the most."""
    middle, *ends = (format(v, form) for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({ends[0]} to {ends[1]})"


def show(found: dict[str, Figures], speeds: list[float]) -> None:
    """Print a part; ratios are of its first way over the others."""
    first, *_ = found
    print(f"  torch.mm {spread(speeds, '.1f')} GFLOP/s")
    for name, figures in found.items():
        ratios = [
            a / b for a, b in zip(found[first].images_per_s, figures.images_per_s, strict=True)
        ]
        beside = "" if name == first else f"; {first} is {spread(ratios, '.2f')} x as fast"
        print(
            f"  {name:24} {spread(figures.images_per_s, '.3f')} images/s, {figures.gflop:.1f} "
            f"GFLOP a picture, {spread(figures.share, '.1%')} of torch.mm{beside}",
            flush=True,
        )


# --- memory --------------------------------------------------------------------------------------

MEMORY_WAYS: dict[str, Callable[[int], Model]] = {
    "mimray": lambda batch: ours("mae-vit-b", batch),
    "mimray, checkpointing": checkpointed,
    "transformers": transformers_mae,
    "transformers, checkpointing": lambda batch: transformers_mae(batch, checkpointing=True),
    "lightly": lightly_mae,
}


def memory_of(name: str) -> dict[str, float]:
    """Resident memory of this process before and in two steps, MiB."""
    torch.manual_seed(0)
    step = training_step(MEMORY_WAYS[name](MEMORY_BATCH))
    gc.collect()
    before = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    step()
    step()
    peak = resident_mib("VmHWM")
    return {"before_mib": before, "growth_mib": peak - before, "peak_mib": peak}


def memory() -> dict[str, dict[str, float]]:
    """Measure each way in a process of its own, and print it.

    It is not `ru_maxrss`, which begins with the peak of the process that started this one.
    """
    rows = {}
    for name in MEMORY_WAYS:
        if name == "lightly" and not has_lightly():
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", name], check=True, text=True,
            stdout=subprocess.PIPE, env={**os.environ, **ALLOCATOR},
        )  # fmt: skip
        row = rows[name] = json.loads(done.stdout.splitlines()[-1])
        ratio = rows["mimray"]["growth_mib"] / row["growth_mib"]
        beside = "" if name == "mimray" else f"; mimray grows {ratio:.2f} x as much"
        print(
            f"  {name:28} grows by {row['growth_mib']:,.0f} MiB to {row['peak_mib']:,.0f} "
            f"MiB{beside}",
            flush=True,
        )
    return rows


PARTS = ("mae", "simmim", "beit", "ibot", "maskfeat", "cross", "visible", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--memory-of", choices=MEMORY_WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of)))
        return
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    batch, rounds = arguments.batch, arguments.rounds
    figures: dict[str, Any] = {}
    for part in parts:
        print(f"{part}, batch {MEMORY_BATCH if part == 'memory' else batch}:", flush=True)
        if part == "memory":
            figures[part] = memory()
            continue
        found, speeds = measured(part, batch, rounds)
        show(found, speeds)
        figures[part] = {name: way._asdict() for name, way in found.items()}
        figures[part]["torch.mm"] = {"gflop_per_s": speeds}
        gc.collect()
    if arguments.json:
        whole = {"batch": batch, "rounds": rounds, "torch": torch.__version__, "parts": figures}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
