"""A run's forecast as tables: parts, memory at each ZeRO stage, time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mimray.service.terminal.progress import duration

GIB, MIB = 2**30, 2**20
COLUMNS = {"communication": "buckets", "optimizer": "optimiser"}

Forecast = dict[str, Any]


def forecast_view(found: Forecast) -> RenderableType:
    """A forecast for people, as `mimray plan --json` prints it."""
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
    table.add_row("trained", _short(found["trained_parameters"]), "")
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
        columns = ["parameters", "optimizer", "gradients", "communication", "activations", "peak"]
        if any(row["host"] for row in found["memory"]):
            columns.append("host")
        for column in columns:
            table.add_column(COLUMNS.get(column, column), justify="right")
        for row in found["memory"]:
            if row["activation_checkpointing"] == again:
                stage = f"{row['zero_stage']}{' *' if row['chosen'] else ''}"
                table.add_row(stage, *(_few(row[column] / unit) for column in columns))
        yield table
    yield (
        "peak: the most held at once; activations go while gradients come. buckets: for gradients "
        "on their way and, with ZeRO 3, gathered parameters. activations: with the copies of "
        "weights that autocast makes. host: offloaded, per worker, beside the peak. "
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
