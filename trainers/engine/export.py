"""From trained weights to a bundle, and from a checkpoint on disk to trained weights."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mimray.trainers.bundles import (
    CARD,
    TOKENIZER,
    BundleCard,
    fetch_bundle,
    save_bundle,
    spread_layers,
)
from mimray.trainers.config.method import FinetuneConfig
from mimray.trainers.config.run import Plan
from mimray.trainers.engine.checkpoints import Checkpoint
from mimray.trainers.methods import build_method
from mimray.trainers.storage import RunDir

_ENCODER = "encoder."


def write_bundle(
    run: RunDir, plan: Plan, state: dict[str, Tensor], *, step: int, name: str, command: str
) -> BundleCard:
    """Write `bundle/` of a run, with the run's tokenizer in it where there is one.

    Args:
        run: the run's directory.
        plan: what was run.
        state: whole fp32 weights of the method.
        step: updates made.
        name: what the encoder is called.
        command: how it was made.
    """
    recipe = plan.recipe
    card = BundleCard(
        name=name,
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        mean=recipe.data.mean,
        std=recipe.data.std,
        interpolation=recipe.data.interpolation,
        pooling=recipe.method.pooling if isinstance(recipe.method, FinetuneConfig) else "mean",
        layers=spread_layers(recipe.encoder.num_layers),
        method=recipe.method.name,
        step=step,
        samples=step * plan.global_batch,
        plan_hash=plan.hash,
        data_fingerprint=plan.data.fingerprint,
        created_by=command,
        recipe=recipe.model_dump(mode="json"),
    )
    encoder = {k.removeprefix(_ENCODER): v for k, v in state.items() if k.startswith(_ENCODER)}
    rest = {k: v for k, v in state.items() if not k.startswith(_ENCODER)}
    kept = run.exists(f"{TOKENIZER}/{CARD}")
    tokenizer = fetch_bundle((run / TOKENIZER).uri) if kept else None
    if run.local is not None:
        return save_bundle(run.local / "bundle", card, encoder, rest, tokenizer)
    with tempfile.TemporaryDirectory(prefix="mimray-") as scratch:
        folder = Path(scratch) / "bundle"
        card = save_bundle(folder, card, encoder, rest, tokenizer)
        files = [file for file in folder.rglob("*") if file.is_file()]
        # The card is what makes a folder a bundle, so it goes last.
        for file in sorted(files, key=lambda f: f == folder / CARD):
            run.upload(file, f"bundle/{file.relative_to(folder).as_posix()}")
    return card


def read_checkpoint(folder: Path, checkpoint: Checkpoint, plan: Plan) -> dict[str, Tensor]:
    """Whole fp32 weights of a checkpoint, without a cluster.

    Args:
        folder: the checkpoint's directory on this machine.
        checkpoint: its manifest.
        plan: the plan it belongs to.
    """
    method = build_method(plan.recipe)
    frozen = {n: p.detach() for n, p in method.named_parameters() if not p.requires_grad}
    if checkpoint.zero_stage or checkpoint.precision != "fp32":
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="state"))
    else:
        file = folder / "state" / "mp_rank_00_model_states.pt"
        # Written by DeepSpeed in this run's own directory; holds more than tensors.
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return {n: frozen[n] if n in frozen else state[n].float().clone() for n in method.state_dict()}
