from __future__ import annotations

import io
import time

import numpy as np
import pytest
from PIL import Image

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


def test_decode__does_not_count_what_is_too_many() -> None:
    one = animation(1)
    end = 13 + 3 * 2 ** ((one[10] & 7) + 1)  # of the colours
    many = one[:end] + one[end:-1] * 100_000 + b";"
    began = time.perf_counter()
    with pytest.raises(ImageError, match="more than the allowed 100 frames"):
        decode(many, max_frames=100)
    assert time.perf_counter() - began < 1
