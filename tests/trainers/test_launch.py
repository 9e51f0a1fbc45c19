from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.data import parquet
from mimray.trainers.errors import RunConflictError
from mimray.trainers.launch import Job, prepare


@pytest.fixture
def job(tmp_path: Path) -> Job:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(8):
        pixels = np.full((16, 16, 3), number * 30, np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    recipe = load_recipe("mae-tiny", ["optim.batch_size=4"], steps=2)
    return Job(recipe, str(pictures), "run", str(tmp_path / "runs"))


def test_prepare__a_continued_run_keeps_its_digest(job: Job) -> None:
    # As when a later version knows more keys, which all runs then have at their defaults.
    plan = prepare(job)
    earlier = plan.model_copy(update={"hash": "of an earlier version"})
    job.run.create()
    job.run.write("plan.json", earlier.model_dump_json().encode())

    assert prepare(job).hash == "of an earlier version"
    other = Job(
        load_recipe("mae-tiny", ["optim.batch_size=8"], steps=2), job.data, "run", job.storage
    )
    with pytest.raises(RunConflictError, match=r"optim\.batch_size: 4 -> 8"):
        prepare(other)


def test_prepare__a_cache_too_small_for_what_is_in_use_is_told_with_the_cure(
    job: Job, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = [np.random.default_rng(i).bytes(60_000) for i in range(40)]
    folder = Path(job.data).parent / "parquet"
    folder.mkdir()
    pq.write_table(pa.table({"image": images}), folder / "train.parquet", row_group_size=10)
    monkeypatch.setattr(parquet, "MEMORY_BYTES", 100_000)
    said = {}
    for cache_mib in (1, 3):
        caplog.clear()
        recipe = load_recipe(
            "mae-tiny", ["optim.batch_size=4", f"data.cache_mib={cache_mib}"], steps=2
        )
        prepare(replace(job, recipe=recipe, data=str(folder)))
        said[cache_mib] = caplog.text
    assert "data.cache_mib is 1" in said[1]
    assert "--set data.cache_mib=3 is enough" in said[1]
    assert "cache_mib" not in said[3]


def test_prepare__a_run_of_another_order_is_not_continued(job: Job) -> None:
    earlier = prepare(job).model_copy(update={"format": 1})
    job.run.create()
    job.run.write("plan.json", earlier.model_dump_json().encode())
    with pytest.raises(RunConflictError, match="as of an earlier version of mimray"):
        prepare(job)
