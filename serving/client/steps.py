"""The steps of a client's work; no network here.

A client's method is a generator of steps (`Steps`). It yields what it needs done, gets the outcome
sent back, and returns its result, so that one description serves both clients:

    Send    an HTTP request       -> Answer, or Failure when none came
    Pause   seconds to wait       -> None
    Load    a call that blocks    -> what it returns; what it raises ends the generator
    All     branches to run       -> list of their results, in order
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from mimray.trainers.errors import ServingError

T = TypeVar("T")


@dataclass(frozen=True)
class Send:
    """A request to send.

    Attributes:
        method: the HTTP method.
        path: path and query.
        content: the body; None for none.
        headers: the headers beside those of every request.
        timeout_s: longest wait for a connection and between bytes.
        left_s: longest time until the whole answer is there.
    """

    method: str
    path: str
    content: bytes | None
    headers: Mapping[str, str]
    timeout_s: float
    left_s: float


@dataclass(frozen=True)
class Answer:
    """A whole answer; names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytearray


@dataclass(frozen=True)
class Failure:
    """No answer, or a part of one."""

    cause: Exception


@dataclass(frozen=True)
class Pause:
    """Time to let pass."""

    seconds: float


@dataclass(frozen=True)
class Load:
    """Something that waits for a disk, or computes for a while."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class All(Generic[T]):
    """Branches to run, at most `concurrency` at once; each is made when its turn comes."""

    branches: Iterator[Steps[T]]
    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ServingError(f"concurrency is {self.concurrency}", hint="use at least 1")


Steps = Generator[Send | Pause | Load | All[Any], Any, T]


def gather(branches: Iterator[Steps[T]], concurrency: int) -> Steps[list[T]]:
    """Run branches and gather their results in order; a single one without a pool."""
    first = list(islice(branches, 2))
    if len(first) == 1:
        return [(yield from first[0])]
    results: list[T] = yield All(chain(first, branches), concurrency)
    return results
