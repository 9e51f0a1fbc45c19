"""Claim: pictures are cropped faster here than by the loaders that people otherwise use.

    python benchmarks/loading.py [PICTURES] [--size 224] [--rounds 5] [--batches 40] [--json FILE]

PICTURES is a flat folder of JPEGs; without it, small ones are made. Three parts, each of ways that
take turns in one run:

- `a core`: the crop and flip of MAE's recipe by the loader of the MAE paper (Pillow, torchvision's
  RandomResizedCrop, to a normalised tensor), and here from the files and from what `mimray data
  ingest` makes of them; pictures a second of CPU time of one thread.
- `end to end`: batches of 64 by two decode processes: torchvision's transform, and LitData and
  WebDataset where they are installed, which hold the same files; pictures a second after the first
  batch, and seconds to that.
- `resume`: seconds to the first batch at sample 0 and at sample 10,000,000 of an index of 100
  million rows, whose pictures are all one JPEG.

Ratios are medians over rounds, with the least and the most. The pixels of the same boxes are held
against Pillow's.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import sample_pictures
from PIL import Image

from mimray.trainers.config.recipes import load_recipe
from mimray.trainers.config.run import Plan, resolve
from mimray.trainers.data.ingest import ingest
from mimray.trainers.data.jpeg import decode_plain, read_frame
from mimray.trainers.data.loader import Place, Samples, make_loader
from mimray.trainers.data.resample import resampled
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.data.transforms import random_crop_box
from mimray.trainers.methods.catalogue import inputs_of
from mimray.trainers.types import DatasetFacts, Record

BATCH = 64
WORKERS = 2
# Forked, the fastest start that there is; LitData otherwise has the whole process spawn.
PROCESSES: dict[str, Any] = {"num_workers": WORKERS, "multiprocessing_context": "fork"}
COMMON = {**PROCESSES, "batch_size": BATCH, "drop_last": True}
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
INDEX_ROWS, GROUP_ROWS, LATE = 100_000_000, 1000, 10_000_000
REPEATS = 20


class Files(torch.utils.data.Dataset[Any]):
    """The pictures of a folder by the MAE paper's transform, over and over."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.files = files * REPEATS
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.files[index]).convert("RGB"))


class Transform:
    """The MAE paper's transform of training pictures (`main_pretrain.py`)."""

    def __init__(self, size: int) -> None:
        from torchvision import transforms

        self.steps = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    size, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC
                ),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __call__(self, picture: Any) -> torch.Tensor:
        """Transform a picture, its encoded bytes, or LitData's sample of them."""
        if isinstance(picture, dict):
            picture = picture["image"]
        if isinstance(picture, bytes):
            picture = Image.open(io.BytesIO(picture)).convert("RGB")
        made: torch.Tensor = self.steps(picture)
        return made


