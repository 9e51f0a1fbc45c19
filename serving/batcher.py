"""Requests of equal shape, gathered for a moment and run through the model together.

Ray's own `serve.batch` cannot group by shape and its loop dies when a sizing function
raises (ray-project/ray#66140), so this one exists: items wait in one bucket a key, the
oldest bucket that is full or has waited long enough runs next, and whatever a batch does,
the loop goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Waiting(Generic[Item, Result]):
    item: Item
    future: asyncio.Future[Result]
    deadline: float


class Batcher(Generic[Key, Item, Result]):
    """Groups items by key and hands them to `run`, one batch at a time.

    Args:
        run: computes one result an item, in order; an exception among the results fails its
            item alone, an exception raised fails this batch and no other.
        max_batch_size: most items in one batch.
        batch_wait_s: longest time an item waits for company while the model is free.
    """

    def __init__(
        self,
        run: Callable[[Key, Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        max_batch_size: int,
        batch_wait_s: float,
    ) -> None:
        assert max_batch_size >= 1
        self._run = run
        self._max_batch_size = max_batch_size
        self._batch_wait_s = batch_wait_s
        self._buckets: dict[Key, list[_Waiting[Item, Result]]] = {}
        self._arrival = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None

    async def submit(self, key: Key, item: Item) -> Result:
        """The result for one item.

        Raises:
            Exception: what `run` raised, or gave back for this item.
        """
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._work())
        future: asyncio.Future[Result] = loop.create_future()
        waiting = _Waiting(item, future, loop.time() + self._batch_wait_s)
        self._buckets.setdefault(key, []).append(waiting)
        self._arrival.set()
        return await future

    async def close(self) -> None:
        """Stop; whoever still waits gets a cancellation."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
            self._loop_task = None
        for bucket in self._buckets.values():
            for waiting in bucket:
                waiting.future.cancel()
        self._buckets.clear()

    async def _work(self) -> None:
        while True:
            key, batch = await self._next_batch()
            batch = [waiting for waiting in batch if not waiting.future.done()]
            if not batch:
                continue
            try:
                results = await self._run(key, [waiting.item for waiting in batch])
                assert len(results) == len(batch), "run must give one result an item"
            except Exception as error:  # whatever it is, it belongs to this batch alone
                results = [error] * len(batch)
            for waiting, result in zip(batch, results, strict=True):
                if waiting.future.done():  # its caller went away meanwhile
                    continue
                if isinstance(result, Exception):
                    waiting.future.set_exception(result)
                else:
                    waiting.future.set_result(result)

    async def _next_batch(self) -> tuple[Key, list[_Waiting[Item, Result]]]:
        """Wait for a bucket that is full or old enough, and take up to a batch from it."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrival.clear()
            full = [k for k, b in self._buckets.items() if len(b) >= self._max_batch_size]
            candidates = full or list(self._buckets)
            if candidates:
                key = min(candidates, key=lambda k: self._buckets[k][0].deadline)
                oldest = min(self._buckets, key=lambda k: self._buckets[k][0].deadline)
                remaining_s = self._buckets[oldest][0].deadline - loop.time()
                if remaining_s <= 0:  # age before size, or a rare shape would starve
                    return oldest, self._take(oldest)
                if full:
                    return key, self._take(key)
            try:
                await asyncio.wait_for(
                    self._arrival.wait(), timeout=remaining_s if candidates else None
                )
            except TimeoutError:
                continue

    def _take(self, key: Key) -> list[_Waiting[Item, Result]]:
        bucket = self._buckets[key]
        batch, rest = bucket[: self._max_batch_size], bucket[self._max_batch_size :]
        if rest:
            self._buckets[key] = rest
        else:
            del self._buckets[key]
        return batch
