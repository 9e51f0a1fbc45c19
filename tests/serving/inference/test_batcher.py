from __future__ import annotations

import asyncio
from collections.abc import Sequence

from mimray.serving.inference.batcher import Batcher


def _batcher(
    log: list[tuple[str, list[int]]], *, max_batch_size: int = 4, batch_wait_s: float = 0.01
) -> Batcher[str, int, int]:
    async def run(key: str, items: Sequence[int], lanes: int) -> list[int | Exception]:
        log.append((key, list(items)))
        await asyncio.sleep(0.005)
        if 13 in items:
            raise RuntimeError("the whole batch")
        return [ValueError("one item") if item == 7 else item * 10 for item in items]

    return Batcher(run, max_batch_size=max_batch_size, batch_wait_s=batch_wait_s)


def test_batcher__groups_by_key_and_never_exceeds_the_size() -> None:
    async def main() -> None:
        log: list[tuple[str, list[int]]] = []
        batcher = _batcher(log)
        jobs = [batcher.submit("ab"[i % 2], i) for i in range(12) if i not in (7,)]
        assert await asyncio.gather(*jobs) == [i * 10 for i in range(12) if i != 7]
        assert max(len(items) for _, items in log) == 4
        assert all({i % 2 for i in items} == {"ab".index(key)} for key, items in log)
        assert len(log) == 4  # 6 and 5 items in batches of at most 4
        await batcher.close()

    asyncio.run(main())


def test_batcher__failures_stay_where_they_happened() -> None:
    async def main() -> None:
        batcher = _batcher([])
        results = await asyncio.gather(
            *(batcher.submit("a", i) for i in (1, 7, 2)),
            *(batcher.submit("b", i) for i in (13, 3)),
            return_exceptions=True,
        )
        assert results[0] == 10
        assert isinstance(results[1], ValueError)
        assert results[2] == 20
        assert [type(r) for r in results[3:]] == [RuntimeError, RuntimeError]
        assert await batcher.submit("a", 5) == 50  # and the loop goes on
        await batcher.close()

    asyncio.run(main())


def test_batcher__cancelled_callers_are_left_out() -> None:
    async def main() -> None:
        log: list[tuple[str, list[int]]] = []
        batcher = _batcher(log)
        gone = asyncio.create_task(batcher.submit("a", 1))
        stays = asyncio.create_task(batcher.submit("a", 2))
        await asyncio.sleep(0)
        gone.cancel()
        assert await stays == 20
        assert log == [("a", [2])]
        await batcher.close()

    asyncio.run(main())


def test_batcher__rare_key_is_not_starved_by_full_batches() -> None:
    async def main() -> None:
        log: list[tuple[str, list[int]]] = []
        batcher = _batcher(log, max_batch_size=1)

        async def flood() -> None:
            for i in range(20, 40):
                await batcher.submit("busy", i)

        floods = [asyncio.create_task(flood()) for _ in range(3)]
        await asyncio.sleep(0)
        assert await batcher.submit("rare", 1) == 10
        assert not any(task.done() for task in floods)
        await asyncio.gather(*floods)
        await batcher.close()

    asyncio.run(main())


def test_batcher__lanes_share_what_waits_and_one_item_gets_them_all() -> None:
    async def main() -> None:
        log: list[tuple[list[int], int]] = []
        running = most = 0

        async def run(key: str, items: Sequence[int], lanes: int) -> list[int | Exception]:
            nonlocal running, most
            log.append((list(items), lanes))
            running += lanes
            most = max(most, running)
            await asyncio.sleep(0.005)
            running -= lanes
            return list(items)

        batcher = Batcher(run, max_batch_size=8, batch_wait_s=0.001, lanes=2)
        assert await batcher.submit("a", 1) == 1
        assert log == [([1], 2)]
        assert await asyncio.gather(*(batcher.submit("a", i) for i in range(6))) == list(range(6))
        assert log[1:] == [([0, 1, 2], 1), ([3, 4, 5], 1)]
        assert most == 2
        await batcher.close()

    asyncio.run(main())


def test_batcher__waits_for_those_that_are_expected_but_not_for_ever() -> None:
    async def main() -> None:
        log: list[tuple[str, list[int]]] = []

        async def run(key: str, items: Sequence[int], lanes: int) -> list[int | Exception]:
            log.append((key, list(items)))
            return list(items)

        batcher = Batcher(run, max_batch_size=8, batch_wait_s=0.001, patience_s=lambda: 0.05)
        with batcher.expecting(1):
            first = asyncio.ensure_future(batcher.submit("a", 1))
            await asyncio.sleep(0.01)
            second = asyncio.ensure_future(batcher.submit("a", 2))
            await asyncio.sleep(0)
        await asyncio.gather(first, second)
        assert log == [("a", [1, 2])]
        with batcher.expecting(1):  # which never comes
            assert await asyncio.wait_for(batcher.submit("a", 3), timeout=60) == 3
        await batcher.close()

    asyncio.run(main())


def test_batcher__who_comes_alone_again_waits_for_nobody() -> None:
    async def main() -> None:
        log: list[tuple[str, list[int]]] = []
        batcher = _batcher(log, batch_wait_s=0.3)
        loop = asyncio.get_running_loop()

        async def seconds(*items: int) -> float:
            started = loop.time()
            await asyncio.gather(*(batcher.submit("a", item) for item in items))
            return loop.time() - started

        assert await seconds(1) >= 0.3  # company might have come
        assert await seconds(2) < 0.3
        with batcher.expecting(1):  # someone is on the way
            assert await seconds(3) >= 0.3
        await seconds(4, 5)
        assert await seconds(6) >= 0.3  # two came at once the last time
        assert [items for _, items in log] == [[1], [2], [3], [4, 5], [6]]
        await batcher.close()

    asyncio.run(main())
