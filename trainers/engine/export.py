"""Export: a run's bundle from trained weights, and trained weights from a checkpoint on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mimray.trainers.bundles import CARD, BundleCard, save_bundle, spread_layers
from mimray.trainers.config.run import Plan
from mimray.trainers.engine.assess import assess_method
from mimray.trainers.engine.average import Weights, chosen_weights, has_average, with_average
from mimray.trainers.engine.checkpoints import Checkpoint
from mimray.trainers.errors import CheckpointError
from mimray.trainers.methods.catalogue import build_method, method_class
from mimray.trainers.methods.lora import adapt, describe, merged
from mimray.trainers.methods.needs import inherited_license, kept_needs, load_needs
from mimray.trainers.storage import RunDir


def write_bundle(
    run: RunDir,
    plan: Plan,
    state: dict[str, Tensor],
    *,
    step: int,
    name: str,
    command: str,
    weights: Weights = "average",
    folder: str = "bundle",
) -> BundleCard:
    """Write a bundle of a run: the resulting encoder, the method's rest, the networks it needs.

    Args:
        run: the run's directory.
        plan: the run's plan.
        state: whole fp32 weights of the method, by name; adapters are merged.
        step: updates made.
        name: the name of the encoder.
        command: the command line that made it.
        weights: the average of `optim.ema` where the run keeps one, or the weights as trained.
        folder: the bundle's folder in the run.

    Returns:
        The bundle's description, as written.
    """
    averaged = weights == "average" and has_average(state)
    adapters = {} if plan.recipe.lora is None else describe(state, plan.recipe)
    state = merged(chosen_weights(state, weights), plan.recipe)
    held_out, warnings = assess_method(plan, state)
    card = card_of(plan, step=step, name=name, command=command).model_copy(
        update={
            "weights": "average" if averaged else "raw",
            "adapters": adapters,
            "held_out": held_out,
            "warnings": warnings,
            "license": inherited_license(plan.recipe, run),
        }
    )
    encoder, rest = parted(plan, state)
    networks = kept_needs(plan.recipe, run)
    if run.local is not None:
        return save_bundle(run.local / folder, card, encoder, rest, networks)
    with tempfile.TemporaryDirectory(prefix="mimray-") as scratch:
        place = Path(scratch) / folder
        card = save_bundle(place, card, encoder, rest, networks)
        files = [file for file in place.rglob("*") if file.is_file()]
        # The card makes a folder a bundle, so it is written last.
        for file in sorted(files, key=lambda f: f == place / CARD):
            run.upload(file, f"{folder}/{file.relative_to(place).as_posix()}")
    return card


def card_of(plan: Plan, *, step: int, name: str, command: str) -> BundleCard:
    """The description of a run's encoder after a number of updates, without digests of weights."""
    recipe = plan.recipe
    return BundleCard(
        name=name,
        encoder=recipe.encoder,
        image_size=recipe.data.image_size,
        channels=recipe.data.channels,
        mean=recipe.data.mean,
        std=recipe.data.std,
        interpolation=recipe.data.interpolation,
        pooling=recipe.method.pooled_by,
        layers=spread_layers(recipe.encoder.num_layers),
        method=recipe.method.name,
        step=step,
        samples=step * plan.global_batch,
        plan_hash=plan.hash,
        data_fingerprint=plan.data.fingerprint,
        created_by=command,
        recipe=recipe.model_dump(mode="json"),
    )


def parted(plan: Plan, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state of the encoder that a method results in, by the encoder's own names, and the rest.

    Args:
        plan: the run's plan.
        state: a result of `chosen_weights`.
    """
    result = f"{method_class(plan.recipe.method.name).result}."
    encoder = {k.removeprefix(result): v for k, v in state.items() if k.startswith(result)}
    rest = {k: v for k, v in state.items() if not k.startswith(result)}
    return encoder, rest


def read_checkpoint(
    run: RunDir, folder: Path, checkpoint: Checkpoint, plan: Plan
) -> dict[str, Tensor]:
    """Whole fp32 weights of a checkpoint, the average included, without a cluster.

    Args:
        run: the run's directory, which holds the weights that the run began with.
        folder: the checkpoint's directory on this machine.
        checkpoint: the checkpoint's manifest.
        plan: the run's plan.

    Raises:
        CheckpointError: an earlier version wrote it with weights rounded to 16 bits.
        BundleError: weights that the run began with are missing or damaged.
    """
    method = build_method(plan.recipe)
    load_needs(method, run)
    adapt(method)
    with_average(method)
    frozen = {n: p.detach() for n, p in method.named_parameters() if not p.requires_grad}
    if checkpoint.zero_stage == 0 and checkpoint.precision in ("bf16_weights", "fp16"):
        raise CheckpointError(
            f"checkpoint {checkpoint.name} holds weights rounded to {checkpoint.precision[:4]}, "
            "as earlier versions trained at engine.zero_stage 0",
            hint="train again; engine.precision=bf16 keeps fp32 weights",
        )
    if checkpoint.zero_stage:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        state = dict(get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="state"))
    else:
        file = folder / "state" / "mp_rank_00_model_states.pt"
        # Written by DeepSpeed in this run's own directory; holds more than tensors.
        state = torch.load(file, map_location="cpu", weights_only=False)["module"]
    return {n: frozen[n] if n in frozen else state[n].float().clone() for n in method.state_dict()}
