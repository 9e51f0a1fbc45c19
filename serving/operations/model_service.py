"""The service of one model: it answers calls, with cache, time limit, metrics and spans."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from mimray.serving.inference.timeline import Timeline
from mimray.serving.operations.answer_cache import AnswerCache, digest
from mimray.serving.operations.calls import Call, Reply, problem_reply
from mimray.serving.operations.operation import Computation, Description, Model
from mimray.serving.operations.response_formats import dumps
from mimray.serving.operations.table import OPERATIONS
from mimray.serving.telemetry.metrics import Metrics
from mimray.serving.telemetry.tracing import Tracer
from mimray.serving.wire.errors import (
    EndpointError,
    ModelFailureError,
    OverloadedError,
    UnknownModelError,
)
from mimray.serving.wire.oip_messages import HEADER_LENGTH

logger = logging.getLogger(__name__)

# Headers that an answer depends on.
_TAG_HEADERS = ("accept", "content-type", HEADER_LENGTH.lower())


class ModelService:
    """Answers calls to one version of a model.

    Args:
        model: the model and what it computes with.
        metrics: the model's Prometheus metrics.
        cache: the cache of answers.
        tracer: exports the spans of a request's phases.

    Attributes:
        model: the model.
    """

    def __init__(
        self, model: Model, *, metrics: Metrics, cache: AnswerCache, tracer: Tracer
    ) -> None:
        self.model = model
        self._metrics = metrics
        self._cache = cache
        self._tracer = tracer

    async def answer(self, call: Call) -> Reply:
        """Answer a call; an error becomes a refusal."""
        started = time.perf_counter()
        timeline = Timeline()
        timeout_s = self.model.limits.request_timeout_s
        try:
            self._check_version(call.version)
            operation = OPERATIONS[call.operation]
            if isinstance(operation, Description):
                body = dumps(operation.describe(self.model)).encode()
                return Reply(200, {"Content-Type": "application/json"}, body)
            async with asyncio.timeout(timeout_s):
                reply = await self._computed(operation, call, timeline)
        except EndpointError as error:
            reply = problem_reply(error)
        except TimeoutError:
            reply = problem_reply(
                OverloadedError(f"not answered within {timeout_s:g} s", hint="send fewer pictures")
            )
        except Exception as error:
            logger.exception("%s of %s failed", call.operation, self.model.name)
            reply = problem_reply(ModelFailureError(f"unexpected {type(error).__name__}"))
        return self._accounted(reply, call, timeline, started)

    async def _computed(self, operation: Computation, call: Call, timeline: Timeline) -> Reply:
        key = digest(
            operation.name,
            self.model.card.weights_sha256,
            self.model.predictor.heads.sha256,
            self.model.name,
            self.model.version,
            repr(sorted(call.query.items())),
            repr([call.headers.get(name, "") for name in _TAG_HEADERS]),
            call.body,
        )
        tag = f'"{key[:32]}"'
        if _matches(call.headers.get("if-none-match", ""), tag):
            # The tag says what was asked and of which weights, so equal tags are equal answers.
            return Reply(304, {"ETag": tag, "Vary": "Accept"}, b"", {"cache": "client"})

        async def compute() -> Reply:
            reply, pictures = await operation.compute(self.model, call, timeline)
            return replace(
                reply,
                headers={**reply.headers, "ETag": tag},
                notes={**reply.notes, "pictures": pictures},
            )

        # Each caller's own: how quickly an answer comes would tell who else asked for it.
        reply, hit = await self._cache.get_or_compute(digest(key, call.caller), compute)
        return replace(reply, notes={**reply.notes, "cache": "hit" if hit else "miss"})

    def close(self) -> None:
        """Send the spans that are left."""
        self._tracer.close()

    def _check_version(self, version: str | None) -> None:
        if version is not None and version != self.model.version:
            raise UnknownModelError(
                f"{self.model.name} has no version {version[:40]!r}",
                hint=f"there are {', '.join(self.model.versions)}",
            )

    def _accounted(self, reply: Reply, call: Call, timeline: Timeline, started: float) -> Reply:
        """Count an answer, and add the notes for the access log to it."""
        seconds = time.perf_counter() - started
        phases = {
            name: timeline.seconds(name) for name in ("queue", "decode", "batch_wait", "model")
        }
        if timeline.spans and reply.status < 400:
            timeline.add("encode", max(end for _, _, end in timeline.spans), time.perf_counter())
            phases["encode"] = timeline.seconds("encode")
        pictures = int(reply.notes.get("pictures", 0))
        self._tracer.record(call.trace, timeline.spans, {"mimray.model": self.model.name})
        self.model.pictures += pictures
        self.model.busy_s += phases["model"]
        self._metrics.request(call.operation, reply.status, seconds, pictures)
        for name, spent in phases.items():
            if spent:
                self._metrics.phase(name, spent)
        self._metrics.waiting(self.model.predictor.waiting)
        self._metrics.answer_bytes(len(reply.body))
        if "error" in reply.notes:
            self._metrics.rejected(str(reply.notes["error"]))
        if "cache" in reply.notes:
            self._metrics.cache(reply.notes["cache"] != "miss")
        milliseconds = {f"{name}_ms": round(1000 * spent, 3) for name, spent in phases.items()}
        named = {"model": self.model.name, "version": self.model.version}
        notes = {**named, **milliseconds, **reply.notes}
        return replace(reply, notes=notes)


def _matches(header: str, tag: str) -> bool:
    """True if `If-None-Match` holds the tag (RFC 9110, sec. 13.1.2)."""
    tags = [entry.strip().removeprefix("W/") for entry in header.split(",")]
    return tag in tags
