"""`mimray evaluate --task finetune`: train the whole encoder on labels, then score it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mimray.trainers.errors import ConfigError

if TYPE_CHECKING:
    from mimray.trainers.config.evaluation.finetune import FinetuneTask
    from mimray.trainers.config.run import Recipe
    from mimray.trainers.evaluation.features.encoders import EncoderRef
    from mimray.trainers.evaluation.probes.classifier import Classified
    from mimray.trainers.evaluation.score import Score, Setting
    from mimray.trainers.launch import Job
    from mimray.trainers.preflight import WorkerResources
    from mimray.trainers.recorder import RunState

SHEET = "finetune.png"


def evaluate(ref: EncoderRef, setting: Setting, config: FinetuneTask) -> Score:
    """Fine-tune an encoder end to end and score it on the validation pictures.

    The training is a run like any other, kept with its bundle in `config.storage`: asked again,
    it goes on from its last checkpoint, or is scored at once where it has ended.

    Args:
        ref: the encoder to begin with, or an untrained one.
        setting: the data, seed and limits.
        config: the recipe's name and overrides.

    Returns:
        Top-1 accuracy as the headline; top-5, loss, accuracy by class and confusion beside it.

    Raises:
        ConfigError: the recipe fine-tunes nothing, or does not fit the encoder or the data.
        DataError: pictures or their labels cannot be used.
        RunConflictError: a run of the name exists and is another one.
        ResourceError: the cluster can never give what the recipe asks.
    """
    from mimray.trainers.evaluation.features.pooled import seen_before
    from mimray.trainers.evaluation.score import Score
    from mimray.trainers.evaluation.splits import open_splits
    from mimray.trainers.launch import Job, finished, prepare, pretrain
    from mimray.trainers.preflight import preflight

    splits = open_splits(setting)
    recipe = recipe_for(
        ref, setting, config, len(splits.learnt_names), held_out=splits.hold_out is not None
    )
    job = Job(
        recipe,
        setting.data,
        config.name or _name(ref, setting, recipe),
        config.storage,
        command=setting.command,
    )
    plan = prepare(job)

    def on_progress(state: RunState) -> None:
        setting.progress("fine-tuning", state.row.get("step", 0), plan.steps)

    outcome = finished(job, plan) or pretrain(job, plan, on_progress)
    found = _classified(job, setting, config, preflight(plan))
    kept = (job.run / "bundle").uri
    return Score(
        metric="accuracy",
        headline=found.accuracy,
        metrics={
            **found.metrics,
            "train_loss": outcome.last["loss"],
            "steps": plan.steps,
            "epochs": round(plan.steps / plan.steps_per_epoch, 3),
        },
        data_fingerprint=plan.data.fingerprint,
        val_fingerprint=splits.val.facts.fingerprint,
        num_train=plan.data.num_samples,
        num_val=found.num_pictures,
        evidence=found.evidence,
        notes=(
            f"the fine-tuned encoder is in {kept}",
            *splits.notes,
            *seen_before(ref, splits),
            *found.notes,
        ),
        pictures={SHEET: found.sheet},
        hold_out=splits.hold_out,
    )


def recipe_for(
    ref: EncoderRef,
    setting: Setting,
    config: FinetuneTask,
    num_classes: int,
    *,
    held_out: bool = False,
) -> Recipe:
    """Build the recipe that fine-tunes an encoder: its own architecture and normalisation.

    An untrained encoder keeps its own kind of positions; a trained one's are trained on.

    Args:
        ref: the encoder to begin with.
        setting: the seed, the limit, and the rule for bad pictures.
        config: the recipe's name and overrides, which have the last word.
        num_classes: the number of classes in the data.
        held_out: True if the pictures to score on are held out of the data.

    Raises:
        ConfigError: the recipe is of another method, or a key is wrong.
        BundleError: the encoder does not fit the size of input.
    """
    from mimray.trainers.config.recipes import load_recipe, override
    from mimray.trainers.config.run import parse_recipe
    from mimray.trainers.methods.initial import trainable_encoder
    from mimray.trainers.models.resize import for_size

    tree = load_recipe(config.recipe).model_dump(mode="json")
    if tree["method"]["name"] != "finetune":
        raise ConfigError(
            f"recipe {config.recipe} is of method {tree['method']['name']}",
            hint="recipe=finetune-tiny, finetune-vit-b or one of your own of method finetune",
        )
    card = ref.card()
    size = config.image_size or card.image_size
    encoder = (
        for_size(card.encoder, card.image_size, size)
        if ref.untrained
        else trainable_encoder(card, size)
    ).model_dump(mode="json")
    if "drop_path" in encoder:
        encoder["drop_path"] = tree["encoder"].get("drop_path", 0.0)
    tree["encoder"] = encoder
    tree["method"] |= {"bundle": "" if ref.untrained else ref.bundle, "num_classes": num_classes}
    tree["data"] |= {
        "image_size": list(size),
        "channels": card.channels,
        "mean": list(card.mean),
        "std": list(card.std),
        "interpolation": card.interpolation,
        "limit": setting.limit,
        "label": setting.label,
        "val_share": setting.hold_out.share if held_out else 0.0,
        "val_seed": setting.hold_out.seed if held_out else 0,
        "on_bad": "substitute" if setting.skip_invalid else "fail",
        "bad_labels": "skip" if setting.skip_invalid else "fail",
    }
    tree["seed"] = setting.seed
    if config.epochs is not None:
        tree["optim"] = _with_epochs(tree["optim"], config.epochs)
    return parse_recipe(override(tree, config.overrides), f"recipe {config.recipe}")


def _with_epochs(optim: dict[str, Any], epochs: float) -> dict[str, Any]:
    """Change the length; the warm-up keeps its share of it."""
    share = sum(
        (optim[f"warmup_{unit}"] or 0) / optim[unit] for unit in ("epochs", "steps") if optim[unit]
    )
    length = {"epochs": epochs, "warmup_epochs": share * epochs}
    return {**optim, **length, "steps": None, "warmup_steps": None}


def _name(ref: EncoderRef, setting: Setting, recipe: Recipe) -> str:
    """The run's name, with a digest of everything asked, so that no two runs share one."""
    from mimray.trainers.config.run import essential

    asked = [ref.identity, setting.data, essential(recipe)]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    encoder = ref.text.rstrip("/").removesuffix("/bundle").rpartition("/")[2].replace(":", "-")
    return f"finetune-{encoder}-{digest}"


