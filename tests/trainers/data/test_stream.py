from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mimray.trainers.config.run import Plan, parse_recipe, resolve
from mimray.trainers.data.loader import make_loader
from mimray.trainers.data.sources import FolderSource, Source, open_source
from mimray.trainers.errors import ConfigError, DataError
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.types import Batch, Record


def plan_of(source: Source, method: dict[str, Any], **data: Any) -> Plan:
    recipe = parse_recipe(
        {
            "encoder": {"name": "vit_tiny", "depth": 1, "patch_size": 4},
            "method": method,
            "data": {"image_size": 16, "num_workers": 2, "prefetch_batches": 2, **data},
            "optim": {"batch_size": 8, "steps": 5},
            "engine": {"micro_batch_size": 4},
        }
    )
    return resolve(recipe, source.facts, 1)


def batches(source: Source, plan: Plan, **where: Any) -> list[Batch]:
    return list(make_loader(source, plan, inputs_of(plan.recipe), **where))


def assert_alike(streamed: list[Batch], local: list[Batch]) -> None:
    assert len(streamed) == len(local) > 0
    for one, other in zip(streamed, local, strict=True):
        assert one.inputs.keys() == other.inputs.keys()
        for name, value in one.inputs.items():
            torch.testing.assert_close(value, other.inputs[name], rtol=0, atol=0)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(one.epoch, other.epoch)
        assert (one.problems, one.hidden) == (other.problems, other.hidden)


@pytest.mark.parametrize(
    "method",
    [
        {"name": "mae"},
        {"name": "finetune", "mixup": 0.8},  # pairs, which partners complete
        {
            "name": "maskfeat",
            "hog_cell_px": 4,
            "min_block_patches": 1,
        },  # hidden patches are counted
        {"name": "ibot", "local_px": 8, "num_prototypes": 16},  # views
    ],
    ids=lambda method: method["name"],
)
def test_stream__batches_are_those_of_decode_processes(
    ray_session: str, labelled: Path, method: dict[str, Any]
) -> None:
    source = open_source(str(labelled))
    local = batches(source, plan_of(source, method, num_workers=0), first_step=2)
    streamed = batches(source, plan_of(source, method, stream="ray"), first_step=2)

    assert_alike(streamed, local)
    streamed[0].inputs[next(iter(streamed[0].inputs))].zero_()  # memory of its own, to write to


def test_stream__a_decoder_that_dies_changes_nothing(
    ray_session: str, labelled: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"

    class Deadly(FolderSource):
        """Kills the first process that reads its fifth picture."""

        def __getitem__(self, index: int) -> Record:
            if index == 5 and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    source = open_source(str(labelled))
    local = batches(source, plan_of(source, {"name": "mae"}, num_workers=0))
    source.__class__ = Deadly
    streamed = batches(source, plan_of(source, {"name": "mae"}, stream="ray"))

    assert killed.exists()
    assert_alike(streamed, local)


def test_stream__a_picture_that_cannot_be_decoded_is_named(
    ray_session: str, tmp_path: Path, labelled: Path
) -> None:
    for number, picture in enumerate(sorted((labelled / "train").rglob("*.png"))[:8]):
        (tmp_path / f"{number}.png").write_bytes(picture.read_bytes())
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:200])
    source = open_source(str(tmp_path))

    with pytest.raises(DataError, match=r"3\.png: .*") as caught:
        batches(source, plan_of(source, {"name": "mae"}, stream="ray", on_bad="fail"))
    assert "data.on_bad=substitute" in (caught.value.hint or "")


def test_stream__without_processes_is_refused(labelled: Path) -> None:
    source = open_source(str(labelled))
    with pytest.raises(ConfigError, match=r"data\.num_workers is 0"):
        plan_of(source, {"name": "mae"}, stream="ray", num_workers=0)
