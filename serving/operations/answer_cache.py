"""Answers kept by what was asked, bounded in bytes; equal requests at once are computed once."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from mimray.serving.operations.calls import Reply

# One answer may not push out all others.
_LARGEST_PART = 4
# Of an answer beside its text: objects, dictionaries, the key.
_OVERHEAD_BYTES = 1024


def cost(reply: Reply) -> int:
    """Bytes of memory an answer takes, about; headers with metadata may outweigh a small body."""
    headers = sum(len(name) + len(value) for name, value in reply.headers.items())
    return len(reply.body) + headers + _OVERHEAD_BYTES


def digest(*parts: bytes | str) -> str:
    """A name for what was asked: BLAKE2b-256 of the parts, each with its length before it."""
    hasher = hashlib.blake2b(digest_size=32)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        hasher.update(len(data).to_bytes(8, "little"))
        hasher.update(data)
    return hasher.hexdigest()


@dataclass
class _Running:
    """A computation, and how many wait for it."""

    task: asyncio.Task[Reply]
    waiters: int = 0


class AnswerCache:
    """The answers last asked for.

    Args:
        max_bytes: of all answers kept; 0 keeps none, and equal requests at once still share one.

    Attributes:
        size: bytes kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.size = 0
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Reply] = OrderedDict()
        self._running: dict[str, _Running] = {}

    async def get_or_compute(
        self, key: str, compute: Callable[[], Awaitable[Reply]]
    ) -> tuple[Reply, bool]:
        """The answer under a key, and whether it was there or on its way.

        A failure is kept for nobody, and goes to all who wait. One who stops waiting takes the
        computation from nobody else; it ends when nobody is left.

        Args:
            key: `digest` of all that the answer follows from.
            compute: makes it.

        Raises:
            Exception: what `compute` raised.
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
                # Nobody who asks from now on may join what is being ended.
                self._running.pop(key, None)
                running.task.cancel()

    async def _computed(self, key: str, compute: Callable[[], Awaitable[Reply]]) -> Reply:
        try:
            reply = await compute()
        finally:
            running = self._running.get(key)
            # It may have been given up, and begun anew by another.
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
