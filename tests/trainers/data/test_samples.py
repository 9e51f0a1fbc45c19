from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

from mimray.trainers.data import sample_photos as samples
from mimray.trainers.data.sample_photos import PHOTOGRAPHS, write_photo_tiles
from mimray.trainers.data.sources import open_source
from mimray.trainers.errors import DataError


def test_write_photo_tiles__balanced_class_folders(tmp_path: Path) -> None:
    train, val = write_photo_tiles(tmp_path / "a", train_tiles=20, val_tiles=5)
    for folder, count in ((train, 20), (val, 5)):
        source = open_source(str(folder))
        assert source.facts.class_names == tuple(sorted(PHOTOGRAPHS))
        labels = source.labels()
        assert labels is not None
        assert set(Counter(labels.tolist()).values()) == {count}
    again, _ = write_photo_tiles(tmp_path / "b", train_tiles=20, val_tiles=5)
    for path in train.rglob("*.jpg"):
        assert path.read_bytes() == (again / path.relative_to(train)).read_bytes()
    with pytest.raises(DataError, match="exists already"):
        write_photo_tiles(tmp_path / "a")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_tiles__train_and_held_out_share_no_pixel(name: str) -> None:
    photo = samples.photograph(name)
    train, held_out = samples.regions_of(photo.size)
    shown = {
        (x, y)
        for left, top, right, bottom in samples._spread(train, 96, 200)
        for x in range(left, right)
        for y in range(top, bottom)
    }
    boxes = samples._spread(held_out, 96, 40)
    assert len(boxes) == 40 == len(set(boxes))
    for left, top, right, bottom in boxes:
        assert right <= photo.width
        assert bottom <= photo.height
        # A box meets a region of boxes of its own size only if some pixel of its rim is shown.
        for x in range(left, right):
            assert (x, top) not in shown
            assert (x, bottom - 1) not in shown
        for y in range(top, bottom):
            assert (left, y) not in shown
            assert (right - 1, y) not in shown


def test_write_photo_tiles__too_large_tiles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer or smaller"):
        write_photo_tiles(tmp_path / "a", size_px=300)


def test_samples__does_not_import_the_packages_it_takes_from() -> None:
    import subprocess

    code = (
        "import sys; from mimray.trainers.data import sample_photos\n"
        "sample_photos.photograph('china')\n"
        "sys.exit('sklearn' in sys.modules or 'skimage' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
