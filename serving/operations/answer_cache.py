"""A cache of answers, bounded in bytes; equal requests at once are computed once."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mimray.serving.operations.calls import Reply

# An answer may take this part of the cache at most, so that it does not push out all others.
_LARGEST_PART = 4
# Of an answer beside its text: objects, dictionaries, the key.
_OVERHEAD_BYTES = 1024


def cost(reply: Reply) -> int:
    """Bytes of memory that an answer takes, roughly; its headers may outweigh a small body."""
    headers = sum(len(name) + len(value) for name, value in reply.headers.items())
    return len(reply.body) + headers + _OVERHEAD_BYTES


def digest(*parts: bytes | str) -> str:
    """The key of a request: BLAKE2b-256 of its parts, each with its length before it."""
    hasher = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


@dataclass
class _Running:
    """A computation, and the number of requests that wait for it."""

    task: asyncio.Task[Reply]
    waiters: int = 0


class AnswerCache:
    """A cache of the answers used last.

    Args:
        max_bytes: most bytes of all kept answers; with 0 none is kept, and equal requests at once
            still share one.

    Attributes:
        size: bytes of the kept answers.
    """

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Reply] = OrderedDict()
        self._running: dict[str, _Running] = {}

    async def get_or_compute(
        self, key: str, compute: Callable[[], Awaitable[Reply]]
    ) -> tuple[Reply, bool]:
        """Get the answer of a key.

        A failure is not kept, and goes to all requests that wait. A computation ends early when no
        request waits for it any more.

        Args:
            key: the `digest` of all that the answer depends on.
            compute: computes the answer.

        Returns:
            The answer, and True if it was kept or being computed already.

        Raises:
            Exception: `compute` raised it.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key], True
        running = self._running.get(key)
        hit = running is not None
        if running is None:
            running = _Running(asyncio.ensure_future(self._computed(key, compute)))
            self._running[key] = running
        running.waiters += 1
        try:
            return await asyncio.shield(running.task), hit
        finally:
            running.waiters -= 1
            if running.waiters == 0 and not running.task.done():
                # No later request may join a computation that is being ended.
                self._running.pop(key, None)
                running.task.cancel()

    async def _computed(self, key: str, compute: Callable[[], Awaitable[Reply]]) -> Reply:
        try:
            reply = await compute()
        finally:
            running = self._running.get(key)
            # It may have been ended, and begun again for another request.
            mine = running is not None and running.task is asyncio.current_task()
            if mine:
                del self._running[key]
        if mine and cost(reply) <= self._max_bytes // _LARGEST_PART:
            self._kept[key] = reply
            self.size += cost(reply)
            while self.size > self._max_bytes:
                _, oldest = self._kept.popitem(last=False)
                self.size -= cost(oldest)
        return reply
