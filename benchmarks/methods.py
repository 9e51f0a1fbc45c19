"""The table of docs/methods.md: cost of each recipe, beside MAE on the same machine.

    python benchmarks/methods.py [--batch 4] [--rounds 3] [--beside RECIPE] [RECIPE…]

Parameters and FLOPs are counted; speed is measured: forward, backward and fused AdamW in fp32,
the recipe and its MAE (mae-vit-b, or mae-tiny for the tiny ones, unless `--beside` names another
recipe) taking turns in one process. Seconds are those of the process, so that other work on the
machine changes little; OMP_NUM_THREADS=1 for one core.
Prints rows of Markdown: encoder and other parameters, forward GFLOPs a picture, and images a
second as a share of MAE's (median of the pairs).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.recipes import load_recipe, shipped_recipes
from mimray.trainers.config.run import Recipe
from mimray.trainers.cost.step import shape_of, trace
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.inputs import placeholders

# The folder of a network that the method needs, and the recipe it is counted by.
NETWORKS = {
    "beit-tiny": ("tokenizer", "dvae-tiny"),
    "beit-vit-b": ("tokenizer", "dvae-vq-8192"),
    "distill-tiny": ("teacher", "mae-tiny"),
    "distill-vit-s": ("teacher", "mae-vit-b"),
}


def recipe_of(name: str) -> Recipe:
    """A shipped recipe, without k-means, for which a small batch has too few encodings.

    A student's head is as wide as the teacher.
    """
    sets = ["method.kmeans_init=false"] if name.startswith("dvae") else []
    if name.startswith("distill"):
        teacher = recipe_of(NETWORKS[name][1])
        sets.append(f"method.teacher_width={teacher.encoder.out_width}")
    return load_recipe(name, sets)


def networks_of(name: str) -> dict[str, BundleCard]:
    """Cards of the untrained networks that a recipe needs, by folder."""
    if name not in NETWORKS:
        return {}
    folder, network = NETWORKS[name]
    recipe = recipe_of(network)
    data = recipe.data
    card = BundleCard(
        name=network,
        encoder=recipe.encoder,
        image_size=data.image_size,
        channels=data.channels,
        mean=data.mean,
        std=data.std,
        method=recipe.method.name,
        recipe=recipe.model_dump(mode="json"),
    )
    return {folder: card}


def step_of(name: str, batch: int) -> Callable[[], None]:
    """Make a function that runs one whole update of a recipe on random pictures."""
    recipe = recipe_of(name)
    torch.manual_seed(0)
    method = build_method(recipe).train()
    for folder, card in networks_of(name).items():
        method.expect(folder, card)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-5, fused=True)
    inputs = placeholders(inputs_of(recipe), recipe, batch, torch.float32)
    for name, tensor in inputs.items():
        if tensor.is_meta:
            values = torch.randint(0, 256, tensor.shape, dtype=torch.uint8)
            inputs[name] = torch.randn(tensor.shape) if tensor.is_floating_point() else values

    def step() -> None:
        optimizer.zero_grad()
        method(**inputs).loss.backward()
        optimizer.step()
        method.after_step(1)

    return step


def counts(name: str) -> tuple[float, float, float]:
    """Millions of parameters of the encoder and of the rest, and forward GFLOPs per picture."""
    recipe = recipe_of(name)
    method = shape_of(recipe, torch.float32, networks_of(name))
    encoder = sum(p.numel() for p in method.encoder.parameters())
    rest = sum(p.numel() for p in method.parameters()) - encoder
    flops = trace(method, 2, checkpointing=False, on_gpu=False).forward_flops
    return encoder / 1e6, rest / 1e6, sum(flops.values()) / 1e9


def speed(name: str, batch: int, rounds: int, beside: str) -> tuple[float, float, float]:
    """Images per second over those of another recipe: median, least and most of the pairs."""
    tiny = name.endswith("-tiny")
    batch *= 8 if tiny else 1
    reference = beside or ("mae-tiny" if tiny else "mae-vit-b")
    if name == reference:
        return 1.0, 1.0, 1.0
    steps = step_of(reference, batch), step_of(name, batch)
    for step in steps:
        step()  # warm up
    ratios = []
    for _ in range(rounds):
        seconds = []
        for step in steps:
            began = time.process_time()
            step()
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=list(shipped_recipes()))
    parser.add_argument("--batch", type=int, default=4, help="pictures; the tiny recipes take 8 x")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", default="", help="recipe to hold the speed against")
    arguments = parser.parse_args()
    print("| recipe | encoder, M | rest, M | GFLOPs a picture | images/s over MAE's |")
    print("|---|---|---|---|---|")
    for name in arguments.recipes:
        encoder, rest, gflops = counts(name)
        ratio, least, most = speed(name, arguments.batch, arguments.rounds, arguments.beside)
        print(
            f"| `{name}` | {encoder:.2f} | {rest:.2f} | {gflops:.3g} "
            f"| {ratio:.2f} ({least:.2f} to {most:.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
