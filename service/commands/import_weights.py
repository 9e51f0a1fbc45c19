"""`mimray import`: public weights, made into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimray.service.terminal.console import say

_NUM_SHOWN = 8


def run_import(
    checkpoint: str,
    out: Path,
    *,
    architecture: str | None,
    image_size: tuple[int, int] | None,
    overrides: Sequence[str],
    partial: bool,
    name: str,
    license: str,
    command: str,
) -> dict[str, Any]:
    """Import a checkpoint, and say what became of it.

    Args:
        checkpoint: a file of weights, a folder of timm or transformers, or `timm:NAME`.
        out: the folder of the bundle to write.
        architecture: timm's name of the model, where the file does not say.
        image_size: the input's (height, width), pixels; the weights' own by default.
        overrides: assignments `a.b=value` to what the weights leave open.
        partial: keep the weights that fit, and list the others.
        name: the encoder's name; the checkpoint's by default.
        license: the licence of the weights; what their source tells by default.
        command: the command line, for the record.

    Returns:
        What `--json` prints.

    Raises:
        MimrayError: a mistake of the user's.
    """
    from mimray.trainers.config.names import check_name
    from mimray.trainers.convert import import_weights

    if name:
        check_name("bundle", name)
    imported = import_weights(
        checkpoint,
        out,
        architecture=architecture,
        image_size=image_size,
        overrides=overrides,
        partial=partial,
        name=name,
        license=license,
        command=command,
    )
    card = imported.card
    height, width = card.image_size
    whole = "with its head" if imported.complete else "the encoder alone"
    say(
        f"{out}: {card.encoder.name}, {card.encoder.num_layers} layers, width "
        f"{card.encoder.out_width}, at {height}x{width}, method {card.method or 'not known'}, "
        f"{whole}"
    )
    say(f"pictures normalised by mean {card.mean}, std {card.std}")
    for what, keys in (
        ("left out", imported.left_out),
        ("initialised afresh", imported.initialised),
    ):
        if keys:
            more = f" and {len(keys) - _NUM_SHOWN} more" if len(keys) > _NUM_SHOWN else ""
            say(f"{what}: {', '.join(keys[:_NUM_SHOWN])}{more}")
    for note in imported.notes:
        say(f"note: {note}")
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
