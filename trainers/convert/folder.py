"""The folder of an exported model: weights, configuration, a model card for people."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mimray.trainers.bundles import BundleCard
from mimray.trainers.errors import BundleError
from mimray.trainers.storage import storage_errors


def write_folder(out: Path, state: Mapping[str, Tensor], files: Mapping[str, str]) -> None:
    """Write a folder that is whole or not there.

    Args:
        out: folder to write; new or empty.
        state: parameters by name, for `model.safetensors`.
        files: texts by name.

    Raises:
        BundleError: `out` holds files.
        StorageError: `out` cannot be written.
    """
    with whole_folder(out) as aside:
        weights = {key: value.contiguous() for key, value in state.items()}
        # Not save_file: it hides from us why a disk refuses.
        (aside / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        for name, text in files.items():
            (aside / name).write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` at the end, or is removed.

    Args:
        out: the folder's place; new or empty.

    Raises:
        BundleError: `out` holds files.
        StorageError: it cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BundleError(f"{out} exists and is not empty", hint="remove it or name another folder")
    with storage_errors(str(out)):
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield aside
            aside.chmod(0o755)
            os.replace(aside, out)  # takes the place of an empty folder too
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def as_json(tree: Mapping[str, Any]) -> str:
    """A tree as the text of a file."""
    return json.dumps(tree, indent=2, allow_nan=False) + "\n"


def model_card(card: BundleCard, library: str, holds: str, usage: str) -> str:
    """The README of an exported model: what it is, of which data, how good, and its limits.

    Args:
        card: the bundle's.
        library: library that the layout is of.
        holds: sentence that says what of the method is in it.
        usage: code that loads and runs it.
    """
    height, width = card.image_size
    front = {"library_name": library, "pipeline_tag": "image-feature-extraction"}
    about = {
        "Encoder": f"{card.encoder.name}, stride {card.encoder.stride} px, "
        f"{card.encoder.num_layers} layers, width {card.encoder.out_width}",
        "Input": f"{card.channels} x {height} x {width}, resized whole ({card.interpolation}), "
        f"mean {list(card.mean)}, std {list(card.std)}",
        "Holds": holds,
    }
    training = {
        "Method": card.method or "not known",
        "Length": f"{card.step} updates, {card.samples} pictures seen" if card.step else "",
        "Data": f"fingerprint {card.data_fingerprint}" if card.data_fingerprint else "not known",
        "Plan": card.plan_hash,
        "Imported from": card.source,
        "Made by": f"`{card.created_by}`" if card.created_by else "",
    }
    origin = "Imported into mimray." if card.source else "Pre-trained without labels by mimray."
    limits = [
        f"Made for {height}x{width} pixels; features at other sizes are less tried.",
        "Pictures are squeezed to that shape, not cropped.",
        "It gives features and names nothing. Train a head on them.",
        "It reflects the pictures it has seen, their gaps and their biases included.",
    ]
    if card.source:
        limits.append("The licence of the imported weights is their authors'.")
    if card.license:
        limits.append(f"The weights are under the licence {card.license}.")
    sections = {
        "": _listed(about),
        "Use": f"```python\n{usage}\n```",
        "Pre-training": _listed(training),
        "Scores": f"```json\n{as_json(card.scores)}```" if card.scores else "None recorded.",
        "Limits": "\n".join(f"- {limit}" for limit in limits),
        "Recipe": f"```json\n{as_json(card.recipe)}```" if card.recipe else "Not known.",
    }
    head = "".join(f"{key}: {value}\n" for key, value in front.items())
    text = "\n\n".join(f"## {name}\n\n{body}" if name else body for name, body in sections.items())
    return f"---\n{head}---\n\n# {card.name}\n\n{origin}\n\n{text}\n"


def _listed(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in facts.items() if value)
