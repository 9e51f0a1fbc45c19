"""`mimray plan`: what a recipe would cost, counted before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mimray.service.terminal.progress import duration
from mimray.trainers.config.advice import advice
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, Recipe, resolve
from mimray.trainers.types import DatasetFacts

if TYPE_CHECKING:
    from mimray.trainers.cost import Cost

IMAGENET = DatasetFacts(uri="ImageNet-1k", num_samples=1_281_167, fingerprint="assumed")
IMAGENET_CLASSES = 1000

# TFLOP/s of an A100 by what the run computes in; fp32 without TF32, as torch multiplies it.
A100_PEAK = {"bf16": 312.0, "fp16": 312.0, "fp32": 19.5}
SHARES = (0.1, 0.2, 0.4)
GIB, MIB = 2**30, 2**20
COLUMNS = {"communication": "buckets", "optimizer": "optimiser"}

Forecast = dict[str, Any]


def forecast(
    name: str,
    *,
    data: str | None,
    steps: int | None,
    overrides: Sequence[str],
    tflops: float | None,
) -> Forecast:
    """Resolve a recipe and count what its run would take; runs and writes nothing.

    Args:
        name: of a shipped recipe, or a path.
        data: dataset to plan for; ImageNet-1k's size without one.
        steps: length of the run.
        overrides: dotted assignments.
        tflops: sustained by a device; shares of an A100's peak without it.

    Returns:
        What `--json` prints.

    Raises:
        ConfigError: the recipe does not fit the data, the workers or a bundle it needs.
        DataError: there is no such dataset.
    """
    from mimray.trainers.data.selection import open_training, stated_classes, with_classes
    from mimray.trainers.methods.needs import foresee

    recipe, networks, notes = foresee(load_recipe(name, overrides, steps))
    facts = IMAGENET
    if data is not None:
        source = open_training(data, recipe)
        recipe, facts = with_classes(recipe, source), source.facts
    elif recipe.method.learns_classes and not stated_classes(recipe):
        method = recipe.method.model_copy(update={"num_classes": IMAGENET_CLASSES})
        recipe = recipe.model_copy(update={"method": method})
    plan = resolve(recipe, facts, recipe.resources.num_workers)

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
            # Of a length in steps, an assumed dataset says nothing.
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
        "training_flops": {
            "plain": cost.plain.training_flops,
            "checkpointed": cost.checkpointed.training_flops,
        },
        "tokens": _tokens(plan, cost),
        "memory": list(_memory(recipe, cost)),
        "time": list(_time(plan, cost, precision, on_gpu, tflops)),
        "notes": [*notes, *_notes(recipe, cost, on_gpu)],
        "warnings": advice(plan),
    }


def _precision(recipe: Recipe, on_gpu: bool) -> str:
    wanted = recipe.engine.precision
    if wanted == "auto" and on_gpu:
        return "bf16"  # of any GPU since 2020; this machine may have none
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
    """How long the run takes at given speeds; a CPU's must be given."""
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


def _notes(recipe: Recipe, cost: Cost, on_gpu: bool) -> Iterator[str]:
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


def render(found: Forecast) -> RenderableType:
    """A forecast for people."""
    notes = [f"note: {note}" for note in found["notes"]]
    warnings = [f"[yellow]warning: {escape(warning)}[/yellow]" for warning in found["warnings"]]
    return Group(
        _head(found),
        _parts(found),
        "FLOPs: a multiply-add counts as 2; matrix products, convolutions and attention. The "
        "rest is a percent or so.\n",
        *_memory_tables(found),
        *_time_table(found),
        *map(escape, notes),
        *warnings,
    )


