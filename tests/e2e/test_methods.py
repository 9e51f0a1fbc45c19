"""Every method through the same life: two workers, a kill, a bundle, features."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mimray.trainers import load_bundle, load_method
from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.data.loader import Place, Samples, collate
from mimray.trainers.data.sources import open_source
from mimray.trainers.launch import Job, Outcome, prepare, pretrain
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.models.normalise import normalise

STEPS = 8
SHORT = [
    "optim.batch_size=16", "data.num_workers=0", "checkpoint.every_steps=2",
    "logging.every_steps=1", "logging.num_pictures=2", "resources.num_workers=2",
]  # fmt: skip
# A codebook that 16 small pictures can fill.
FEW_CODES = {
    "dvae-tiny": ["method.codebook_size=32"],
    "beit-tiny": ["method.vocab_size=32"],
    "capi-tiny": ["method.num_clusters=32", "method.assignment_group=16"],
    "ibot-tiny": ["method.num_prototypes=16", "method.assignment_group=16"],
}


Launch = Callable[..., Outcome]


@pytest.fixture(scope="module")
def launch(ray_session: str, photos: Path, storage: Path) -> Launch:
    """Trains a recipe for a few steps under a name; a finished name is not trained again."""
    done: dict[str, Outcome] = {}

    def run(recipe: str, name: str, attempts: list[int] | None = None) -> Outcome:
        if name in done:
            return done[name]
        sets = [*SHORT, *FEW_CODES.get(recipe, [])]
        if recipe == "beit-tiny":
            sets.append(f"method.tokenizer={run('dvae-tiny', 'dvae-tiny').run}")
        if recipe == "distill-tiny":
            sets.append(f"method.teacher={run('mae-tiny', 'mae-tiny').run}")
        job = Job(load_recipe(recipe, sets, STEPS), str(photos), name, str(storage))
        watch = None if attempts is None else lambda state: attempts.append(state.attempts)
        done[name] = pretrain(job, prepare(job), watch)
        return done[name]

    return run


def rows(run: Path) -> list[dict[str, float]]:
    """Metrics without what depends on the clock or the machine."""
    unsteady = {"images_per_s", "data_wait", "memory_mib", "time"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in unsteady} for line in lines]


def kill_a_worker(run: Path, step: int, over: threading.Event, commands: Any) -> None:
    """SIGKILL one training worker once the run has come to a step."""
    while not over.wait(0.02):
        if (run / "metrics.jsonl").is_file() and len(rows(run)) >= step:
            commands.kill_ray("RayTrainWorker", most=1)
            return


@pytest.mark.parametrize(
    "recipe",
    [
        "dvae-tiny",  # the one with the most state
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "ae-tiny", "vae-tiny", "beit-tiny", "mae-tiny", "mae-cross-tiny", "simmim-tiny",
                "simmim-swin-tiny", "maskfeat-tiny", "distill-tiny", "capi-tiny",
                "ibot-tiny",
            )
        ),
    ],
)  # fmt: skip
def test_method__lives_through_a_kill_and_leaves_a_bundle(
    recipe: str, launch: Launch, commands: Any, photos: Path, storage: Path
) -> None:
    undisturbed = launch(recipe, recipe)
    over = threading.Event()
    killed = storage / f"{recipe}-killed"
    killer = threading.Thread(target=kill_a_worker, args=(killed, 3, over, commands))
    killer.start()
    attempts: list[int] = []
    launch(recipe, killed.name, attempts)
    over.set()
    killer.join()
    assert attempts[-1] == 2, "the kill came too late to matter"

    # It resumed: the same figures to the last bit, though some steps were made twice.
    assert rows(killed) == rows(Path(undisturbed.run.uri))
    assert [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))

    # It exported, and what it exported is what it trained.
    assert (killed / "reconstruction.png").stat().st_size > 1000
    method, twin = load_method(killed), load_method(undisturbed.run.uri)
    for (name, value), other in zip(
        method.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name

    # Features: the same whatever the picture is batched with, and those of the method's encoder.
    source = open_source(str(photos))
    views = Samples(source, method.recipe, inputs_of(method.recipe))
    batch = collate([views[Place(0, i)] for i in range(4)])
    images = normalise(batch.inputs["images"], method.recipe.data.mean, method.recipe.data.std)
    encoder = load_bundle(killed)
    features = encoder(images)
    torch.testing.assert_close(encoder(images[2:3]).tokens, features.tokens[2:3])
    assert torch.equal(encoder(images).tokens, features.tokens)
    with torch.no_grad():  # attention takes another kernel where it keeps gradients
        exported = method.get_submodule(method.result)(images)
    cls = encoder.card.pooling == "cls"
    assert torch.equal(exported.prefix[:, 0] if cls else exported.pooled, features.pooled)
    for layer, found in zip(encoder.card.layers, encoder.features(images), strict=True):
        height, width = method.recipe.data.image_size
        stride = encoder.strides[layer]
        assert found.shape[2:] == (height // stride, width // stride)
