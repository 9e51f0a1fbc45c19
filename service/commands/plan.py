"""`mimray plan`: a forecast of a recipe's cost, counted before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mimray.service.commands.places import with_places
from mimray.service.terminal.console import as_text
from mimray.service.terminal.forecast import Forecast, forecast_view
from mimray.trainers.config.advice import advice
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, Recipe, resolve
from mimray.trainers.types import DatasetFacts

if TYPE_CHECKING:
    from mimray.trainers.cost import Cost

IMAGENET = DatasetFacts(uri="ImageNet-1k", num_samples=1_281_167, fingerprint="assumed")
IMAGENET_CLASSES = 1000

# Peak TFLOP/s of an A100 by precision; fp32 without TF32, which is torch's default.
A100_PEAK = {"bf16": 312.0, "bf16_weights": 312.0, "fp16": 312.0, "fp32": 19.5}
SHARES = (0.1, 0.2, 0.4)


def forecast(
    name: str,
    *,
    data: str | None,
    steps: int | None,
    overrides: Sequence[str],
    tflops: float | None,
) -> Forecast:
    """Resolve a recipe and count the cost of its run; runs and writes nothing.

    Args:
        name: a shipped recipe's name, or the path of one.
        data: the path or URI of a dataset; ImageNet-1k's size without one.
        steps: the length of the run, in updates; the recipe's by default.
        overrides: assignments `a.b=value` to keys of the recipe.
        tflops: TFLOP/s that a device sustains; shares of an A100's peak without it.

    Returns:
        What `--json` prints.

    Raises:
        ConfigError: the recipe does not fit the data, the workers or a bundle it needs.
        DataError: there is no such dataset.
    """
    from mimray.trainers.data.selection import open_training, stated_classes, with_classes
    from mimray.trainers.engine.average import check_average
    from mimray.trainers.engine.deepspeed_keys import check_known
    from mimray.trainers.engine.optim import check_trained
    from mimray.trainers.methods.needs import foresee, initial_lines
    from mimray.trainers.registry import STORAGE
    from mimray.trainers.weights import fetcher

    asked = with_places(load_recipe(name, overrides, steps), STORAGE)
    fetch = fetcher(asked)
    recipe, networks, notes = foresee(asked, fetch)
    facts = IMAGENET
    if data is not None:
        source = open_training(data, recipe)
        recipe, facts = with_classes(recipe, source), source.facts
    elif recipe.method.learns_classes and not stated_classes(recipe):
        method = recipe.method.model_copy(update={"num_classes": IMAGENET_CLASSES})
        recipe = recipe.model_copy(update={"method": method})
    plan = resolve(recipe, facts, recipe.resources.num_workers.max)
    check_known(plan)
    check_average(recipe)
    check_trained(plan)
    notes += initial_lines(plan.recipe, asked, fetch, None)

    from mimray.trainers.cost import estimate

    on_gpu = recipe.resources.device != "cpu"
    precision = _precision(recipe, on_gpu)
    cost = estimate(plan, precision, on_gpu=on_gpu, networks=networks)
    return {
        "recipe": name,
        "method": recipe.method.name,
        "encoder": recipe.encoder.name,
        "image_size": list(recipe.data.image_size),
        "data": {"uri": facts.uri, "num_samples": facts.num_samples, "assumed": data is None},
        "run": {
            "steps": plan.steps,
            "warmup_steps": plan.warmup_steps,
            # An assumed dataset tells no epochs of a length in steps.
            "epochs": plan.steps / plan.steps_per_epoch if data or recipe.optim.epochs else None,
            "samples": plan.num_samples,
            "peak_lr": plan.lr,
        },
        "batch": {
            "global": plan.global_batch,
            "micro": plan.micro_batch_size,
            "accumulation": plan.accumulation,
            "workers": plan.world_size,
            "arithmetic": plan.batch_arithmetic,
        },
        "device": "gpu" if on_gpu else "cpu",
        "precision": precision,
        "parts": [
            {
                "name": part,
                "parameters": count,
                "forward_flops": cost.plain.forward_flops[part],
            }
            for part, count in cost.parameters.items()
            if count or cost.plain.forward_flops[part]
        ],
        "trained_parameters": cost.trained,
        "training_flops": {
            "plain": cost.plain.training_flops,
            "checkpointed": cost.checkpointed.training_flops,
        },
        "tokens": _tokens(plan, cost),
        "memory": list(_memory(recipe, cost)),
        "time": list(_time(plan, cost, precision, on_gpu, tflops)),
        "notes": [*notes, *_saving(plan, cost, precision, on_gpu), *_notes(recipe, cost, on_gpu)],
        "warnings": advice(plan),
    }


def _precision(recipe: Recipe, on_gpu: bool) -> str:
    wanted = recipe.engine.precision
    if wanted == "auto" and on_gpu:
        return "bf16"  # which any GPU since 2020 has; this machine may have none
    import torch

    from mimray.trainers.engine.deepspeed import choose_precision

    return choose_precision(wanted, torch.device("cpu")) if not on_gpu else wanted


def _tokens(plan: Plan, cost: Cost) -> dict[str, int]:
    encoder, decoder = cost.plain.encoder_tokens, cost.plain.decoder_tokens
    return {
        "encoder": encoder,
        "decoder": decoder,
        "encoder_a_step": encoder * plan.global_batch,
        "decoder_a_step": decoder * plan.global_batch,
    }


def _memory(recipe: Recipe, cost: Cost) -> Iterator[dict[str, Any]]:
    chosen = recipe.engine.zero_stage, recipe.engine.activation_checkpointing
    for (stage, again), memory in cost.memory.items():
        yield {
            "zero_stage": stage,
            "activation_checkpointing": again,
            "chosen": (stage, again) == chosen,
            **vars(memory),
            "peak": memory.peak,
        }


def _time(
    plan: Plan, cost: Cost, precision: str, on_gpu: bool, tflops: float | None
) -> Iterator[dict[str, Any]]:
    """The run's time at given speeds; on a CPU only where the speed is given."""
    step = cost.checkpointed if plan.recipe.engine.activation_checkpointing else cost.plain
    peak = A100_PEAK[precision]
    speeds = [(share * peak, share) for share in SHARES if on_gpu]
    for speed, share in [(tflops, None)] if tflops else speeds:
        device_s = step.training_flops * plan.num_samples / (speed * 1e12)
        yield {
            "tflops": speed,
            "share_of_a100": share,
            "device_hours": device_s / 3600,
            "hours": device_s / 3600 / plan.world_size,
            "images_per_s_a_device": speed * 1e12 / step.training_flops,
        }


