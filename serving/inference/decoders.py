"""Threads beside the model in which pictures are decoded, and turns of the requests in them."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mimray.serving.inference.decode_process import is_quick
from mimray.serving.inference.devices import torch_threads
from mimray.serving.inference.preprocess import Picture, refuse_unusable
from mimray.serving.inference.timeline import Timeline
from mimray.serving.wire.errors import TooLargeError
from mimray.trainers.data.geometry import Size

Result = TypeVar("Result")


class Decoders:
    """Threads for pictures, and one more for those in formats that are slow to decode.

    Args:
        num_threads: number of the threads.
        request_pixels: most pixels of the pictures of one request together.
    """

    def __init__(self, num_threads: int, request_pixels: int) -> None:
        self._num_threads = num_threads
        self._request_pixels = request_pixels
        self._threads = torch_threads(num_threads, "decode", num_threads=1)
        self._slow = torch_threads(1, "slow-decode", num_threads=1)

    async def prepare(
        self,
        pictures: Sequence[Picture],
        prepare: Callable[[Picture], tuple[Size, Result]],
        timeline: Timeline,
    ) -> list[Result]:
        """Prepare the pictures of a request, in order.

        A request has no more pictures in the queue than there are threads, so that others come to
        their turn, and one at a time in the slow thread.

        Args:
            pictures: the pictures.
            prepare: gives the (height, width) of a picture, and what is made of it.
            timeline: gets the phases.

        Raises:
            UnusablePictureError: some pictures cannot be used; it lists all of them.
            TooLargeError: the pictures have too many pixels together.
        """
        loop = asyncio.get_running_loop()
        asked = time.perf_counter()
        turns = {
            self._threads: self.turns(),
            self._slow: asyncio.Semaphore(1),
        }
        left = self._request_pixels

        def timed(picture: Picture) -> Result:
            nonlocal left
            if left <= 0:
                raise TooLargeError(
                    f"the pictures have more than {self._request_pixels} pixels together",
                    hint="send several requests",
                )
            started = time.perf_counter()
            try:
                source, found = prepare(picture)
                left -= math.prod(source)
                return found
            finally:
                timeline.add("queue", asked, started)
                timeline.add("decode", started, time.perf_counter())

        async def one(picture: Picture) -> Result:
            is_slow = isinstance(picture, bytes) and not is_quick(picture)
            threads: ThreadPoolExecutor = self._slow if is_slow else self._threads
            async with turns[threads]:
                return await loop.run_in_executor(threads, timed, picture)

        outcomes = await asyncio.gather(*map(one, pictures), return_exceptions=True)
        refuse_unusable(outcomes)
        return [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]

    def turns(self) -> asyncio.Semaphore:
        """The turns of one request in the threads."""
        return asyncio.Semaphore(self._num_threads)

    async def run(self, work: Callable[[], Result], turns: asyncio.Semaphore) -> Result:
        """Run a function in one of the threads.

        Args:
            work: the function.
            turns: the request's, from `turns`.
        """
        async with turns:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Stop the threads."""
        for threads in (self._threads, self._slow):
            threads.shutdown(wait=False, cancel_futures=True)
