"""Batches of items with equal keys: items wait a moment for others and run together.

Items wait in one bucket for each key; the oldest bucket that is full or has waited long enough runs
next. A batch that fails does not stop the loop. Ray's own `serve.batch` cannot group by shape, and
its loop dies when a sizing function raises (ray-project/ray#66140).
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

    Waiting items are shared evenly among the free lanes; a single item gets all lanes if all are
    free. An item does not wait if the last batch was a single one.

    Args:
        run: computes one result for each item, in order, on the given number of lanes. An exception
            among the results fails its item alone; one that is raised fails this batch alone.
        max_batch_size: most items in one batch.
        batch_wait_s: longest time an item waits for others while a lane is free.
        lanes: number of batches that run at once.
        patience_s: gives the seconds to wait longer while more items are expected.
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
        """Have one item computed.

        Args:
            key: the item's key; a batch has items of one key.
            item: the item.

        Raises:
            Exception: `run` raised it, or returned it for this item.
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
        """A context in which this many items are being prepared and will be submitted soon."""
        self._expected += count
        try:
            yield
        finally:
            self._expected -= count
            self._changed.set()

    async def close(self) -> None:
        """Stop, and cancel the items that wait."""
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
        except Exception as error:  # it fails this batch alone
            results = [error] * len(batch)
        finally:
            self._free += lanes
            self._changed.set()
        for waiting, result in zip(batch, results, strict=True):
            if waiting.future.done():  # its caller no longer waits
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)

    def _next(self, now: float) -> tuple[Key | None, float | None]:
        """The bucket to run now, or the seconds until there is one."""
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
        """Take a batch of items whose callers still wait, and the number of its lanes."""
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
