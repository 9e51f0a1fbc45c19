from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import GifImagePlugin, Image

from mimray.trainers.data.decode import decode
from mimray.trainers.data.gif import has_more_frames
from mimray.trainers.errors import ImageError


def animation(frames: int, *, colours: bool = False) -> bytes:
    rng = np.random.default_rng(frames)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)) for _ in range(frames)
    ]
    file = io.BytesIO()
    more = {"duration": 40, "loop": 0, "comment": b"c" * 300} if colours else {}
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], **more)
    return file.getvalue()


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 7, 40])
def test_has_more_frames__counts_as_pillow_does(frames: int, colours: bool) -> None:
    data = animation(frames, colours=colours)
    assert Image.open(io.BytesIO(data)).n_frames == frames
    assert has_more_frames(data, frames - 1)
    assert not has_more_frames(data, frames)


def test_has_more_frames__of_bytes_that_are_cut_or_wrong() -> None:
    data = animation(3)
    for end in range(len(data)):
        has_more_frames(data[:end], 1)  # ends, whatever it says
    rng = np.random.default_rng(0)
    for _ in range(300):
        wrong = bytearray(data)
        for place in rng.integers(6, len(data), 4):
            wrong[place] = rng.integers(256)
        has_more_frames(bytes(wrong), 2)


def test_decode__does_not_have_pillow_count_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(self: object) -> int:
        raise AssertionError("this reads every frame")

    monkeypatch.setattr(GifImagePlugin.GifImageFile, "n_frames", property(counted))
    with pytest.raises(ImageError, match="more than the allowed 100 frames"):
        decode(animation(101), max_frames=100)
    assert decode(animation(3), max_frames=3).header.width == 9


def test_has_more_frames__reads_no_further_than_the_limit() -> None:
    class Watched(bytes):
        furthest = 0

        def __getitem__(self, place):  # type: ignore[no-untyped-def]
            Watched.furthest = max(Watched.furthest, place)
            return super().__getitem__(place)

    data = Watched(animation(200))
    assert has_more_frames(data, 10)
    assert Watched.furthest < len(data) // 10
