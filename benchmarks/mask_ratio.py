"""Claim: on visible tokens the encoder's training step speeds up as token counts predict.

    python benchmarks/mask_ratio.py [--batch 8] [--rounds 5] [--encoder vit_base]

ViT-B/16 at 224, forward and backward of the encoder in fp32, on the visible tokens at each mask
ratio and on the full sequence, taking turns in one process. Prints the speed-up of each (median of
the rounds' ratios), beside two bounds: the ratio of sequence lengths, and the ratio of FLOPs, where
attention counts with the square of the length. The often-quoted table says 1x, 2x, 4x and 10x.
"""

from __future__ import annotations

import argparse
import statistics

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Recipe
from mimray.tuning.report.speed import QUOTED, encoder_seconds, token_bound


def bounds(recipe: Recipe, mask_ratio: float) -> tuple[float, float]:
    """Ratios of sequence length and of FLOPs, full over visible; class token included."""
    encoder, n = recipe.encoder, recipe.grid[0] * recipe.grid[1]
    width, patch = encoder.out_width, encoder.stride**2 * 3

    def flops(patches: int) -> float:
        tokens = patches + 1
        # qkv, projection and MLP: 12 D^2 a token; scores and mixing: 2 T D a token.
        a_block = tokens * (12 * width**2 + 2 * tokens * width)
        return encoder.num_layers * a_block + patches * patch * width

    visible = int(n * (1 - mask_ratio))
    return token_bound(mask_ratio, n), flops(n) / flops(visible)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoder", default="vit_base")
    arguments = parser.parse_args()
    recipe = load_recipe("mae-vit-b", [f"encoder.name={arguments.encoder}"])
    seconds = encoder_seconds(recipe, list(QUOTED), batch=arguments.batch, rounds=arguments.rounds)
    full = arguments.batch / statistics.median(seconds[0.0])
    print(f"{arguments.encoder} at 224, batch {arguments.batch}: full sequence {full:.2f} images/s")
    print("mask ratio  measured            tokens   FLOPs   quoted")
    for ratio, quoted in QUOTED.items():
        pairs = [a / b for a, b in zip(seconds[0.0], seconds[ratio], strict=True)]
        by_tokens, by_flops = bounds(recipe, ratio)
        print(
            f"{ratio:<11g} {statistics.median(pairs):5.2f} ({min(pairs):.2f} to {max(pairs):.2f})"
            f"  {by_tokens:6.2f}  {by_flops:6.2f}  {quoted:6g}"
        )


if __name__ == "__main__":
    main()
