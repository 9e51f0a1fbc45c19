from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimray.serving.operations.answer_cache import AnswerCache, cost, digest
from mimray.serving.operations.calls import Reply


def _reply(size: int) -> Reply:
    return Reply(200, {}, bytes(size))


@given(st.lists(st.integers(0, 9)), st.integers(0, 20_000))
def test_cache__never_holds_more_than_allowed_and_the_newest_stay(
    asked: list[int], max_bytes: int
) -> None:
    async def main() -> None:
        cache = AnswerCache(max_bytes)
        kept: list[int] = []  # the oldest first
        for number in asked:

            async def compute(size: int = number * 500) -> Reply:
                return _reply(size)

            reply, hit = await cache.get_or_compute(str(number), compute)
            assert len(reply.body) == number * 500
            assert hit == (number in kept)
            if number in kept:
                kept.remove(number)
            if cost(reply) <= max_bytes // 4:
                kept.append(number)
            while sum(cost(_reply(n * 500)) for n in kept) > max_bytes:
                kept.pop(0)
            assert cache.size == sum(cost(_reply(n * 500)) for n in kept) <= max_bytes

    asyncio.run(main())


def test_cache__equal_requests_at_once_are_computed_once() -> None:
    async def main() -> None:
        cache = AnswerCache(0)
        count = 0
        go = asyncio.Event()

        async def compute() -> Reply:
            nonlocal count
            count += 1
            await go.wait()
            return _reply(3)

        jobs = [asyncio.ensure_future(cache.get_or_compute("a", compute)) for _ in range(3)]
        await asyncio.sleep(0)
        jobs[0].cancel()  # who came first leaves; the others get theirs
        await asyncio.sleep(0)
        go.set()
        assert [hit for _, hit in await asyncio.gather(*jobs[1:])] == [True, True]
        assert count == 1
        await cache.get_or_compute("a", compute)
        assert count == 2  # nothing was kept

    asyncio.run(main())


def test_cache__ends_what_nobody_waits_for() -> None:
    async def main() -> None:
        cache = AnswerCache(10_000)
        ended = asyncio.Event()

        async def forever() -> Reply:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            raise AssertionError

        job = asyncio.ensure_future(cache.get_or_compute("a", forever))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        job.cancel()
        await asyncio.wait_for(ended.wait(), 1)

        async def compute() -> Reply:
            return _reply(1)

        assert not (await cache.get_or_compute("a", compute))[1]

    asyncio.run(main())


def test_cache__what_was_given_up_counts_for_nothing_even_if_it_goes_on() -> None:
    async def main() -> None:
        cache = AnswerCache(10_000)
        go = asyncio.Event()

        async def stubborn() -> Reply:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                await go.wait()
            return _reply(1)

        async def quick() -> Reply:
            return _reply(2)

        job = asyncio.ensure_future(cache.get_or_compute("a", stubborn))
        for _ in range(2):
            await asyncio.sleep(0)
        job.cancel()
        for _ in range(2):
            await asyncio.sleep(0)
        assert len((await cache.get_or_compute("a", quick))[0].body) == 2
        go.set()
        for _ in range(3):
            await asyncio.sleep(0)
        reply, hit = await cache.get_or_compute("a", stubborn)
        assert (len(reply.body), hit) == (2, True)
        assert cache.size == cost(reply)

    asyncio.run(main())


def test_cache__small_answers_cost_more_than_their_bodies() -> None:
    async def main() -> None:
        async def empty() -> Reply:
            return _reply(0)

        cache = AnswerCache(20_000)
        for number in range(100):
            await cache.get_or_compute(str(number), empty)
        assert not (await cache.get_or_compute("0", empty))[1]
        off = AnswerCache(0)
        await off.get_or_compute("a", empty)
        assert not (await off.get_or_compute("a", empty))[1]

    asyncio.run(main())


def test_cache__failures_are_kept_for_nobody() -> None:
    async def main() -> None:
        cache = AnswerCache(100)

        async def fail() -> Reply:
            await asyncio.sleep(0)
            raise ValueError("no")

        both = await asyncio.gather(
            cache.get_or_compute("a", fail), cache.get_or_compute("a", fail), return_exceptions=True
        )
        assert [type(error) for error in both] == [ValueError, ValueError]
        with pytest.raises(ValueError, match="no"):
            await cache.get_or_compute("a", fail)

    asyncio.run(main())


def test_digest__parts_do_not_run_into_each_other() -> None:
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest("abc", "")}) == 4
    assert digest(b"a") == digest("a")
    assert len(digest()) == 64
