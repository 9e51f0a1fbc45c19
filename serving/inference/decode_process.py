"""Decoding in a process of its own, which is ended where it takes too long.

Pillow's decoders of JPEG and PNG let other threads go on meanwhile. Others hold the interpreter,
are written in Python, or make seconds of work of a few bytes. So that they hold up nobody else,
they run here; one that crashes takes no replica with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any

from mimray.trainers.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

    from mimray.trainers.data.geometry import Size

# JPEG, PNG, and WebP, which needs half a second at most.
_QUICK = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
_LENGTH_BYTES = 8
_READ_BYTES = 1 << 20
# Of the process itself, and of a pixel in decoders that keep it as several 32-bit numbers.
_BASE_BYTES, _PIXEL_BYTES = 2 << 30, 48
_PR_SET_PDEATHSIG = 1


def is_quick(data: bytes) -> bool:
    """True if a picture's decoder holds nobody up."""
    return data.startswith(_QUICK)


class DecodeProcess:
    """Decodes one picture after another in a process, which is started at the first.

    Args:
        timeout_s: longest time that one may take.
        max_pixels: most pixels of one.
        max_frames: most frames of one.
    """

    def __init__(self, *, timeout_s: float, max_pixels: int, max_frames: int) -> None:
        self._timeout_s = timeout_s
        self._limits = {"max_pixels": max_pixels, "max_frames": max_frames}
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes) -> tuple[Image.Image, Size]:
        """The upright RGB picture, and its (height, width).

        Args:
            data: the encoded picture.

        Raises:
            ImageError: as of `decode`; or `too_slow`, or `broken` where the decoder crashes.
        """
        from PIL import Image

        process = self._started()
        try:
            assert process.stdin is not None
            _write(process.stdin, {**self._limits, "num_bytes": len(data)}, data)
            answer, pixels = self._answer(process)
        except TimeoutError:
            self.close()
            raise ImageError(
                "too_slow",
                f"it takes longer than {self._timeout_s:g} s to decode",
                hint="send it as JPEG or PNG",
            ) from None
        except (OSError, EOFError):
            self.close()
            raise ImageError("broken", "the decoder ended without an answer") from None
        if "reason" in answer:
            raise ImageError(answer["reason"], answer["message"], hint=answer["hint"])
        width, height = answer["size"]
        return Image.frombytes("RGB", (width, height), pixels), (height, width)

    def close(self) -> None:
        """End the process; the next picture starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # What this process imports may come from where only it was told to look.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            assert self._process.stdout is not None
            # Its start is no part of the time that a picture may take.
            os.read(self._process.stdout.fileno(), 1)
        return self._process

    def _answer(self, process: subprocess.Popen[bytes]) -> tuple[dict[str, Any], bytes]:
        assert process.stdout is not None
        reader = _Reader(process.stdout, time.monotonic() + self._timeout_s)
        answer = json.loads(reader.read(int.from_bytes(reader.read(_LENGTH_BYTES), "little")))
        return answer, reader.read(answer.get("num_bytes", 0))


class _Reader:
    """Reads a pipe until a time."""

    def __init__(self, pipe: IO[bytes], deadline: float) -> None:
        self._descriptor, self._deadline = pipe.fileno(), deadline
        # Not `select`, which takes no descriptor above 1023: a replica has one a connection.
        self._readable = select.poll()
        self._readable.register(self._descriptor, select.POLLIN)

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            left_s = self._deadline - time.monotonic()
            if left_s <= 0 or not self._readable.poll(1000 * left_s):
                raise TimeoutError
            part = os.read(self._descriptor, min(size, _READ_BYTES))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _write(pipe: IO[bytes], header: dict[str, object], content: bytes) -> None:
    text = json.dumps(header).encode()
    pipe.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    pipe.write(content)
    pipe.flush()


def _answered(data: bytes, max_pixels: int, max_frames: int) -> tuple[dict[str, object], bytes]:
    from mimray.trainers.data.decode import decode

    try:
        image = decode(data, max_pixels=max_pixels, max_frames=max_frames).image
    except ImageError as error:
        return {"reason": error.reason, "message": str(error.args[0]), "hint": error.hint}, b""
    except MemoryError:
        return {"reason": "too_large", "message": "no memory to decode it", "hint": ""}, b""
    pixels = image.tobytes()
    return {"size": image.size, "num_bytes": len(pixels)}, pixels


def main() -> None:
    """Answer until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; the replica ends this
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Nothing that a decoder prints may be taken for an answer.
    os.dup2(2, 1)
    import mimray.trainers.data.decode  # noqa: F401

    answers.write(b"\n")
    answers.flush()
    while length := requests.read(_LENGTH_BYTES):
        asked = json.loads(requests.read(int.from_bytes(length, "little")))
        data = requests.read(asked["num_bytes"])
        most = _BASE_BYTES + _PIXEL_BYTES * asked["max_pixels"]
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        _write(answers, *_answered(data, asked["max_pixels"], asked["max_frames"]))


if __name__ == "__main__":
    main()