def _head(found: Forecast) -> Table:
    data, run, batch, tokens = (found[key] for key in ("data", "run", "batch", "tokens"))
    size = "x".join(map(str, found["image_size"]))
    assumed = "assumed, as in ImageNet-1k (--data counts yours)"
    decoder = f"; decoder {tokens['decoder']}, {tokens['decoder_a_step']:,} a step"
    epochs = f" ({run['epochs']:.4g} epochs)" if run["epochs"] else ""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, text in (
        ("recipe", f"{found['recipe']}: {found['method']} with {found['encoder']} at {size}"),
        ("data", f"{data['num_samples']:,} pictures {assumed if data['assumed'] else data['uri']}"),
        (
            "run",
            f"{run['steps']:,} steps, {run['samples']:,} pictures{epochs}; "
            f"warm-up {run['warmup_steps']:,} steps, peak lr {run['peak_lr']:.3g}",
        ),
        ("batch", batch["arithmetic"]),
        (
            "tokens",
            f"encoder {tokens['encoder']} a picture, {tokens['encoder_a_step']:,} a step"
            + (decoder if tokens["decoder"] else ""),
        ),
    ):
        grid.add_row(name, escape(text))
    return grid


def _parts(found: Forecast) -> Table:
    table = _table("")
    table.add_column("part")
    for column in ("parameters", "GFLOPs a picture, forward"):
        table.add_column(column, justify="right")
    for part in found["parts"]:
        table.add_row(part["name"], _short(part["parameters"]), _giga(part["forward_flops"]))
    training = found["training_flops"]
    table.add_section()
    for name, flops in (
        ("all, forward", sum(part["forward_flops"] for part in found["parts"])),
        ("forward and backward", training["plain"]),
        ("with activation checkpointing", training["checkpointed"]),
    ):
        table.add_row(name, "", _giga(flops))
    return table


def _memory_tables(found: Forecast) -> Iterator[RenderableType]:
    unit, name = (GIB, "GiB") if max(r["peak"] for r in found["memory"]) > 2 * GIB else (MIB, "MiB")
    batch, on_gpu = found["batch"], found["device"] == "gpu"
    for again, title in (
        (
            False,
            f"{name} of a {'GPU' if on_gpu else 'CPU worker'}: {found['precision']}, micro batch "
            f"{batch['micro']}, {_plural(batch['workers'], 'worker')} (* as the recipe has it)",
        ),
        (True, "the same with engine.activation_checkpointing"),
    ):
        table = _table(title)
        table.add_column("ZeRO")
        columns = ("parameters", "optimizer", "gradients", "communication", "activations", "peak")
        for column in columns:
            table.add_column(COLUMNS.get(column, column), justify="right")
        for row in found["memory"]:
            if row["activation_checkpointing"] == again:
                stage = f"{row['zero_stage']}{' *' if row['chosen'] else ''}"
                table.add_row(stage, *(_few(row[column] / unit) for column in columns))
        yield table
    yield (
        "peak: the most held at once; activations go while gradients come. buckets: for gradients "
        "on their way and, with ZeRO 3, gathered parameters. "
        + (
            "CUDA and torch's allocator keep about 1 GiB on top. "
            "--set resources.device=cpu counts a CPU worker's.\n"
            if on_gpu
            else "Libraries, about 1 GiB, and decode processes come on top.\n"
        )
    )


def _time_table(found: Forecast) -> Iterator[RenderableType]:
    if not found["time"]:
        yield "How long: say what a worker sustains with --tflops; 2 CPU cores make about 0.1.\n"
        return
    workers = found["batch"]["workers"]
    table = _table("How long it takes")
    columns = ("TFLOP/s a device", "of an A100's peak", "device time", "pictures/s a device")
    for column in (*columns[:3], f"on {_plural(workers, 'worker')}", columns[3]):
        table.add_column(column, justify="right")
    for row in found["time"]:
        share = row["share_of_a100"]
        table.add_row(
            f"{row['tflops']:.3g}",
            "" if share is None else f"{100 * share:.0f} %",
            _hours(row["device_hours"]),
            _hours(row["hours"], long=True),
            f"{row['images_per_s_a_device']:,.0f}",
        )
    yield table
    yield (
        "MAE's authors sustained 13 TFLOP/s by this count, a tenth of a V100's peak (ViT-L, 800 "
        "epochs, 42 h on 64 V100). Reading and decoding must keep up.\n"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _hours(hours: float, *, long: bool = False) -> str:
    if hours < 1:
        return duration(hours * 3600)
    return f"{hours / 24:,.1f} days" if long and hours > 48 else f"{hours:,.0f} h"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(count: float) -> str:
    for limit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f} {name}"
    return f"{count:.0f}"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.3g}" if flops < 1e12 else f"{flops / 1e9:,.0f}"


def _few(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"
