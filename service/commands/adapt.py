"""`mimray adapt`: an encoder trained further on a user's pictures, and judged against its start."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.service.commands.pretrain import run_pretrain
from mimray.service.commands.verdict import (
    VerdictRequest,
    check_verdict,
    run_verdict,
    verdict_text,
)
from mimray.service.terminal.console import say
from mimray.trainers.errors import ConfigError, MissingBundleError

if TYPE_CHECKING:
    from mimray.trainers.bundles import BundleCard
    from mimray.trainers.config.model import EncoderConfig
    from mimray.trainers.storage import RunDir

RECIPES = ((3e6, "adapt-tiny"), (5e7, "adapt-vit-s"), (math.inf, "adapt-vit-b"))
"""Shipped recipes, each with the number of an encoder's parameters below which it is taken."""


@dataclass(frozen=True)
class AdaptRequest:
    """The adaptation that the user asked for.

    Attributes:
        start: the encoder to begin with: a bundle, run, registered name, `SWEEP:best`, `timm:NAME`
            or a checkpoint of another library.
        data: the path or URI of the pictures to adapt to.
        recipe: a shipped recipe's name, or the path of one; None for one by the encoder's size.
        lora: rank of low-rank adapters; None as the recipe says.
        labelled: the path or URI of labelled pictures for the verdict; None for none.
        val: the path or URI of those of them to score on; None for their own split.
        retain: the path or URI of pictures on which nothing should be lost; None for none.
        tasks: the verdict's tasks on the labelled pictures; by default those their labels allow.
        label: the column of the labels; `label`, or class folders, by default.
        val_share: the share of each class that the verdict holds out; None for the default.
        val_seed: the seed that chooses these.
        skip_invalid: leave wrong labels out of the verdict and list them.
        limit: the number of pictures of each data set in the verdict; all by default.
        verdict_overrides: assignments `key=value` to options of the verdict's tasks.
        name: the run's name; the recipe's by default.
        storage: the directory or URI of all runs.
        steps: the length of the run, in updates; the recipe's by default.
        overrides: assignments `a.b=value` to keys of the recipe.
        register: the name to register the adapted encoder under; None for none.
        without_gain: register it whatever the verdict says.
        fresh: delete what an earlier run of this name left.
        command: the command line, for the record.
    """

    start: str
    data: str
    recipe: str | None = None
    lora: int | None = None
    labelled: str | None = None
    val: str | None = None
    retain: str | None = None
    tasks: tuple[str, ...] = ()
    label: str | None = None
    val_share: float | None = None
    val_seed: int = 0
    skip_invalid: bool = False
    limit: int | None = None
    verdict_overrides: tuple[str, ...] = ()
    name: str | None = None
    storage: str = "runs"
    steps: int | None = None
    overrides: tuple[str, ...] = ()
    register: str | None = None
    without_gain: bool = False
    fresh: bool = False
    command: str = ""


def run_adapt(request: AdaptRequest) -> dict[str, Any]:
    """Train an encoder further and judge it; what is done already is not done again.

    Args:
        request: the adaptation asked for.

    Returns:
        What `--json` prints: the run and its bundle, the recipe, the verdict, and the version that
        was registered, None for none.

    Raises:
        MimrayError: a mistake of the user's, before a worker starts where possible.
    """
    from mimray.trainers.storage import RunDir

    named = request.name or (request.recipe and Path(request.recipe).stem)
    card = _start(request, RunDir(request.storage) / named if named else None)
    num_parameters = _count_parameters(card)
    recipe = request.recipe or recipe_for(num_parameters)
    name = request.name or Path(recipe).stem
    run = RunDir(request.storage) / name
    judged = _verdict_request(request, run)
    say(
        f"{request.start}: {card.encoder.name}, {num_parameters / 1e6:.1f} M parameters, at "
        f"{card.image_size[0]}x{card.image_size[1]}; recipe {recipe}"
    )
    for line in check_verdict(judged):
        say(line)
    if request.register is not None:
        say(_registering(request.register, request.storage))
    trained = run_pretrain(
        recipe,
        data=request.data,
        name=name,
        storage=request.storage,
        steps=request.steps,
        overrides=(*_following(card, recipe, request), *request.overrides),
        fresh=request.fresh,
        command=request.command,
    )
    verdict = run_verdict(judged)
    return {
        "run": trained["run"],
        "bundle": trained["bundle"],
        "recipe": recipe,
        "plan_hash": trained["plan_hash"],
        "step": trained["step"],
        "loss": trained["loss"],
        "verdict": verdict,
        "registered": _register(request, trained["bundle"], verdict, card),
    }


def adapt_text(result: Mapping[str, Any]) -> str:
    """The verdict for people, and the version that was registered, if any."""
    lines = [verdict_text(result["verdict"])]
    if result["registered"] is not None:
        lines.append(f"registered as {result['registered']}")
    return "\n".join(lines)


def recipe_for(num_parameters: int) -> str:
    """The shipped recipe for an encoder of a size."""
    return next(recipe for most, recipe in RECIPES if num_parameters < most)


