"""What `mimray plan` counts, against closed formulas and against what really runs here.

Memory is measured in processes of their own; this file is also what they run.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.beit import BEiTConfig
from mimray.trainers.config.distill import DistillConfig
from mimray.trainers.config.mae import MAEConfig
from mimray.trainers.config.model import ViTConfig
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, Recipe, resolve
from mimray.trainers.cost import estimate
from mimray.trainers.cost.memory import Setting, Weights, memory_of
from mimray.trainers.cost.step import Step, shape_of, trace
from mimray.trainers.engine.deepspeed import DTYPES, initialize, prepare_process
from mimray.trainers.engine.optim import build_optimizer
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.inputs import placeholders
from mimray.trainers.models.blocks import checkpoint_activations
from mimray.trainers.types import DatasetFacts

TOLERANCE = 0.15
TINY = (
    "ae-tiny", "ae-vit-tiny", "vae-tiny", "dvae-tiny", "beit-tiny", "mae-tiny", "simmim-tiny",
    "simmim-swin-tiny", "maskfeat-tiny", "distill-tiny", "ibot-tiny", "capi-tiny", "mae-cross-tiny",
)  # fmt: skip


def plan_of(name: str, *overrides: str, workers: int = 1) -> Plan:
    return resolve(load_recipe(name, overrides), DatasetFacts("here", 10**7, "f"), workers)


class Codes:
    """A tokenizer that always says 0."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), *self.recipe.grid, dtype=torch.int64)

    def decode_codes(self, codes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def to(self, device: torch.device) -> Codes:
        return self


def card_of(recipe: Recipe) -> BundleCard:
    """The description of an untrained network."""
    data = recipe.data
    return BundleCard(
        name="untrained", encoder=recipe.encoder, image_size=data.image_size,
        channels=data.channels, mean=data.mean, std=data.std, method=recipe.method.name,
        recipe=recipe.model_dump(mode="json"),
    )  # fmt: skip


def networks_of(recipe: Recipe) -> dict[str, BundleCard]:
    """The teacher of a method that wants one; the tokenizer of BEiT costs nothing here."""
    if not isinstance(recipe.method, DistillConfig):
        return {}
    width = f"encoder.width={recipe.method.teacher_width}"
    return {"teacher": card_of(load_recipe("mae-tiny", [width]))}


def real_method(recipe: Recipe) -> Method:
    method = build_method(recipe).train()
    for name, card in networks_of(recipe).items():
        method.expect(name, card)
    if isinstance(recipe.method, BEiTConfig):
        method.attach(Codes(recipe))
    return method


def real_inputs(method: Method, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every input that the method declares, with values."""
    recipe = method.recipe
    shapes = placeholders(inputs_of(recipe), recipe, batch, dtype)
    return {name: with_values(shape) for name, shape in shapes.items()}


def with_values(shape: torch.Tensor) -> torch.Tensor:
    if not shape.is_meta:
        return shape
    if shape.is_floating_point():
        return torch.randn(shape.shape).to(shape.dtype)
    return torch.zeros(shape.shape, dtype=shape.dtype)


# FLOPs


def blocks(depth: int, tokens: int, width: int) -> float:
    """Forward FLOPs of transformer blocks: 12 D^2 of weights, scores and mixing of T x T."""
    return depth * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def attention(depth: int, tokens: int, width: int) -> float:
    return depth * 2 * 2 * tokens**2 * width


@pytest.mark.parametrize(
    ("name", "patches", "patch", "width", "depth", "decoder_width", "decoder_depth"),
    [
        ("mae-tiny", 64, 8, 128, 4, 64, 1),
        ("mae-vit-b", 196, 16, 768, 12, 512, 8),
        ("mae-vit-h", 256, 14, 1280, 32, 512, 8),
    ],
)
def test_flops__of_mae_are_those_of_its_dimensions(
    name: str,
    patches: int,
    patch: int,
    width: int,
    depth: int,
    decoder_width: int,
    decoder_depth: int,
) -> None:
    pixels, visible = 3 * patch**2, patches // 4
    embedding = 2 * visible * pixels * width
    encoder = embedding + blocks(depth, visible + 1, width)
    narrowing = 2 * (visible + 1) * width * decoder_width
    decoder = narrowing + blocks(decoder_depth, patches + 1, decoder_width)
    head = 2 * (patches + 1) * decoder_width * pixels
    forward = encoder + decoder + head
    # Backward is twice forward; pixels want no gradient; fused attention computes scores again.
    again = attention(depth, visible + 1, width)
    again += attention(decoder_depth, patches + 1, decoder_width)
    training = 3 * forward - embedding + again / 2

    step = trace(
        shape_of(load_recipe(name), torch.bfloat16, {}), 2, checkpointing=False, on_gpu=True
    )

    assert step.forward_flops == pytest.approx(
        {"encoder": encoder, "decoder": decoder, "head": head}
    )
    assert step.training_flops == pytest.approx(training)
    assert (step.encoder_tokens, step.decoder_tokens) == (visible + 1, patches + 1)


@pytest.mark.parametrize(("name", "decoded"), [("mae-cross-tiny", 16), ("mae-cross-vit-s", 49)])
def test_flops__of_a_cross_decoder_are_those_of_what_it_decodes(name: str, decoded: int) -> None:
    recipe = load_recipe(name)
    encoder, method = recipe.encoder, recipe.method
    assert isinstance(encoder, ViTConfig)
    assert isinstance(method, MAEConfig)
    width, depth, pixels = method.decoder_width, method.decoder_depth, 3 * encoder.patch_size**2
    seen = recipe.grid[0] * recipe.grid[1] // 4 + 1
    queries = 2 * decoded * 10 * width**2  # to them and from them D^2 each, the MLP 8 D^2
    context = 2 * seen * encoder.width * 2 * width
    mixing = 2 * 2 * decoded * seen * width
    weighing = 2 * depth * len(method.encoder_layers) * seen * encoder.width

    step = trace(shape_of(recipe, torch.bfloat16, {}), 2, checkpointing=False, on_gpu=True)

    expected = depth * (queries + context + mixing) + weighing
    assert step.forward_flops["decoder"] == pytest.approx(expected)
    assert step.forward_flops["head"] == pytest.approx(2 * decoded * width * pixels)
    assert (step.encoder_tokens, step.decoder_tokens) == (seen, decoded)
    whole = load_recipe(name, ["method.decode_ratio=1"])
    all_decoded = trace(shape_of(whole, torch.bfloat16, {}), 2, checkpointing=False, on_gpu=True)
    assert all_decoded.decoder_tokens == 3 * decoded
    assert all_decoded.training_flops > step.training_flops
    assert all_decoded.activations > step.activations


@pytest.mark.parametrize(
    "name",
    [
        "ae-tiny", "dvae-tiny", "beit-tiny", "mae-cross-tiny", "maskfeat-tiny", "distill-tiny",
        "ibot-tiny", "capi-tiny",
    ],
)  # fmt: skip
def test_flops__are_what_the_profiler_sees(name: str) -> None:
    recipe, batch = load_recipe(name), 2
    method = real_method(recipe)
    if name == "dvae-tiny":
        method.quantizer.ready.fill_(1)  # k-means happens once
    inputs = real_inputs(method, batch, torch.float32)
    # It knows neither the fused attention of CPUs nor the backward of convolutions.
    with (
        sdpa_kernel(SDPBackend.MATH),
        profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen,
    ):
        loss = method(**inputs).loss
    measured = sum(event.flops for event in seen.key_averages()) / batch

    shape = shape_of(recipe, torch.float32, networks_of(recipe))
    step = trace(shape, batch, checkpointing=False, on_gpu=False)

    assert loss.isfinite()
    assert sum(step.forward_flops.values()) == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("mae-tiny", False), ("simmim-tiny", True), ("simmim-swin-tiny", True)],
)
def test_flops__of_training_are_what_the_profiler_sees(name: str, checkpointing: bool) -> None:
    recipe, batch = load_recipe(name), 2
    method = real_method(recipe)
    checkpoint_activations(method, checkpointing)
    inputs = real_inputs(method, batch, torch.float32)
    with (
        sdpa_kernel(SDPBackend.MATH),
        profile(activities=[ProfilerActivity.CPU], with_flops=True) as seen,
    ):
        method(**inputs).loss.backward()
    measured = sum(event.flops for event in seen.key_averages()) / batch

    step = trace(
        shape_of(recipe, torch.float32, {}), batch, checkpointing=checkpointing, on_gpu=False
    )

    assert step.training_flops == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["mae-tiny", "vae-tiny", "simmim-swin-tiny"])
def test_parts__hold_every_parameter_once(name: str) -> None:
    plan = plan_of(name, "optim.batch_size=2")
    counted = estimate(plan, "fp32", on_gpu=False).parameters
    real = build_method(plan.recipe)
    assert sum(counted.values()) == sum(p.numel() for p in real.parameters())
    assert counted["encoder"] == sum(p.numel() for p in real.encoder.parameters())


def test_tokenizer__is_counted_apart() -> None:
    plan, tokenizer = plan_of("beit-tiny", "optim.batch_size=2"), load_recipe("dvae-tiny")
    without, counted = (
        estimate(plan, "bf16"),
        estimate(plan, "bf16", networks={"tokenizer": card_of(tokenizer)}),
    )

    alone = build_method(tokenizer)
    assert counted.parameters["tokenizer"] == sum(p.numel() for p in alone.parameters())
    assert counted.parameters["encoder"] == without.parameters["encoder"]
    extra = counted.plain.forward_flops["tokenizer"]
    assert extra > 0
    # It is not trained: its forward pass is all that it adds.
    assert counted.plain.training_flops - without.plain.training_flops == pytest.approx(extra)
    in_fp32 = sum(t.nbytes for t in [*alone.parameters(), *alone.buffers()])
    added = counted.memory[0, False].parameters - without.memory[0, False].parameters
    assert added == in_fp32


# Memory


@pytest.mark.parametrize(("stage", "bytes_each"), [(0, 16), (1, 4 + 12 / 8), (2, 2 + 14 / 8)])
def test_memory__of_bf16_states_is_that_of_the_zero_paper(stage: int, bytes_each: float) -> None:
    """Rajbhandari et al. 2020, sec. 3.1 and 5: 2 + 2 + 12 bytes a parameter, over 8 devices."""
    weights = Weights(trained=8_000_000, frozen=0, small=0, fixed_bytes=0)
    step = Step({}, 0.0, 0, 0, activations=10**9, with_gradients=10**9)
    memory = memory_of(weights, step, Setting(stage, num_workers=8, element_bytes=2))

    held = memory.parameters + memory.gradients + memory.optimizer
    assert held == pytest.approx(weights.trained * bytes_each)


def test_memory__of_zero_3_is_a_share_and_the_bucket() -> None:
    weights = Weights(trained=8_000_000, frozen=0, small=0, fixed_bytes=0)
    step = Step({}, 0.0, 0, 0, activations=10**9, with_gradients=10**9)
    memory = memory_of(weights, step, Setting(3, num_workers=8, element_bytes=2))

    assert memory.parameters + memory.gradients + memory.optimizer == weights.trained * 16 // 8
    gathered = weights.trained * 2
    assert memory.communication == 500_000_000 * 2 + gathered
    assert memory.peak == weights.trained * 2 + 500_000_000 * 2 + gathered + 10**9


def test_memory__of_autocast_is_that_of_fp32_weights_and_their_copies() -> None:
    plan = plan_of("simmim-vit-b", "optim.batch_size=16")
    plain, autocast, half = (estimate(plan, p) for p in ("fp32", "bf16", "bf16_weights"))
    for stage in (0, 1, 2, 3):
        a, b = plain.memory[stage, False], autocast.memory[stage, False]
        states = ("parameters", "optimizer", "gradients", "communication")
        assert [getattr(b, s) for s in states] == [getattr(a, s) for s in states], stage
    matrices = plain.trained * 0.99  # beside biases and norms
    # At one picture a copy of the weights outweighs what is saved.
    one = estimate(plan_of("simmim-vit-b", "optim.batch_size=1"), "bf16").plain.activations
    assert one > 2 * matrices
    assert half.plain.activations + 2 * matrices < autocast.plain.activations
    assert autocast.plain.activations < plain.plain.activations + 2 * matrices
    # A block's copies live as long as the block, where it is computed again.
    saved = autocast.plain.activations - autocast.checkpointed.activations
    assert saved > plain.plain.activations - plain.checkpointed.activations - 10**9


def test_memory__of_autocast_leaves_alone_what_a_method_does() -> None:
    """The tokenizer of BEiT is fp32 at any precision: no copies of its weights."""
    plan, tokenizer = plan_of("beit-tiny", "optim.batch_size=2"), load_recipe("dvae-tiny")

    method = shape_of(plan.recipe, torch.float32, {"tokenizer": card_of(tokenizer)})
    seen: list[torch.dtype] = []
    for part in method.parts()["tokenizer"]:
        for module in part.modules():
            module.register_forward_hook(
                lambda *a: seen.extend(t.dtype for t in a[2:] if isinstance(t, torch.Tensor))
            )
    step = trace(method, 2, checkpointing=False, on_gpu=True, autocast=torch.bfloat16)

    assert set(seen) == {torch.float32}
    plain = trace(method, 2, checkpointing=False, on_gpu=True)
    assert step.forward_flops == plain.forward_flops


@pytest.mark.parametrize(
    ("stage", "offload", "host_each"),
    [(1, "optimizer", 20 / 8), (2, "optimizer", 20 / 8), (3, "optimizer", 20 / 8), (3, "all", 3)],
)
def test_memory__offloaded_is_the_hosts(stage: int, offload: str, host_each: float) -> None:
    weights = Weights(trained=8_000_000, frozen=0, small=0, fixed_bytes=0)
    step = Step({}, 0.0, 0, 0, activations=10**9, with_gradients=10**9)
    setting = Setting(stage, num_workers=8, element_bytes=4)
    here, away = (memory_of(weights, step, replace(setting, offload=o)) for o in ("none", offload))

    assert here.host == 0
    # Masters, moments, fp32 gradients, updated weights on their way; and the weights' shards.
    assert away.host == weights.trained * host_each
    assert away.optimizer == 0
    assert away.peak < here.peak
    on_cpu = memory_of(weights, step, replace(setting, offload=offload, on_gpu=False))
    assert on_cpu.host == 0  # one memory
    assert on_cpu.optimizer > here.optimizer


def test_memory__checkpointing_trades_flops_for_it() -> None:
    cost = estimate(plan_of("simmim-vit-b"), "bf16")

    assert cost.checkpointed.activations < 0.25 * cost.plain.activations
    forward = sum(cost.plain.forward_flops.values())
    extra = cost.checkpointed.training_flops - cost.plain.training_flops
    assert extra == pytest.approx(forward, rel=0.02)


@dataclass(frozen=True)
class Case:
    """A few steps to take and measure; `zero_stage` None: without DeepSpeed."""

    name: str
    overrides: tuple[str, ...]
    zero_stage: int | None
    checkpointing: bool = False
    precision: str = "fp32"


def peak_of(case: Case) -> dict[str, int]:
    """The most memory this process had while training, beyond what it began with."""
    workers = 1 if case.zero_stage is None else dist.get_world_size()
    extra = (
        f"engine.zero_stage={case.zero_stage or 0}",
        f"engine.activation_checkpointing={case.checkpointing}",
    )
    plan = plan_of(case.name, *case.overrides, *extra, workers=workers)
    networks = networks_of(plan.recipe)
    cost = estimate(plan, case.precision, on_gpu=False, networks=networks)
    gc.collect()
    before = resident("VmRSS")
    torch.manual_seed(0)
    method = real_method(plan.recipe)
    checkpoint_activations(method, case.checkpointing)
    train = plainly if case.zero_stage is None else with_deepspeed
    train(method, plan, case.precision)
    return {
        "measured": resident("VmHWM") - before,
        "predicted": cost.memory[case.zero_stage or 0, case.checkpointing].peak,
    }


def plainly(method: Method, plan: Plan, precision: str) -> None:
    optimizer = build_optimizer(method, plan.recipe.optim)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    for _ in range(2):
        output = method(**real_inputs(method, plan.micro_batch_size, DTYPES[precision]))
        output.loss.backward()  # what was predicted lives on, as in the loop
        optimizer.step()
        optimizer.zero_grad()


def with_deepspeed(method: Method, plan: Plan, precision: str) -> None:
    engine = initialize(method, plan, precision)
    Path("/proc/self/clear_refs").write_text("5")
    for step in range(3):  # ZeRO 3 knows after the first what to keep gathered
        engine.module.at_step(step, plan.steps)
        for _ in range(plan.accumulation):
            inputs = real_inputs(engine.module, plan.micro_batch_size, DTYPES[precision])
            output = engine(**inputs)
            engine.backward(output.loss)  # what was predicted lives on, as in the loop
            engine.step()
    engine.destroy()


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def measure(out: str, rank: str, workers: str, cases: str) -> None:
    """What the processes do; a small case first, as libraries keep what they need once."""
    found = [Case(**case) for case in json.loads(cases)]
    if any(case.zero_stage is not None for case in found):
        os.environ["LOCAL_RANK"] = rank
        prepare_process(torch.device("cpu"))
        dist.init_process_group(
            "gloo", init_method=f"file://{out}.meeting", rank=int(rank), world_size=int(workers)
        )
    peak_of(replace(found[0], overrides=(*found[0].overrides, "optim.batch_size=8")))
    peaks = [peak_of(case) for case in found]
    if rank == "0":
        Path(out).write_text(json.dumps(peaks))
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an orderly end


def measured_peaks(out: Path, workers: int, cases: list[Case]) -> list[dict[str, int]]:
    # Freed memory goes back at once, so that the resident peak is that of what was held.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    arguments = [str(workers), json.dumps([asdict(case) for case in cases])]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(out), str(rank), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for rank in range(workers)
    ]  # fmt: skip
    try:
        for process in processes:
            said, _ = process.communicate(timeout=800)
            assert process.returncode == 0, said[-4000:]
    finally:
        for process in processes:
            process.kill()
    peaks: list[dict[str, int]] = json.loads(out.read_text())
    return peaks


def check(cases: list[Case], out: Path, workers: int = 1) -> None:
    peaks = measured_peaks(out, workers, cases)
    for case, peak in zip(cases, peaks, strict=True):
        ratio = peak["measured"] / peak["predicted"]
        print(f"{ratio:.3f} of {peak['predicted'] / 2**20:.0f} MiB: {case}, {workers} workers")
        assert math.isclose(ratio, 1, abs_tol=TOLERANCE), (case, peak)


WIDE = ("encoder.width=256", "encoder.depth=6", "encoder.num_heads=4")
WIDER = ("encoder.width=512", "encoder.depth=6", "encoder.num_heads=8")
MANY = (*WIDE, "optim.batch_size=128")


def test_memory__is_what_a_training_step_takes(tmp_path: Path) -> None:
    cases = [Case("mae-tiny", MANY, None, again) for again in (False, True)]
    check(cases, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_memory__is_what_any_method_takes(name: str, tmp_path: Path) -> None:
    # A small batch comes first (`measure`), which the groups must divide.
    groups = ("method.assignment_group=8",) if name in ("capi-tiny", "ibot-tiny") else ()
    overrides = ("optim.batch_size=48", *groups)
    cases = [Case(name, overrides, 1, again) for again in (False, True)]
    check(cases, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_memory__is_what_two_workers_take(zero_stage: int, tmp_path: Path) -> None:
    few = (*WIDER, "optim.batch_size=4")  # parameters weigh more than activations
    halves = (*WIDE, "optim.batch_size=32", "engine.micro_batch_size=8")
    cases = [Case("mae-tiny", overrides, zero_stage) for overrides in (MANY, few, halves)]
    check(cases, tmp_path / "out", workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_memory__is_what_two_workers_take_in_bf16(zero_stage: int, tmp_path: Path) -> None:
    few = (*WIDER, "optim.batch_size=4")  # hundreds of times slower than fp32 on most CPUs
    halves = (*few, "engine.micro_batch_size=1")
    cases = [Case("mae-tiny", o, zero_stage, precision="bf16") for o in (few, halves)]
    check(cases, tmp_path / "out", workers=2)


if __name__ == "__main__":
    measure(*sys.argv[1:])