def _classified(
    job: Job, setting: Setting, config: FinetuneTask, share: WorkerResources
) -> Classified:
    """Score the run's bundle on a device like those it was trained on."""
    import ray

    from mimray.service.terminal.phases import PhaseLink, PhaseRecorder

    recorder = ray.remote(PhaseRecorder).options(num_cpus=0).remote()
    work = (
        ray.remote(_classify)
        .options(num_cpus=share.cpus, num_gpus=share.gpus)
        .remote(
            job.run.uri,
            replace(
                setting,
                device="cuda" if share.gpus else "cpu",
                progress=PhaseLink(recorder, 0),
            ),
            config.batch_size,
            int(share.cpus),
        )
    )
    ready: list[Any] = []
    while not ready:
        ready, _ = ray.wait([work], timeout=0.5)
        for phase, done, total in ray.get(recorder.phases.remote()).values():
            setting.progress(phase, done, total)
    try:
        found: Classified = ray.get(work)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return found


def _classify(run: str, setting: Setting, batch_size: int, num_threads: int) -> Classified:
    """Classify in a Ray worker that holds one device."""
    import torch

    from mimray.trainers.bundles import fetch_bundle
    from mimray.trainers.evaluation.probes.classifier import classify
    from mimray.trainers.evaluation.splits import open_splits
    from mimray.trainers.methods.finetune import Finetune
    from mimray.trainers.methods.load import load_method

    torch.set_num_threads(num_threads)  # Ray sets OMP_NUM_THREADS to 1
    method = load_method(fetch_bundle(run))
    assert isinstance(method, Finetune)
    return classify(method, open_splits(setting), setting, batch_size=batch_size)
