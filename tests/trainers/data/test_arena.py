"""The arena under several processes, full, torn, in another's way."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import stat
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pytest

from mimray.trainers.data import arena
from mimray.trainers.data.arena import Arena, Known, open_arena, release

COUNT = 40
PRINT = "0123456789abcdef" * 4
SIZE = (30, 20)
KNOWN = Known((60, 40), True)


def picture(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def opened(max_mib: int = 1, fingerprint: str = PRINT) -> Arena:
    found = open_arena(fingerprint, COUNT, max_mib)
    assert found is not None
    return found


def holds(found: Arena, index: int, scale: int = 1) -> bool:
    """Whether a picture is there; it must then be the right one."""
    pixels = found.get(index, scale)
    if pixels is None:
        return False
    height, width, _ = pixels.shape
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, picture(index, (width, height)))
    return True


def taken(node: Path) -> int:
    (state,) = node.rglob("state")
    return int.from_bytes(state.read_bytes()[:8], "little")


def write_all(node: Path, seed: int, start: Barrier) -> None:
    """What one of several processes does: everything, in an order of its own, reading as well."""
    arena.SHARED_MEMORY = node
    mine = opened()
    start.wait(60)
    for index in np.random.default_rng(seed // 2).permutation(COUNT).tolist():
        for scale in (1, 2):
            holds(mine, index, scale)
            mine.add(index, scale, KNOWN, picture(index, (SIZE[0] // scale, SIZE[1] // scale)))
            holds(mine, index, scale)


def write_half(node: Path) -> None:
    """A process that is killed while it writes."""
    arena.SHARED_MEMORY = node
    mine = opened()
    whole = mine._write

    def half(data: bytes, start: int) -> None:
        whole(data[: len(data) // 2], start)
        os.kill(os.getpid(), signal.SIGKILL)

    mine._write = half  # type: ignore[method-assign]
    mine.add(3, 1, KNOWN, picture(3))


def test_arena__gives_back_what_was_put_in(node: Path):
    mine, other = opened(), opened()
    assert mine.known(5) is None
    assert mine.get(5, 1) is None

    mine.add(5, 4, KNOWN, picture(5))

    for found in (mine, other):
        assert found.known(5) == KNOWN
        assert holds(found, 5, 4)
        assert not holds(found, 5, 1)
        assert found.known(4) is None


def test_arena__keeps_pixels_that_lie_apart_in_memory(node: Path):
    mine = opened()
    whole = picture(5, (61, 43))

    mine.add(5, 1, KNOWN, whole[2:22, 60:30:-1])

    found = mine.get(5, 1)
    assert found is not None
    np.testing.assert_array_equal(found, whole[2:22, 60:30:-1])


def test_arena__several_processes_write_at_once(node: Path):
    context = multiprocessing.get_context("forkserver")
    start = context.Barrier(4)
    processes = [context.Process(target=write_all, args=(node, seed, start)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0] * 4
    found = opened()
    assert all(holds(found, index, scale) for index in range(COUNT) for scale in (1, 2))
    # Each once: nothing is written by two.
    assert taken(node) == COUNT * (24 + 3 * 30 * 20 + 24 + 3 * 15 * 10 + 6)


def test_arena__a_killed_writer_leaves_a_gap_and_no_picture(node: Path):
    process = multiprocessing.get_context("spawn").Process(target=write_half, args=(node,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    mine = opened()
    gap = taken(node)
    assert gap > 0
    assert mine.known(3) is None
    assert not holds(mine, 3)
    mine.add(3, 1, KNOWN, picture(3))

    assert holds(mine, 3)
    assert taken(node) == 2 * gap


def test_arena__what_another_process_writes_is_left_to_it(node: Path):
    mine = opened()
    mine._index[4 * 3] = -os.getppid()

    mine.add(3, 1, KNOWN, picture(3))

    assert mine.known(3) is None
    assert taken(node) == 0


def test_arena__takes_what_fits_and_no_more(node: Path):
    mine = opened()
    large = 400, 100  # nine of them come to more than a MiB

    for index in range(12):
        mine.add(index, 1, KNOWN, picture(index, large))
    there = [holds(mine, index) for index in range(12)]
    mine.add(20, 1, KNOWN, picture(20))

    assert there == [True] * 8 + [False] * 4
    assert holds(mine, 20)  # a smaller one still fits
    assert taken(node) <= mine.bound
    assert mine.bound + 32 * COUNT == 1 << 20
    (pixels,) = node.rglob("pixels")
    assert pixels.stat().st_size == mine.bound


def test_arena__memory_that_runs_out_ends_the_writing_only(
    node: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    mine = opened()
    mine.add(0, 1, KNOWN, picture(0))

    def full(data: bytes, start: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(mine, "_write", full)
        mine.add(1, 1, KNOWN, picture(1))
    mine.add(2, 1, KNOWN, picture(2))

    assert [holds(mine, index) for index in range(3)] == [True, False, False]
    assert "no more decoded pictures are kept" in caplog.text


def test_arena__leaves_room_to_others(node: Path, monkeypatch: pytest.MonkeyPatch):
    mine = opened()
    monkeypatch.setattr(arena, "SPARE_BYTES", 1 << 60)

    mine.add(1, 1, KNOWN, picture(1))

    assert mine.known(1) is None


def test_open__another_bound_waits_until_nobody_uses_the_old(node: Path):
    first = opened(1)
    first.add(1, 1, KNOWN, picture(1))

    shared = opened(2)
    assert shared.bound == first.bound
    assert holds(shared, 1)
    del first, shared
    anew = opened(2)

    assert anew.bound == (2 << 20) - 32 * COUNT
    assert anew.known(1) is None
    assert len(list(node.rglob("pixels"))) == 1


def test_open__what_nobody_uses_goes_when_another_is_made(node: Path):
    idle, used = opened(fingerprint="a" * 64), opened(fingerprint="b" * 64)
    used.add(1, 1, KNOWN, picture(1))
    del idle

    opened(fingerprint="c" * 64)

    names = sorted(path.parent.name.split("-")[2][:1] for path in node.rglob("pixels"))
    assert names == ["b", "c"]
    assert holds(opened(fingerprint="b" * 64), 1)


def test_open__what_lacks_a_file_is_made_anew(node: Path):
    opened()
    (folder,) = (path.parent for path in node.rglob("pixels"))
    for name in ("pixels", "users", "state", "index"):
        (folder / name).unlink()
        opened()
        assert sorted(path.name for path in folder.iterdir()) == [
            "index",
            "pixels",
            "state",
            "users",
        ]


@pytest.mark.parametrize("decoder", ["PIL", "simplejpeg"])
def test_open__another_decoder_has_pixels_of_its_own(
    node: Path, monkeypatch: pytest.MonkeyPatch, decoder: str
):
    mine = opened()
    mine.add(1, 1, KNOWN, picture(1))

    monkeypatch.setattr(f"{decoder}.__version__", "99")

    assert opened().known(1) is None


def test_open__in_the_cache_folder_where_shared_memory_cannot_be(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (node / f"mimray-{os.getuid()}").mkdir(mode=0o755)  # as another user may have made it

    mine = opened()
    mine.add(1, 1, KNOWN, picture(1))

    (pixels,) = tmp_path.rglob("pixels")
    assert pixels.is_relative_to(tmp_path / "cache" / "mimray")
    assert holds(opened(), 1)
    release(PRINT)
    assert not list(tmp_path.rglob("pixels"))


def test_open__none_where_there_is_no_room(
    node: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    assert open_arena(PRINT, 1 << 20, 1) is None
    assert "does not hold an index of 1048576 pictures" in caplog.text
    monkeypatch.setattr(arena, "SPARE_BYTES", 1 << 60)

    assert open_arena(PRINT, COUNT, 1) is None
    assert "neither /dev/shm nor the cache folder has 1 MiB to spare" in caplog.text
    assert not list(node.rglob("pixels"))


def test_open__for_this_user_alone(node: Path):
    opened()

    for path in (node / f"mimray-{os.getuid()}").rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    (folder,) = (path.parent for path in node.rglob("pixels"))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.name.startswith(f"decoded-{os.getuid()}-{PRINT[:32]}")


def test_release__whoever_has_it_open_keeps_it(node: Path, caplog: pytest.LogCaptureFixture):
    mine = opened()
    mine.add(1, 1, KNOWN, picture(1))

    with caplog.at_level(logging.WARNING):
        release(PRINT)
        release(PRINT)
        release("f" * 64)

    assert holds(mine, 1)
    mine.add(2, 1, KNOWN, picture(2))
    assert holds(mine, 2)
    assert opened().known(1) is None
    assert caplog.text == ""


def test_arena__files_are_closed_with_it(node: Path):
    before = len(os.listdir("/proc/self/fd"))

    for _ in range(5):
        opened()

    assert len(os.listdir("/proc/self/fd")) == before
