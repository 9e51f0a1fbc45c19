"""Claim: MAE's training step is no slower than that of transformers' ViTMAE.

    python benchmarks/mae_step.py [--batch 8] [--rounds 5]

ViT-B/16 at 224, forward, backward and fused AdamW in fp32, the two taking turns in one process;
prints the median pictures a second of each and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.methods.catalogue import build_method


def ours(batch: int) -> Callable[[], None]:
    method = build_method(load_recipe("mae-vit-b"))
    return _step(method, lambda images: method(images).loss, batch)


def theirs(batch: int) -> Callable[[], None]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig(norm_pix_loss=True, attn_implementation="sdpa"))
    return _step(model, lambda images: model(pixel_values=images).loss, batch)


def _step(
    model: torch.nn.Module, loss_of: Callable[[torch.Tensor], torch.Tensor], batch: int
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, 3, 224, 224)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(images).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    steps = {"mimray": ours(arguments.batch), "transformers": theirs(arguments.batch)}
    for step in steps.values():
        step()  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    for name, taken in seconds.items():
        print(f"{name:13} {arguments.batch / statistics.median(taken):.2f} images/s (median)")
    ratios = [b / a for a, b in zip(seconds["mimray"], seconds["transformers"], strict=True)]
    print(
        f"mimray is {statistics.median(ratios):.2f} x as fast "
        f"(pairs {min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
