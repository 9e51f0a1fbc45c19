from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from mimray.serving.deploy.build_service import build_service
from mimray.serving.deploy.settings import ModelSettings
from mimray.serving.operations.calls import Call


def test_cache__tells_no_caller_what_another_one_asked(
    bundles: dict[str, Path], picture: Callable[..., bytes]
) -> None:
    settings = ModelSettings(name="alpha", bundle=str(bundles["alpha"]), device="cpu")
    service = build_service(settings, num_threads=1)

    async def asked() -> list[tuple[str, str]]:
        found = []
        for caller, seed in (("ann", 1), ("ann", 1), ("bob", 1), ("ann", 2)):
            reply = await service.answer(Call("features", body=picture(seed), caller=caller))
            assert reply.status == 200
            found.append((str(reply.notes["cache"]), reply.headers["ETag"]))
        await service.model.predictor.close()
        return found

    first, again, other, another = asyncio.run(asked())
    assert [cache for cache, _ in (first, again, other)] == ["miss", "hit", "miss"]
    # The tag is of what was asked, and anyone may send it back.
    assert first[1] == again[1] == other[1] != another[1]
    service.close()
