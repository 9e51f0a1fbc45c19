"""Requests of equal shape, gathered for a moment and run through the model together.

Ray's own `serve.batch` cannot group by shape and its loop dies when a sizing function
raises (ray-project/ray#66140), so this one exists: items wait in one bucket a key, the
oldest bucket that is full or has waited long enough runs next, and whatever a batch does,
the loop goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
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
    """Groups items by key and hands them to `run`, a batch to each lane that is free.

    What waits is shared out evenly among the free lanes; a single item gets all of them when all
    are free. Whoever came alone the last time is taken to be alone again, and waits for nobody.

    Args:
        run: computes one result an item, in order, on the number of lanes it is told; an exception
            among the results fails its item alone, an exception raised fails this batch and no
            other.
        max_batch_size: most items in one batch.
        batch_wait_s: longest time an item waits for company while a lane is free.
        lanes: batches that run at once.
        patience_s: how much longer to wait while more are expected; asked each time.
    """

    def __init__(
        self,
        run: Callable[[Key, Sequence[Item], int], Awaitable[Sequence[Result | Exception]]],
        *,
        max_batch_size: int,
        batch_wait_s: float,
        lanes: int = 1,
        patience_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        assert max_batch_size >= 1
        assert lanes >= 1
        self._run = run
        self._max_batch_size = max_batch_size
        self._batch_wait_s = batch_wait_s
        self._lanes = self._free = lanes
        self._patience_s = patience_s
        self._expected = 0
        self._came_alone = False
        self._buckets: dict[Key, list[_Waiting[Item, Result]]] = {}
        self._changed = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()

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
        self._changed.set()
        return await future

    @contextmanager
    def expecting(self, count: int) -> Iterator[None]:
        """While inside, this many items are being made ready and will be submitted soon."""
        self._expected += count
        try:
            yield
        finally:
            self._expected -= count
            self._changed.set()

    async def close(self) -> None:
        """Stop; whoever still waits gets a cancellation."""
        tasks = [*self._running, *([self._loop_task] if self._loop_task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop_task = None
        for bucket in self._buckets.values():
            for waiting in bucket:
                waiting.future.cancel()
        self._buckets.clear()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            key, wait_s = self._next(loop.time())
            if key is not None:
                batch, lanes = self._take(key)
                if batch:
                    self._free -= lanes
                    task = loop.create_task(self._finish(key, batch, lanes))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
                continue
            try:
                await asyncio.wait_for(self._changed.wait(), timeout=wait_s)
            except TimeoutError:
                continue

    async def _finish(self, key: Key, batch: Sequence[_Waiting[Item, Result]], lanes: int) -> None:
        results: Sequence[Result | Exception]
        try:
            results = await self._run(key, [waiting.item for waiting in batch], lanes)
            assert len(results) == len(batch), "run must give one result an item"
        except Exception as error:  # whatever it is, it belongs to this batch alone
            results = [error] * len(batch)
        finally:
            self._free += lanes
            self._changed.set()
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():  # its caller went away meanwhile
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)

    def _next(self, now: float) -> tuple[Key | None, float | None]:
        """The bucket to run now, or how long until there will be one."""
        if not self._buckets or not self._free:
            return None, None
        oldest = min(self._buckets, key=lambda k: self._buckets[k][0].deadline)
        wait_s = self._buckets[oldest][0].deadline - now
        if self._expected:
            wait_s += self._patience_s()
        elif self._came_alone and self._free == self._lanes:
            return oldest, None
        if wait_s <= 0:  # age before size, or a rare shape would starve
            return oldest, None
        full = [k for k, b in self._buckets.items() if len(b) >= self._max_batch_size]
        if full:
            return min(full, key=lambda k: self._buckets[k][0].deadline), None
        return None, wait_s

    def _take(self, key: Key) -> tuple[list[_Waiting[Item, Result]], int]:
        """Up to a batch whose callers are still there, and how many lanes it gets."""
        bucket = [waiting for waiting in self._buckets[key] if not waiting.future.done()]
        alone = len(bucket) == 1 and len(self._buckets) == 1 and self._free == self._lanes
        size = min(self._max_batch_size, math.ceil(len(bucket) / self._free))
        batch, rest = bucket[:size], bucket[size:]
        if rest:
            self._buckets[key] = rest
        else:
            del self._buckets[key]
        self._came_alone = alone
        return batch, self._lanes if alone else 1
