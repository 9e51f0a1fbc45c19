from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mimray.trainers.config.evaluation.extract import ExtractSpec
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError
from mimray.trainers.evaluation.features.encoders import EncoderRef
from mimray.trainers.evaluation.features.extraction import extract, read_columns
from mimray.trainers.storage import RunDir

SPEC = ExtractSpec(pooled=("mean",), layers=(0,), dtype="float16", part_pictures=25)


def test_extract__on_a_cluster_with_one_free_cpu_equals_here(
    ray_session: str,
    ref: EncoderRef,
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    import ray
    import ray.data

    @ray.remote(num_cpus=1)
    class Neighbour:  # another job, which has one of the two CPUs
        def there(self) -> bool:
            return True

    neighbour = Neighbour.remote()
    assert ray.get(neighbour.there.remote())
    source = open_source(str(colours))
    seen: list[int] = []

    there = extract(
        ref,
        source,
        RunDir(str(tmp_path / "there")),
        SPEC,
        progress=lambda phase, done, total: seen.append(done),
    )

    ray.kill(neighbour)
    assert len(seen) == 4
    assert seen[-1] == 60
    read = ray.data.read_parquet([there.out.path(p.file) for p in there.manifest.parts])
    assert [row["layer_0"].shape for row in read.take(2)] == [(16, 2, 3)] * 2
    with monkeypatch.context() as patch:
        patch.setattr("ray.is_initialized", lambda: False)
        here = extract(ref, source, RunDir(str(tmp_path / "here")), SPEC)
    assert here.manifest.extraction == there.manifest.extraction
    for column in ("mean", "layer_0"):
        ours, theirs = (
            read_columns(found.out, found.manifest, [column])[column]
            .combine_chunks()
            .to_numpy_ndarray()
            for found in (there, here)
        )
        assert ours.dtype == np.float16
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=2e-3)


def test_extract__an_error_in_an_actor_is_told_as_it_is(
    ray_session: str, ref: EncoderRef, colours: Path, tmp_path: Path
):
    broken = colours / "train/red/03.png"
    broken.write_bytes(broken.read_bytes()[:60])

    with pytest.raises(DataError, match=r"red/03\.png: .*--skip-invalid"):
        extract(ref, open_source(str(colours)), RunDir(str(tmp_path / "bad")), SPEC)


def test_extract__inside_a_task_that_holds_every_cpu_does_not_wait_for_itself(
    ray_session: str, ref: EncoderRef, colours: Path, tmp_path: Path
):
    import ray

    task = ray.remote(num_cpus=2)(extract)
    out = RunDir(str(tmp_path / "out"))

    found = ray.get(task.remote(ref, open_source(str(colours)), out, SPEC), timeout=600)

    assert (found.num_written, found.manifest.num_rows) == (3, 60)
