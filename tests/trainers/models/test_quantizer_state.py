"""What a quantizer keeps: in which precision, over a restart, and on two ranks.

Ranks need processes of their own; this file is also what they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimray.trainers.config.dvae import DVAEConfig
from mimray.trainers.data.rng import Stream, generator
from mimray.trainers.models.quantizer import VectorQuantizer

K, D = 12, 5
# Every way a codebook can be kept; all of them at work within a few steps.
KINDS: dict[str, dict[str, Any]] = {
    "ema": {"ema_decay": 0.7},
    "ema-sphere-kmeans": {"ema_decay": 0.7, "l2_normalize": True, "kmeans_init": True},
    "ema-kmeans-revival": {"ema_decay": 0.7, "kmeans_init": True, "revive_below_share": 0.8},
    "ema-sphere-revival": {"ema_decay": 0.7, "l2_normalize": True, "revive_below_share": 0.8},
    "learnt-kmeans-revival": {"kmeans_init": True, "revive_below_share": 0.95},
}


def vq(seed: int = 0, **options: Any) -> VectorQuantizer:
    """A quantizer whose projection changes nothing, so that features are encodings."""
    torch.manual_seed(seed)
    rng = partial(generator, 7, Stream.CODEBOOK)
    config = DVAEConfig(name="dvae", codebook_size=K, code_dim=D, **options)
    quantizer = VectorQuantizer(config, D, rng)
    with torch.no_grad():
        quantizer.project.weight.copy_(torch.eye(D)[:, :, None, None])
        quantizer.project.bias.zero_()
        quantizer.codebook.replace(torch.ones(K, dtype=torch.bool), torch.randn(K, D))
    if options.get("ema_decay"):
        quantizer.moving_sums.copy_(quantizer.table())
    return quantizer


def features(step: int = 0, count: int = 4, size: int = 3) -> Tensor:
    """Around few centres, so that some codes are never near."""
    rng = torch.Generator().manual_seed(step)
    centres = torch.randn(4, D, generator=torch.Generator().manual_seed(99))
    where = torch.randint(0, 4, (count, size, size), generator=rng)
    noise = 0.3 * torch.randn(count, size, size, D, generator=rng)
    return (centres[where] + noise).movedim(3, 1)  # B D h w


@pytest.mark.parametrize("kind", KINDS)
def test_buffers__stay_in_fp32_when_the_module_is_cast(kind: str):
    quantizer = vq(**KINDS[kind]).train()
    quantizer(features())
    quantizer.after_step(1)
    before = {k: v.clone() for k, v in quantizer.named_buffers()}

    half = nn.Sequential(quantizer).bfloat16()[0]

    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    after = dict(half.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())
    out = half(features().bfloat16())
    assert out.latent.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert half.to("meta").uses.device.type == "meta"


def run(quantizer: VectorQuantizer, first: int, last: int, share: slice = slice(None)) -> Any:
    """Steps of plain gradient descent on the codebook; what `after_step` said."""
    quantizer.train()
    said = []
    for step in range(first, last):
        quantizer(features(step)[share]).loss.backward()
        learnt = quantizer.codebook.learnt
        if learnt is not None:
            gradient = learnt.grad
            if dist.is_initialized():
                dist.all_reduce(gradient)
                gradient /= dist.get_world_size()
            learnt.data -= 5 * gradient
            learnt.grad = None
        said.append(quantizer.after_step(step + 1))
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_state__continues_bit_for_bit_in_the_middle_of_a_window(kind: str):
    options = {**KINDS[kind], "usage_window_steps": 3}
    whole, began, continued = vq(**options), vq(**options), vq(seed=1, **options)
    said = run(whole, 0, 8)

    said_before = run(began, 0, 4)
    state = {k: v.float().clone() for k, v in began.state_dict().items()}
    continued.load_state_dict(state)
    said_after = run(continued, 4, 8)

    assert said_before + said_after == said
    for name, value in whole.state_dict().items():
        assert torch.equal(continued.state_dict()[name], value), name


@pytest.mark.parametrize("kind", ["ema", "ema-sphere-revival"])
def test_micro_batches__change_nothing(kind: str):
    whole, parts = vq(**KINDS[kind]).train(), vq(**KINDS[kind]).train()

    for step in range(5):
        whole(features(step))
        for micro in features(step).chunk(4):
            parts(micro)
        ours, theirs = parts.after_step(step + 1), whole.after_step(step + 1)
        assert ours == pytest.approx(theirs, rel=1e-6)

    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=0, atol=1e-5, msg=name)


# Ranks


def final_state(kind: str, share: slice) -> dict[str, Any]:
    quantizer = vq(**KINDS[kind])
    said = run(quantizer, 0, 5, share)
    return {"said": said, **quantizer.state_dict()}


def work(out: Path, rank: int) -> None:
    """The program of each subprocess."""
    dist.init_process_group("gloo", init_method=f"file://{out}.meeting", rank=rank, world_size=2)
    share = slice(2 * rank, 2 * rank + 2)
    torch.save({kind: final_state(kind, share) for kind in KINDS}, f"{out}.{rank}")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


@pytest.fixture(scope="module")
def on_two_ranks(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., None]
) -> list[dict[str, Any]]:
    """By rank and kind."""
    out = tmp_path_factory.mktemp("ranks") / "out"
    run_ranks(__file__, out)
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks__agree_with_each_other_and_with_one(kind: str, on_two_ranks: list[dict[str, Any]]):
    one = final_state(kind, slice(None))
    first, second = (found[kind] for found in on_two_ranks)

    assert first.keys() == one.keys()
    assert first["said"] == second["said"]
    for ours, alone in zip(first.pop("said"), one.pop("said"), strict=True):
        assert ours == pytest.approx(alone, rel=1e-6)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5, msg=name)


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
