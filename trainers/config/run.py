"""Recipes and plans: all settings of a pre-training, checked once and then frozen.

`resolve` checks a recipe against the data and the number of workers and returns the plan, which
is written next to the results. Only its length may grow (`continued`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from mimray.trainers.config.base import Config
from mimray.trainers.config.catalogue import AnyMethod
from mimray.trainers.config.composition import check_size
from mimray.trainers.config.data import DataConfig
from mimray.trainers.config.deepspeed_block import check_block
from mimray.trainers.config.engine import EngineConfig
from mimray.trainers.config.explain import explain
from mimray.trainers.config.lora import LoraConfig
from mimray.trainers.config.model import EncoderConfig
from mimray.trainers.config.optim import OptimConfig
from mimray.trainers.config.probe import ProbeConfig
from mimray.trainers.config.resources import ResourcesConfig
from mimray.trainers.config.retired import without_retired
from mimray.trainers.errors import ConfigError
from mimray.trainers.types import DatasetFacts


class About(Config):
    """A recipe's description: its purpose, command, cost, expected result and source."""

    summary: str
    command: str = ""
    cost: str = ""
    expect: str = ""
    source: str = ""


class CheckpointConfig(Config):
    """Updates between two checkpoints, and the number of checkpoints kept."""

    every_steps: PositiveInt = 500
    keep: PositiveInt = 2


class LoggingConfig(Config):
    """Updates between two rows of metrics and between two sheets of pictures."""

    every_steps: PositiveInt = 10
    pictures_every_steps: NonNegativeInt = Field(default=1000, description="0 for the end only")
    num_pictures: PositiveInt = 6


class Recipe(Config):
    """A user's settings of a pre-training."""

    about: About | None = None
    encoder: EncoderConfig
    method: AnyMethod
    data: DataConfig = Field(default_factory=DataConfig)
    optim: OptimConfig
    lora: LoraConfig | None = Field(
        default=None, description="adapters of the encoder, in place of training its weights"
    )
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    evaluation: ProbeConfig = Field(default_factory=ProbeConfig)
    resources: ResourcesConfig = Field(default_factory=ResourcesConfig)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check_composition(self) -> Recipe:
        # The cause first: of an encoder that is none for the method, no size is right.
        self.method.check_encoder(self.encoder)
        check_size(self.encoder, self.data.image_size)
        self.method.check(self.encoder, self.data.image_size)
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the encoder's output tokens; masks are over this grid."""
        height, width = self.data.image_size
        return height // self.encoder.stride, width // self.encoder.stride


# Sections and keys that may differ when a run is continued: they change neither the weights nor
# the layout of the files.
OPERATIONAL = ("about", "checkpoint", "logging", "evaluation", "resources")
OPERATIONAL_KEYS = (
    "data.num_workers",
    "data.stream",
    "data.prefetch_batches",
    "data.cache_mib",
    "data.decoded_cache_mib",
    "engine.micro_batch_size",
    "engine.compile",
)

NEUTRAL: dict[str, Any] = {
    "encoder.class_token": True,
    "encoder.num_registers": 0,
    "encoder.rope": "none",
    "encoder.rope_temperature": None,
    "encoder.rope_grid": None,
    "encoder.mlp": "gelu",
    "encoder.norm": "layer",
    "encoder.qk_norm": False,
    "encoder.attn_norm": False,
    "encoder.mlp_norm": False,
    "encoder.key_bias": True,
    "method.init": "",
    "method.init_sha256": "",
    "method.init_partial": False,
    "method.gram_weight": 0.0,
    "method.decoder": "self",
    "method.decode_ratio": 1.0,
    "method.encoder_layers": [],
    "lora": None,
    "optim.unfreeze_every_steps": None,
    "optim.clip_tensor_norm": None,
}
"""Keys that recipes of earlier versions lack, with the value at which each has no effect.

At that value a key is in no digest and no comparison, so that runs begun before it go on.
"""

LENGTH_KEYS = ("optim.epochs", "optim.steps", "optim.warmup_epochs", "optim.warmup_steps")
"""Keys that may differ where a run is continued for longer than it was planned."""

PLAN_FORMAT: Literal[2] = 2
"""The format of plans that this version makes; see `Plan`."""

OTHER_FORMAT = "order and pixels of training pictures: as of an earlier version of mimray"
"""The reason why plans of another format are not continued."""


