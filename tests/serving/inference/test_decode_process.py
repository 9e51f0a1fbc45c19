"""Pictures whose decoders would hold others up: decoded as ever, elsewhere, and not for long."""

from __future__ import annotations

import asyncio
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from mimray.serving.config import Limits, ReplicaConfig
from mimray.serving.inference.decode_process import DecodeProcess, is_quick
from mimray.serving.inference.options import Options
from mimray.serving.inference.predictor import Predictor
from mimray.serving.wire.errors import TooLargeError, UnusablePictureError
from mimray.trainers.data.decode import decode
from mimray.trainers.errors import ImageError

SLOW = ("GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")


@pytest.fixture(scope="module")
def process() -> Iterator[DecodeProcess]:
    made = DecodeProcess(timeout_s=60, max_pixels=100_000, max_frames=3)
    yield made
    made.close()


def plain_ppm(side: int) -> bytes:
    """A picture that Pillow reads in Python, a number at a time."""
    return f"P3 {side} {side} 255\n".encode() + b"1 " * (3 * side * side)


@pytest.mark.parametrize("format", SLOW)
def test_decode__gives_what_it_gives_here(
    process: DecodeProcess, picture: Callable[..., bytes], format: str
) -> None:
    data = picture(1, (90, 70), format)
    assert not is_quick(data)
    image, size = process.decode(data)
    expected = decode(data)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected.image))
    assert size == (70, 90) == (expected.header.height, expected.header.width)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_is_quick__what_holds_nobody_up(picture: Callable[..., bytes], format: str) -> None:
    assert is_quick(picture(1, (90, 70), format))


def test_decode__refuses_as_it_refuses_here(
    process: DecodeProcess, picture: Callable[..., bytes]
) -> None:
    for data, reason in (
        (b"nothing", "not_an_image"),
        (b"", "empty"),
        (picture(1, (400, 300), "BMP"), "too_large"),
        (picture(1, (90, 70), "TIFF")[:200], "truncated"),
    ):
        with pytest.raises(ImageError) as here:
            decode(data, max_pixels=100_000)
        with pytest.raises(ImageError) as there:
            process.decode(data)
        assert there.value.reason == here.value.reason == reason
        assert str(there.value) == str(here.value)


def test_decode__that_takes_too_long_is_ended_and_the_next_one_decoded(
    picture: Callable[..., bytes],
) -> None:
    process = DecodeProcess(timeout_s=0.5, max_pixels=10_000_000, max_frames=3)
    with pytest.raises(ImageError, match="longer than 0.5 s") as error:
        process.decode(plain_ppm(3000))
    assert error.value.reason == "too_slow"
    assert process.decode(picture(1, (90, 70), "BMP"))[1] == (70, 90)
    process.close()


def test_decoder__that_dies_takes_one_picture_with_it(picture: Callable[..., bytes]) -> None:
    process = DecodeProcess(timeout_s=60, max_pixels=100_000, max_frames=3)
    data = picture(1, (90, 70), "BMP")
    process.decode(data)
    child = process._process
    assert child is not None
    os.kill(child.pid, signal.SIGSTOP)  # so that it is there when it is asked, and gone before
    asked = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {child.pid}"])
    with pytest.raises(ImageError, match="ended without an answer"):
        process.decode(data)
    asked.wait()
    assert process.decode(data)[1] == (70, 90)
    process.close()


def test_decode__where_more_files_are_open_than_select_takes(
    picture: Callable[..., bytes],
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    with ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(os.devnull))
        process = DecodeProcess(timeout_s=60, max_pixels=100_000, max_frames=3)
        files.callback(process.close)
        assert process.decode(picture(1, (90, 70), "BMP"))[1] == (70, 90)
        assert process._process is not None
        assert process._process.stdout is not None
        assert process._process.stdout.fileno() > 1023
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_decoder__ends_with_its_owner(tmp_path: Path, picture: Callable[..., bytes]) -> None:
    (tmp_path / "a.bmp").write_bytes(picture(1, (90, 70), "BMP"))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from mimray.serving.inference.decode_process import DecodeProcess\n"
        "process = DecodeProcess(timeout_s=60, max_pixels=100_000, max_frames=3)\n"
        f"process.decode(Path({str(tmp_path / 'a.bmp')!r}).read_bytes())\n"
        "print(process._process.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    owner.kill()
    owner.wait()
    owner.stdout.close()
    child.wait(timeout=60)


def run(bundle: Path, work: Callable[[Predictor], Any], **limits: Any) -> Any:
    async def main() -> Any:
        predictor = Predictor(bundle, ReplicaConfig(device="cpu"), Limits(**limits))
        try:
            return await work(predictor)
        finally:
            await predictor.close()

    return asyncio.run(main())


def test_predictor__small_pictures_do_not_wait_for_slow_ones(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (3000, 3000)).save(file, "JPEG2000")
    assert len(file.getvalue()) < 2000  # a few bytes, and seconds of work

    async def work(predictor: Predictor) -> list[int]:
        slow = asyncio.create_task(predictor.predict([file.getvalue()] * 4, Options()))
        await asyncio.sleep(0)
        done = 0
        for seed in range(5):
            await predictor.predict([picture(seed)], Options())
            done += not slow.done()
        return [done, len(await slow)]

    assert run(bundles["alpha"], work) == [5, 4]


def test_predictor__one_request_leaves_turns_to_others(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    large = picture(1, (3000, 2000), "JPEG")

    async def work(predictor: Predictor) -> bool:
        many = asyncio.create_task(predictor.predict([large] * 12, Options()))
        await asyncio.sleep(0)
        await predictor.predict([picture(2)], Options())
        was_first = not many.done()
        await many
        return was_first

    assert run(bundles["alpha"], work)


def test_predictor__pixels_of_a_request_have_a_limit(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    async def work(predictor: Predictor) -> Any:
        assert len(await predictor.predict([picture(1)] * 3, Options())) == 3
        with pytest.raises(TooLargeError, match="20000 pixels together"):
            await predictor.predict([picture(1)] * 20, Options())

    run(bundles["alpha"], work, request_pixels=20_000)


def test_predictor__says_which_picture_was_too_slow(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    async def work(predictor: Predictor) -> Any:
        with pytest.raises(UnusablePictureError, match="picture 1 cannot be used") as error:
            await predictor.predict([picture(1), plain_ppm(2000)], Options())
        return error.value.details["pictures"][0]["reason"]

    assert run(bundles["alpha"], work, decode_timeout_s=0.3) == "too_slow"