class OnePicture:
    """A source of one JPEG under a large index, that of Parquet in row groups.

    Args:
        data: the encoded picture.
    """

    open_groups = 64

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.facts = DatasetFacts("memory", INDEX_ROWS, "0" * 64)
        self.group_rows = np.full(INDEX_ROWS // GROUP_ROWS, GROUP_ROWS, dtype=np.int64)

    def __len__(self) -> int:
        return INDEX_ROWS

    def __getitem__(self, index: int) -> Record:
        return Record(self._data, None)


def recipe_of(size: int, workers: int, batches: int = 1) -> Any:
    """MAE's recipe at a size."""
    return load_recipe(
        "mae-vit-b",
        [
            f"data.image_size={size}", f"data.num_workers={workers}", f"optim.batch_size={BATCH}",
            "optim.warmup_epochs=null", "optim.warmup_steps=1",
        ],
        steps=batches,
    )  # fmt: skip


def core(files: list[Path], shards: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Pictures a second of CPU time of one thread, by way and round."""
    transform, encoded = Transform(size), [file.read_bytes() for file in files]
    recipe = recipe_of(size, 0)

    def ours(place: Path) -> Callable[[int], None]:
        samples = Samples(open_source(str(place)), recipe, inputs_of(recipe))

        def run(epoch: int) -> None:
            for index in range(len(samples.source)):
                samples[Place(epoch, index)]

        return run

    def theirs(epoch: int) -> None:
        for data in encoded:
            transform(data)

    ways: dict[str, Callable[[int], None]] = {
        "torchvision": theirs, "mimray, files": ours(files[0].parent),
        "mimray, ingested": ours(shards),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in range(-1, rounds):  # the first round warms up
        for name, run in ways.items():
            began = time.process_time()
            run(epoch + 1)
            if epoch >= 0:
                found[name].append(len(files) / (time.process_time() - began))
    return found


def pixel_differences(files: list[Path], size: int) -> dict[str, float]:
    """Our resampling against Pillow's, of the same boxes of whole pictures."""
    rng = np.random.default_rng(0)
    apart = []
    for file in files:
        image = Image.open(file).convert("RGB")
        box = tuple(int(edge) for edge in random_crop_box(rng, image.size, SCALE, RATIO))
        theirs = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        ours = resampled(np.array(image), (size, size), "bicubic", box)  # type: ignore[arg-type]
        apart.append(np.abs(ours.astype(int) - np.asarray(theirs, dtype=int)).ravel())
    levels = np.concatenate(apart)
    return {
        "equal": float((levels == 0).mean()),
        "within 1": float((levels <= 1).mean()),
        "mean": float(levels.mean()),
        "most": float(levels.max()),
    }


def rows_alone(shards: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of CPU to decode a picture whole, and the rows that a crop of it needs."""
    source, rng = open_source(str(shards)), np.random.default_rng(0)
    cases = []
    for index in range(len(source)):
        data = source[index].image
        frame = read_frame(data)
        if frame is not None and frame.rows is not None:
            _, top, _, bottom = random_crop_box(rng, frame.size, SCALE, RATIO)
            cases.append((data, frame, (int(top), int(bottom))))
    found: dict[str, list[float]] = {"whole": [], "rows": []}
    for _ in range(rounds):
        for name, times in found.items():
            began = time.process_time()
            for data, frame, needed in cases:
                decode_plain(data, frame, 1, needed if name == "rows" else None)
            times.append((time.process_time() - began) / len(cases) * 1e3)
    return found


def loaders(
    files: list[Path], shards: Path, scratch: Path, size: int, batches: int
) -> dict[str, Callable[[], Iterable[Any]]]:
    """Makers of iterators of batches, by name; without those of peers that are not installed."""
    transform = Transform(size)

    def torchvision_() -> Iterable[Any]:
        dataset = Files(files, transform)
        return torch.utils.data.DataLoader(dataset, shuffle=True, **COMMON)

    def ours(place: Path) -> Callable[[], Iterable[Any]]:
        def make() -> Iterable[Any]:
            source, plan = planned(open_source(str(place)), size, batches)
            return make_loader(source, plan, inputs_of(plan.recipe))

        return make

    ways: dict[str, Callable[[], Iterable[Any]]] = {
        "torchvision": torchvision_, "mimray, files": ours(files[0].parent),
        "mimray, ingested": ours(shards),
    }  # fmt: skip
    if importlib.util.find_spec("webdataset"):
        ways["WebDataset"] = _webdataset(files, scratch, transform)
    if importlib.util.find_spec("litdata"):
        ways["LitData"] = _litdata(files, scratch, transform)
    return ways


def planned(source: Source, size: int, batches: int) -> tuple[Source, Plan]:
    """A source and the plan of a run on it."""
    return source, resolve(recipe_of(size, WORKERS, batches), source.facts, 1)


def _webdataset(files: list[Path], scratch: Path, transform: Transform) -> Callable[[], Any]:
    import webdataset as wds

    pattern = str(scratch / "%06d.tar")
    with wds.ShardWriter(pattern, maxcount=-(-len(files) // WORKERS), verbose=0) as writer:
        for number, file in enumerate(files):
            writer.write({"__key__": f"{number:06d}", "jpg": file.read_bytes()})
    shards = sorted(str(path) for path in scratch.glob("*.tar")) * REPEATS

    def make() -> Any:
        dataset = (
            wds.WebDataset(shards, shardshuffle=len(shards), seed=0)
            .shuffle(1000)
            .to_tuple("jpg")
            .map_tuple(transform)
            .batched(BATCH, partial=False)
        )
        return wds.WebLoader(dataset, batch_size=None, **PROCESSES)

    return make


def _litdata(files: list[Path], scratch: Path, transform: Transform) -> Callable[[], Any]:
    import litdata

    folder = scratch / "litdata"
    litdata.optimize(
        fn=_bytes_of, inputs=[str(f) for f in files], output_dir=str(folder),
        chunk_bytes="64MB", num_workers=1,
    )  # fmt: skip

    def make() -> Any:
        for _ in range(REPEATS):
            dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=transform)
            yield from litdata.StreamingDataLoader(dataset, **COMMON)

    return make


def _bytes_of(file: str) -> dict[str, bytes]:
    return {"image": Path(file).read_bytes()}


def end_to_end(
    ways: dict[str, Callable[[], Iterable[Any]]], batches: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Pictures a second after the first batch, and seconds to it, by way and round."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"images_per_s": [], "first_batch_s": []} for name in ways
    }
    for _ in range(rounds):
        for name, make in ways.items():
            began = time.perf_counter()
            batch_times = []
            for _batch in _some(make(), batches):
                batch_times.append(time.perf_counter())
            # Batches in hand when the first one came were made before.
            later = batch_times[len(batch_times) // 4 :]
            found[name]["first_batch_s"].append(batch_times[0] - began)
            found[name]["images_per_s"].append(BATCH * (len(later) - 1) / (later[-1] - later[0]))
    return found


def _some(batches: Iterable[Any], count: int) -> Iterator[Any]:
    iterator = iter(batches)
    for _ in range(count):
        yield next(iterator)
    del iterator  # which ends its processes


def resume(file: Path, size: int, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first batch at the beginning, and late in a large index."""
    source: Any = OnePicture(file.read_bytes())
    found: dict[str, list[float]] = {"sample 0": [], f"sample {LATE:,}": []}
    plan = resolve(recipe_of(size, 0, INDEX_ROWS // BATCH), source.facts, 1)
    for _ in range(rounds):
        for name, sample in (("sample 0", 0), (f"sample {LATE:,}", LATE)):
            began = time.perf_counter()
            loader = make_loader(
                source, plan, inputs_of(plan.recipe), first_step=sample // plan.global_batch
            )
            next(loader)
            found[name].append(time.perf_counter() - began)
    return found


def ratios(over: list[float], under: list[float]) -> str:
    """The median of pairs of one round, with the least and the most."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return f"{statistics.median(each):.2f} x ({min(each):.2f} to {max(each):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=40, help="of each end-to-end round")
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    size, rounds = arguments.size, arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        pictures = arguments.pictures or sample_pictures(scratch)
        files = sorted(pictures.resolve().glob("*.[jJ][pP]*"))
        ingest(str(files[0].parent), str(scratch / "ingested"))
        by_core = core(files, scratch / "ingested", size, rounds)
        print(f"{len(files)} JPEGs, crops of {size} pixels; a core:")
        for name, rates in by_core.items():
            print(
                f"  {name:24} {statistics.median(rates):7.0f} images/s, "
                f"{ratios(rates, by_core['torchvision'])}"
            )
        apart = pixel_differences(files, size)
        print(
            f"  values equal to Pillow's: {apart['equal']:.1%}; within a level of 255: "
            f"{apart['within 1']:.3%}; apart on average {apart['mean']:.3f}, at most "
            f"{apart['most']:.0f}"
        )
        decoding = rows_alone(scratch / "ingested", 3 * rounds)
        print(
            f"  decoding an ingested picture: {statistics.median(decoding['whole']):.2f} ms, the "
            f"rows of a crop alone {ratios(decoding['rows'], decoding['whole'])}"
        )
        ways = loaders(files, scratch / "ingested", scratch, size, arguments.batches)
        whole = end_to_end(ways, arguments.batches, rounds)
        print(f"end to end, {WORKERS} processes:")
        base = whole["torchvision"]
        for name, found in whole.items():
            print(
                f"  {name:24} {statistics.median(found['images_per_s']):7.0f} images/s, "
                f"{ratios(found['images_per_s'], base['images_per_s'])}; first batch after "
                f"{statistics.median(found['first_batch_s']):.2f} s"
            )
        starts = resume(files[0], size, rounds)
        early, late = starts.values()
        print(f"first batch of {INDEX_ROWS:,} rows: at sample 0 after "
              f"{statistics.median(early):.2f} s, at {LATE:,} {ratios(late, early)}")  # fmt: skip
    if arguments.json:
        found_all = {
            "core": by_core, "pixels": apart, "rows": decoding, "end_to_end": whole,
            "resume": starts,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(found_all, indent=1) + "\n")


if __name__ == "__main__":
    main()
