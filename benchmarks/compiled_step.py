"""Claim: `engine.compile` makes a training step faster.

    python benchmarks/compiled_step.py [--rounds 12]

Forward, backward and fused AdamW of MAE, plain and compiled by `compile_blocks`, taking turns in
one process; prints the median of each, the ratio (plain over compiled, above 1 where compiling
pays), and the seconds of the first compiled step. On a GPU it is ViT-B/16 at 224 under bf16 in
seconds; on a CPU `mae-tiny` and four blocks of ViT-S/16 at 224, of one thread, in CPU seconds,
which depend little on other load.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.engine.compiled import compile_blocks
from mimray.trainers.methods.catalogue import build_method

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
CASES = (
    [("mae-vit-b", 256, 224, [])]
    if GPU
    else [("mae-tiny", 64, 64, []), ("mae-vit-s", 8, 224, ["encoder.depth=4"])]
)


def step_of(
    recipe: str, batch: int, size: int, sets: list[str], compiled: bool
) -> Callable[[], None]:
    torch.manual_seed(0)
    method = build_method(load_recipe(recipe, [f"data.image_size={size}", *sets], steps=1))
    method = method.to(DEVICE).train()
    if compiled:
        compile_blocks(method, DEVICE)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, size, size, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            loss = method(images=images).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None]) -> float:
    if GPU:
        torch.cuda.synchronize()
    clock = time.perf_counter if GPU else time.process_time
    began = clock()
    step()
    if GPU:
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    for case in CASES:
        plain, compiled = step_of(*case, compiled=False), step_of(*case, compiled=True)
        began = time.perf_counter()
        compiled()
        first_s = time.perf_counter() - began
        for warm in (plain, compiled, plain, compiled):
            warm()
        pairs = [(timed(plain), timed(compiled)) for _ in range(rounds)]
        ratio = statistics.median(a / b for a, b in pairs)
        a, b = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        print(
            f"{case[0]}, {case[1]} pictures of {case[2]}: {a:.0f} ms plain, {b:.0f} ms compiled, "
            f"ratio {ratio:.3f}; first step {first_s:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