def _start(request: AdaptRequest, run: RunDir | None) -> BundleCard:
    """The card of the encoder to begin with, if it is one that can be adapted.

    The run's own copy serves where it is gone since the run began.
    """
    from mimray.trainers.bundles import CARD, fetch_bundle, read_card
    from mimray.trainers.config.model import ConvConfig, DalleConfig
    from mimray.trainers.weights import fetch_weights
    from mimray.tuning.record import trial_place

    try:
        folder = fetch_weights(trial_place(request.start, request.storage))
    except MissingBundleError:
        if run is None or request.fresh or not run.exists(f"initial/{CARD}"):
            raise
        folder = fetch_bundle((run / "initial").uri)
    card = read_card(folder)
    if isinstance(card.encoder, ConvConfig | DalleConfig):
        raise ConfigError(
            f"{request.start} has encoder {card.encoder.name}, which makes no patch tokens to hide "
            "and to hold on to",
            hint="a start with a vit or swin",
        )
    return card


def _count_parameters(card: BundleCard) -> int:
    import torch

    from mimray.trainers.models import build_encoder

    with torch.device("meta"):
        encoder = build_encoder(card.encoder, card.image_size, card.channels)
    return sum(p.numel() for p in encoder.parameters())


def _following(card: BundleCard, recipe: str, request: AdaptRequest) -> Iterator[str]:
    """Assignments to the keys of a recipe that follow from the start and from `--lora`.

    Pictures have the start's own size, but at most the recipe's, in whole patches; small views have
    the same share of it as in the recipe. What stands for a whole picture is what the start has.
    """
    from mimray.trainers.config.ibot import IBOTConfig
    from mimray.trainers.config.recipes import load_recipe
    from mimray.trainers.models.resize import for_size

    asked, stride = load_recipe(recipe), card.encoder.stride
    most = asked.data.image_size
    size = _size_set(request.overrides) or (
        _in_patches(min(card.image_size[0], most[0]), stride),
        _in_patches(min(card.image_size[1], most[1]), stride),
    )
    yield f"method.init={json.dumps(request.start)}"
    encoder = for_size(card.encoder, card.image_size, size)
    yield from (f"encoder.{k}={json.dumps(v)}" for k, v in _shape(encoder).items())
    yield f"data.image_size={json.dumps(size)}"
    yield f"data.channels={card.channels}"
    if isinstance(asked.method, IBOTConfig):
        small_px = asked.method.local_px * min(size) / min(most)
        yield f"method.local_px={_in_patches(small_px, stride)}"
        yield f"method.pooling={card.pooling}"
    if request.lora is not None:
        yield f"lora.rank={request.lora}"


def _size_set(overrides: Sequence[str]) -> tuple[int, int] | None:
    """The pictures' (height, width) that the user sets; None where it is left open."""
    from mimray.trainers.config.recipes import override

    key = "data.image_size"
    made = override({}, [one for one in overrides if one.partition("=")[0] == key])
    size = made.get("data", {}).get("image_size")
    match size:
        case int():
            return size, size
        case [int(height), int(width)]:
            return height, width
    return None  # not set, or refused with the recipe


def _in_patches(side_px: float, stride: int) -> int:
    """The largest whole number of patches in a side, one at least, in pixels."""
    return max(1, int(side_px) // stride) * stride


def _shape(encoder: EncoderConfig) -> dict[str, Any]:
    """The keys of an architecture, but those in which a recipe has its own way or may follow."""
    return encoder.model_dump(
        mode="json", exclude={"init", "drop_path", "positions", "rel_pos_bias"}
    )


def _verdict_request(request: AdaptRequest, run: RunDir) -> VerdictRequest:
    return VerdictRequest(
        adapted=run.uri,
        start=(run / "initial").uri,  # the run's own copy, whatever became of the start
        data=request.data,
        labelled=request.labelled,
        val=request.val,
        retain=request.retain,
        tasks=request.tasks,
        limit=request.limit,
        overrides=request.verdict_overrides,
        label=request.label,
        val_share=request.val_share,
        val_seed=request.val_seed,
        skip_invalid=request.skip_invalid,
        command=request.command,
    )


def _registering(name: str, storage: str) -> str:
    """A sentence on the version that `--register` will make; refuses a name that is not allowed."""
    from mimray.trainers.registry import Registry, check_word

    check_word(name, "--register")
    there = Registry.open(storage).versions(name)
    if not there:
        return f"with a gain it is registered as {name}@v1"
    return (
        f"{name} has {len(there)} version{'s' * (len(there) > 1)}; with a gain {name}@v"
        f"{there[-1].number + 1} is registered beside them"
    )


def _register(
    request: AdaptRequest, bundle: str, verdict: Mapping[str, Any], start: BundleCard
) -> str | None:
    """Register an encoder that gained, or whatever came of it where told; gives its reference."""
    from mimray.trainers.registry import Registry

    if request.register is None:
        return None
    if not verdict["gain"] and not request.without_gain:
        why = "no gain was shown" if verdict["gain"] is False else "no labels, so no gain is shown"
        say(
            f"not registered as {request.register}: {why}; the same command with --without-gain "
            "registers it",
            "yellow",
        )
        return None
    lineage = {
        "adapted_from": f"{request.start} {start.weights_sha256[:12]}",
        "gain": json.dumps(verdict["gain"]),
    }
    registry = Registry.open(request.storage)
    return registry.register(bundle, request.register, lineage=lineage).reference
