"""The command that takes in other people's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mimray.service.cli.options import parse_size

console = Console(stderr=True, highlight=False, soft_wrap=True)
_NUM_SHOWN = 8


def run_import(
    checkpoint: str,
    out: Path,
    *,
    architecture: str | None,
    image_size: str | None,
    overrides: Sequence[str],
    partial: bool,
    name: str,
    command: str,
) -> dict[str, Any]:
    """Import a checkpoint, and say what became of it."""
    from mimray.trainers.convert import import_weights

    imported = import_weights(
        checkpoint,
        out,
        architecture=architecture,
        image_size=parse_size(image_size) if image_size else None,
        overrides=overrides,
        partial=partial,
        name=name,
        command=command,
    )
    card = imported.card
    height, width = card.image_size
    whole = "with its head" if imported.complete else "the encoder alone"
    console.print(
        f"{out}: {card.encoder.name}, {card.encoder.num_layers} layers, width "
        f"{card.encoder.out_width}, at {height}x{width}, method {card.method or 'not known'}, "
        f"{whole}",
        markup=False,
    )
    console.print(f"pictures normalised by mean {card.mean}, std {card.std}", markup=False)
    for what, keys in (
        ("left out", imported.left_out),
        ("initialised afresh", imported.initialised),
    ):
        if keys:
            more = f" and {len(keys) - _NUM_SHOWN} more" if len(keys) > _NUM_SHOWN else ""
            console.print(f"{what}: {', '.join(keys[:_NUM_SHOWN])}{more}", markup=False)
    for note in imported.notes:
        console.print(f"note: {note}", markup=False)
    return {
        "bundle": str(out),
        "encoder": card.encoder.model_dump(mode="json"),
        "image_size": list(card.image_size),
        "mean": list(card.mean),
        "std": list(card.std),
        "method": card.method,
        "complete": imported.complete,
        "left_out": list(imported.left_out),
        "initialised": list(imported.initialised),
        "notes": list(imported.notes),
        "source": card.source,
    }
