"""One model's answers, whatever the protocol and whichever process was asked."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from mimray.serving.inference.predictor import Predictor
from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.answer_cache import AnswerCache, digest
from mimray.serving.operations.calls import Call, Reply, problem_reply
from mimray.serving.operations.embeddings import embeddings
from mimray.serving.operations.features import features
from mimray.serving.operations.metadata import Identity
from mimray.serving.operations.oip import infer, model_config, model_metadata
from mimray.serving.operations.reconstruct import Reconstructor, reconstruction
from mimray.serving.operations.request_images import Fetch
from mimray.serving.operations.response_formats import dumps
from mimray.serving.telemetry.metrics import Metrics
from mimray.serving.telemetry.tracing import Tracer
from mimray.serving.wire.errors import (
    EndpointError,
    ModelFailureError,
    OverloadedError,
    UnknownModelError,
)

logger = logging.getLogger(__name__)

_TAG_HEADERS = ("accept", "content-type", "inference-header-content-length")


class ModelService:
    """Answers calls for one model.

    Args:
        identity: of the model.
        predictor: what computes.
        reconstructor: what draws.
        fetch: gets pictures by URL, or refuses.
        metrics: where to count.
        cache: of answers.
        tracer: where spans of the phases go.
        timeout_s: longest time an answer may take.
        versions: every version there is of this model, its own among them.
    """

    def __init__(
        self,
        identity: Identity,
        predictor: Predictor,
        reconstructor: Reconstructor,
        *,
        fetch: Fetch,
        metrics: Metrics,
        cache: AnswerCache,
        tracer: Tracer,
        timeout_s: float = 60.0,
        versions: Sequence[str] = (),
    ) -> None:
        self.identity = identity
        self.predictor = predictor
        self.versions = tuple(versions) or (identity.version,)
        self._reconstructor = reconstructor
        self._fetch = fetch
        self._metrics = metrics
        self._cache = cache
        self._tracer = tracer
        self._timeout_s = timeout_s
        self._answered = 0
        self._busy_s = 0.0
        self._operations: dict[str, Callable[[Call, Timeline], Awaitable[tuple[Reply, int]]]] = {
            "infer": lambda call, timeline: infer(call, identity, predictor, timeline),
            "features": lambda call, timeline: features(call, identity, predictor, timeline, fetch),
            "embeddings": lambda call, timeline: embeddings(
                call, identity, predictor, timeline, fetch
            ),
            "reconstruct": lambda call, timeline: reconstruction(
                call, reconstructor, predictor, timeline, fetch
            ),
        }
        self._descriptions: dict[str, Callable[[], Any]] = {
            "metadata": lambda: model_metadata(identity, self.versions),
            "config": lambda: model_config(identity, self.versions),
            "ready": lambda: {"name": identity.name, "ready": True},
            "stats": self._statistics,
            "describe": self.describe,
        }

    async def answer(self, call: Call) -> Reply:
        """Answer a call; what goes wrong is an answer, too."""
        started = time.perf_counter()
        timeline = Timeline()
        try:
            self._check_version(call.version)
            if call.operation in self._descriptions:
                tree = self._descriptions[call.operation]()
                return Reply(200, {"Content-Type": "application/json"}, dumps(tree).encode())
            async with asyncio.timeout(self._timeout_s):
                reply = await self._computed(call, timeline)
        except EndpointError as error:
            reply = problem_reply(error)
        except TimeoutError:
            reply = problem_reply(
                OverloadedError(
                    f"not answered within {self._timeout_s:g} s", hint="send fewer pictures"
                )
            )
        except Exception as error:
            logger.exception("%s of %s failed", call.operation, self.identity.name)
            reply = problem_reply(ModelFailureError(f"unexpected {type(error).__name__}"))
        return self._accounted(reply, call, timeline, started)

    def describe(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        identity = self.identity
        return {
            "id": identity.name,
            "object": "model",
            "created": identity.created_s,
            "owned_by": "mimray",
            "ready": True,
            "version": identity.version,
            "versions": list(self.versions),
            **identity.public(),
        }

    async def _computed(self, call: Call, timeline: Timeline) -> Reply:
        key = digest(
            call.operation,
            self.identity.card.weights_sha256,
            self.identity.name,
            self.identity.version,
            repr(sorted(call.query.items())),
            repr([call.headers.get(name, "") for name in _TAG_HEADERS]),
            call.body,
        )
        tag = f'"{key[:32]}"'
        if _matches(call.headers.get("if-none-match", ""), tag):
            # The tag says what was asked and of which weights, so equal tags are equal answers.
            return Reply(304, {"ETag": tag, "Vary": "Accept"}, b"", {"cache": "client"})

        async def compute() -> Reply:
            reply, pictures = await self._operations[call.operation](call, timeline)
            return replace(
                reply,
                headers={**reply.headers, "ETag": tag},
                notes={**reply.notes, "pictures": pictures},
            )

        reply, hit = await self._cache.get_or_compute(key, compute)
        return replace(reply, notes={**reply.notes, "cache": "hit" if hit else "miss"})

    def close(self) -> None:
        """Send what is left of spans."""
        self._tracer.close()

    def _check_version(self, version: str | None) -> None:
        if version is not None and version != self.identity.version:
            raise UnknownModelError(
                f"{self.identity.name} has no version {version[:40]!r}",
                hint=f"there are {', '.join(self.versions)}",
            )

    def _statistics(self) -> dict[str, Any]:
        """Triton's statistics, as far as they mean something here."""
        total_ns = int(self._busy_s * 1e9)
        success = {"count": self._answered, "ns": total_ns}
        return {
            "model_stats": [
                {
                    "name": self.identity.name,
                    "version": self.identity.version,
                    "inference_count": self._answered,
                    "inference_stats": {"success": success},
                }
            ]
        }

    def _accounted(self, reply: Reply, call: Call, timeline: Timeline, started: float) -> Reply:
        """Count an answer, and note in it what the access log wants to know."""
        seconds = time.perf_counter() - started
        phases = {
            name: timeline.seconds(name) for name in ("queue", "decode", "batch_wait", "model")
        }
        if timeline.spans and reply.status < 400:
            timeline.add("encode", max(end for _, _, end in timeline.spans), time.perf_counter())
            phases["encode"] = timeline.seconds("encode")
        pictures = int(reply.notes.get("pictures", 0))
        self._tracer.record(call.traceparent, timeline.spans, {"mimray.model": self.identity.name})
        self._answered += pictures
        self._busy_s += phases["model"]
        self._metrics.request(call.operation, reply.status, seconds, pictures)
        for name, spent in phases.items():
            if spent:
                self._metrics.phase(name, spent)
        self._metrics.waiting(self.predictor.waiting)
        self._metrics.answer_bytes(len(reply.body))
        if "error" in reply.notes:
            self._metrics.rejected(str(reply.notes["error"]))
        if "cache" in reply.notes:
            self._metrics.cache(reply.notes["cache"] != "miss")
        milliseconds = {f"{name}_ms": round(1000 * spent, 3) for name, spent in phases.items()}
        identity = self.identity
        named = {"model": identity.name, "version": identity.version}
        notes = {**named, **milliseconds, **reply.notes}
        return replace(reply, notes=notes)


def _matches(header: str, tag: str) -> bool:
    """Whether `If-None-Match` holds the tag (RFC 9110, sec. 13.1.2)."""
    tags = [entry.strip().removeprefix("W/") for entry in header.split(",")]
    return tag in tags