class Length(Config):
    """A length that a run was planned for before it was made longer.

    Attributes:
        steps: the planned length, in updates.
        until: updates made as the run was made longer; values that move over a run were those of
            this length up to here.
        hash: the plan's digest at this length.
    """

    steps: PositiveInt
    until: NonNegativeInt
    hash: str


class Plan(Config):
    """A recipe resolved for its data and number of workers; frozen, written to `plan.json`.

    Attributes:
        format: 2 since pictures are mixed over the whole dataset and drafts of JPEG have a margin:
            a run that was begun before that would go on with another order and other pixels.
        lr: peak learning rate, base_lr x global batch / 256.
        accumulation: micro batches a worker sums before an update.
        lengths: lengths that the run was planned for before, the first one first.
        retired: keys of an earlier version that shaped the run, by dotted key; never written.
    """

    format: Literal[1, 2] = PLAN_FORMAT
    recipe: Recipe
    data: DatasetFacts
    world_size: PositiveInt
    micro_batch_size: PositiveInt
    accumulation: PositiveInt
    global_batch: PositiveInt
    steps: PositiveInt
    warmup_steps: NonNegativeInt
    steps_per_epoch: float
    lr: float
    hash: str = Field(description="digest of all that shapes the result")
    lengths: tuple[Length, ...] = Field(default=(), exclude_if=lambda lengths: not lengths)
    retired: dict[str, Any] = Field(default_factory=dict, exclude=True)

    def length_at(self, step: int) -> int:
        """The planned length, in updates, by which values that move over a run have moved.

        Args:
            step: updates made before the one in question.
        """
        return next((length.steps for length in self.lengths if step < length.until), self.steps)

    def for_workers(self, count: int) -> Plan:
        """The same run on as many of some workers as can share its global batch evenly.

        The micro batch stays, for the sake of memory; what fewer workers leave, they accumulate.

        Args:
            count: the number of workers there are, at most that of the plan.
        """
        micros = self.global_batch // self.micro_batch_size
        together = self.recipe.method.assignment_pictures
        workers = next(
            n
            for n in range(min(count, self.world_size), 0, -1)
            if micros % n == 0 and n * self.micro_batch_size % together == 0
        )
        return self.model_copy(update={"world_size": workers, "accumulation": micros // workers})

    @property
    def num_samples(self) -> int:
        """Pictures seen over the whole run."""
        return self.steps * self.global_batch

    @property
    def batch_arithmetic(self) -> str:
        """The global batch as a product, for people."""
        return (
            f"global batch {self.global_batch} = micro batch {self.micro_batch_size} "
            f"x accumulation {self.accumulation} x workers {self.world_size}"
        )


def resolve(recipe: Recipe, facts: DatasetFacts, world_size: int) -> Plan:
    """Resolve a recipe into the plan of one run.

    Args:
        recipe: the recipe of the run.
        facts: the dataset's description.
        world_size: number of training workers.

    Returns:
        The frozen plan: learning rate = base_lr x global batch / 256, steps and warm-up steps.

    Raises:
        ConfigError: the ZeRO stage or a clipping does not go with precision or offload, the raw
            DeepSpeed block has a key of the recipe's; the global batch cannot be split over the
            workers or into micro batches, is larger than the dataset, the method refuses the data,
            or the warm-up is not shorter than the run.

    Source: Goyal et al. 2017, sec. 2.1; He et al. 2022, Table 8.
    """
    optim, engine = recipe.optim, recipe.engine
    _check_engine(engine)
    if optim.clip_tensor_norm is not None:
        _check_tensor_clipping(engine)
    batch = optim.batch_size
    if batch % world_size:
        raise ConfigError(
            f"optim.batch_size {batch} cannot be split over {world_size} workers",
            hint=f"nearest: {batch // world_size * world_size or world_size}",
        )
    a_worker = batch // world_size
    micro = min(engine.micro_batch_size or a_worker, a_worker)
    if a_worker % micro:
        raise ConfigError(
            f"a worker's share of {a_worker} pictures is not a multiple of "
            f"engine.micro_batch_size {micro}",
            hint="choose a divisor, or leave it out",
        )
    if facts.num_samples < batch:
        raise ConfigError(
            f"{facts.uri} has {facts.num_samples} pictures, fewer than one global batch of {batch}",
            hint=f"--set optim.batch_size={max(1, facts.num_samples // 2)} or more pictures",
        )
    together = recipe.method.assignment_pictures
    if micro * world_size % together:
        raise ConfigError(
            f"method.{recipe.method.name} normalises over {together} pictures, which the micro "
            f"batches of all workers, {micro} x {world_size} = {micro * world_size} pictures, do "
            "not hold a whole number of times",
            hint="another engine.micro_batch_size or number of workers"
            if batch % together == 0
            else f"--set optim.batch_size={batch // together * together or together}, a multiple "
            f"of {together}, or a smaller group",
        )
    workers = recipe.resources.num_workers
    if workers.elastic and micro * workers.min % together:
        raise ConfigError(
            f"method.{recipe.method.name} normalises over {together} pictures, which the micro "
            f"batches of {workers.min} workers of {micro} pictures do not hold",
            hint=f"--set resources.num_workers={world_size}, or a smaller group",
        )
    num_places = recipe.grid[0] * recipe.grid[1]
    recipe.method.check_data(facts, num_places, batch)
    per_epoch = facts.num_samples / batch
    steps = optim.steps or max(1, math.floor((optim.epochs or 0) * per_epoch))
    warmup = optim.warmup_steps or round((optim.warmup_epochs or 0) * per_epoch)
    if warmup >= steps and warmup > 0:
        raise ConfigError(
            f"warm-up of {warmup} steps does not fit a run of {steps} steps",
            hint="--set optim.warmup_steps=… or a longer run",
        )
    return Plan(
        recipe=recipe,
        data=facts,
        world_size=world_size,
        micro_batch_size=micro,
        accumulation=a_worker // micro,
        global_batch=batch,
        steps=steps,
        warmup_steps=warmup,
        steps_per_epoch=per_epoch,
        lr=optim.base_lr * batch / 256,
        hash=_digest({**essential(recipe), "data_fingerprint": facts.fingerprint, "steps": steps}),
    )


def _check_engine(engine: EngineConfig) -> None:
    """Refuse what no run can begin with; bundles and plans of earlier versions may hold it."""
    stage = engine.zero_stage
    if engine.precision in ("bf16_weights", "fp16") and stage == 0:
        raise ConfigError(
            f"engine.precision {engine.precision} needs fp32 master weights, which "
            "engine.zero_stage 0 does not keep",
            hint="--set engine.zero_stage=1, or engine.precision=bf16",
        )
    if engine.offload != "none" and stage == 0:
        raise ConfigError(
            f"engine.offload {engine.offload} needs engine.zero_stage 1, 2 or 3, not 0",
            hint="--set engine.zero_stage=1",
        )
    if engine.offload == "all" and stage != 3:
        raise ConfigError(
            f"engine.offload all needs engine.zero_stage 3, not {stage}",
            hint="--set engine.zero_stage=3, or engine.offload=optimizer for stages 1 to 3",
        )
    check_block(engine.deepspeed, engine.precision)


def _check_tensor_clipping(engine: EngineConfig) -> None:
    """Refuse engines whose gradients, between backward and step, are not those of the update."""
    if engine.precision == "fp16":
        raise ConfigError(
            "optim.clip_tensor_norm bounds gradients themselves, and engine.precision fp16 holds "
            "them times a scale that changes",
            hint="--set engine.precision=bf16, or optim.clip_grad_norm",
        )
    if engine.offload != "none":
        raise ConfigError(
            f"optim.clip_tensor_norm needs gradients on the device, and engine.offload "
            f"{engine.offload} moves them to the host as they come",
            hint="--set engine.offload=none, or optim.clip_grad_norm",
        )


def essential(recipe: Recipe) -> dict[str, Any]:
    """The recipe's tree without keys that may change when a run is continued."""
    tree = recipe.model_dump(mode="json", exclude=set(OPERATIONAL))
    for dotted in OPERATIONAL_KEYS:
        section, key = dotted.split(".")
        tree[section].pop(key, None)
    for key in recipe.method.bundle_keys:  # a place may change, its digest may not
        tree["method"].pop(key, None)
    for dotted, neutral in NEUTRAL.items():
        *sections, key = dotted.split(".")
        node: Any = tree
        for section in sections:
            node = node.get(section, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict) and key in node and node[key] == neutral:
            del node[key]
    return tree


def differences(old: Plan, new: Plan) -> list[str]:
    """Differences that keep `new` from continuing `old`, one line a key; empty without any.

    A larger length is none: see `continued`.
    """
    before = dict(_flatten(essential(old.recipe))) | old.retired
    after = dict(_flatten(essential(new.recipe)))
    longer = new.steps > old.steps or (new.steps == old.steps and old.lengths)
    lines = [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not (longer and key in LENGTH_KEYS)
    ]
    if old.format != new.format:
        lines.append(OTHER_FORMAT)
    if old.data.fingerprint != new.data.fingerprint:
        lines.append(
            f"data: {old.data.uri} ({old.data.fingerprint[:12]}) -> "
            f"{new.data.uri} ({new.data.fingerprint[:12]})"
        )
    return lines


def continued(before: Plan, plan: Plan, reached: Callable[[], int]) -> Plan:
    """The plan by which a run goes on, which may be longer than it was planned.

    From the update reached on, the learning rate and all else that moves over a run have the values
    of a run of the larger length at the same step; those before stay as they were made, and so does
    the warm-up.

    Args:
        before: the run's plan so far.
        plan: a plan without `differences` from it.
        reached: gives the number of updates made so far.
    """
    if plan.steps == before.steps and not before.lengths:
        # Keys that a later version adds to recipes change the digest, but not the run.
        return plan.model_copy(update={"hash": before.hash})
    optim = before.recipe.optim.model_copy(
        update={
            "steps": plan.steps,
            "epochs": None,
            "warmup_steps": before.warmup_steps,
            "warmup_epochs": None,
        }
    )
    lengths, digest = before.lengths, before.hash
    if plan.steps > before.steps:
        past = Length(steps=before.steps, until=reached(), hash=before.hash)
        lengths = (*lengths, past)
        digest = _digest([before.hash, past.until, plan.steps])
    return plan.model_copy(
        update={
            "recipe": plan.recipe.model_copy(update={"optim": optim}),
            "warmup_steps": before.warmup_steps,
            "lengths": lengths,
            "hash": digest,
        }
    )


def parse_recipe(tree: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Check a recipe's tree.

    Args:
        tree: the recipe as nested mappings.
        origin: the source of the tree, which errors name.

    Raises:
        ConfigError: a key or a value is wrong; names each, and what is allowed.
    """
    # A plan is JSON, which has neither infinity nor NaN.
    endless = [f"'{key}' is {value}" for key, value in _flatten(tree) if _has_endless(value)]
    if endless:
        raise ConfigError(f"{origin}: {'; '.join(endless)}: not a finite number")
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise explain(error, tree, origin, keys=known_keys(), owners=key_owners()) from None


def _has_endless(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_endless, value))
    return isinstance(value, float) and not math.isfinite(value)


def parse_plan(text: str | bytes, origin: str, hint: str) -> Plan:
    """Check a plan as it was written, by this version or an earlier one.

    Args:
        text: the plan as JSON.
        origin: the plan's file, which errors name.
        hint: the cure where it is a plan that this version does not know.

    Raises:
        ConfigError: it is no plan, or none that this version knows; names each wrong key.
    """
    damaged = "restore it from a backup, or start over with --fresh"
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not JSON: {error}", hint=damaged) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} is not a plan, which is a JSON object", hint=damaged)
    if "recipe" in tree:
        recipe, retired = without_retired(tree["recipe"])
        tree = {**tree, "recipe": recipe, "retired": retired}
    try:
        return Plan.model_validate(tree)
    except ValidationError as error:
        raise explain(error, tree, origin, keys=(), hint=hint) from None


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Every dotted key a recipe may hold."""
    return tuple(dict.fromkeys(key for key, _ in _keys_of(Recipe)))


@functools.cache
def key_owners() -> dict[str, tuple[str, ...]]:
    """Names of the methods or encoders that have a key, for keys that not all of them have."""
    owners: dict[str, list[str]] = {}
    for key, names in _keys_of(Recipe):
        owners.setdefault(key, []).extend(names)
    everyone = {key.split(".")[0]: set(having) for key, having in owners.items() if having}
    for key, having in owners.items():
        everyone.get(key.split(".")[0], set()).update(having)
    return {
        key: tuple(having)
        for key, having in owners.items()
        if having and set(having) != everyone[key.split(".")[0]]
    }


def _keys_of(
    model: type[BaseModel], prefix: str = "", names: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each dotted key, with the names by which a recipe chooses the model that has it."""
    for name, field in model.model_fields.items():
        nested = [
            kind
            for kind in (field.annotation, *get_args(field.annotation))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if not nested or prefix:  # within a section, a plain value may stand for the nested one
            yield f"{prefix}{name}", names
        for kind in nested:
            chosen = kind.model_fields.get("name") if len(nested) > 1 else None
            yield from _keys_of(
                kind,
                f"{prefix}{name}.",
                get_args(chosen.annotation) if chosen is not None else names,
            )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _digest(tree: Any) -> str:
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