def _saving(plan: Plan, cost: Cost, precision: str, on_gpu: bool) -> Iterator[str]:
    """The saving of a method that spares computation, against itself in full."""
    from mimray.trainers.cost import estimate

    method, in_full = plan.recipe.method, plan.recipe.method.in_full
    if in_full is None:
        return
    before = method.model_dump(mode="json")
    changed = {k: v for k, v in in_full.model_dump(mode="json").items() if v != before[k]}
    recipe = plan.recipe.model_copy(update={"method": in_full})
    full = estimate(plan.model_copy(update={"recipe": recipe}), precision, on_gpu=on_gpu)
    ours, theirs = cost.plain, full.plain
    yield (
        f"{ours.training_flops / 1e9:.3g} GFLOPs a picture, forward and backward, and "
        f"{ours.activations / 2**20:,.0f} MiB of activations, in place of "
        f"{theirs.training_flops / 1e9:.3g} and {theirs.activations / 2**20:,.0f} with "
        f"{' '.join(f'method.{key}={value}' for key, value in changed.items())}: "
        f"{theirs.training_flops / ours.training_flops:.2f} and "
        f"{theirs.activations / ours.activations:.2f} times as much"
    )


def _notes(recipe: Recipe, cost: Cost, on_gpu: bool) -> Iterator[str]:
    from mimray.trainers.methods.needs import begins_with_weights

    if not begins_with_weights(recipe):
        if recipe.lora is not None:
            yield "lora adapts weights to begin with, which a run of this recipe has to name"
        if recipe.method.holds_start:
            yield (
                "method.gram_weight holds on to weights to begin with, which a run of this recipe "
                "has to name"
            )
    if cost.average_bytes:
        yield (
            f"optim.ema keeps {cost.average_bytes / 2**20:.0f} MiB a worker at every ZeRO stage, "
            "counted among the parameters: an fp32 copy, and its rounding errors in bf16"
        )
    raw = dict(recipe.engine.deepspeed)
    zero = dict(raw.pop("zero_optimization", {}))
    zero.pop("reduce_bucket_size", None)
    if others := [*raw, *(f"zero_optimization.{key}" for key in zero)]:
        yield f"engine.deepspeed sets {', '.join(others)}; its effect on memory is not counted"
    if on_gpu and cost.reduce_bucket > cost.trained:
        yield (
            f"DeepSpeed's bucket for gradients has room for {cost.reduce_bucket / 1e6:.0f} M, the "
            f"method trains {cost.trained / 1e6:.1f} M: --set engine.deepspeed="
            f"'{{zero_optimization: {{reduce_bucket_size: {cost.trained}}}}}' spares the rest"
        )


def forecast_text(found: Forecast) -> str:
    """A forecast for people, as wide as the terminal."""
    return as_text(forecast_view(found))
