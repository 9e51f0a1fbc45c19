"""The phases of a request in time."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Timeline:
    """The phases of one request.

    Attributes:
        spans: name, start and end of each phase, on `time.perf_counter`.
    """

    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, name: str, start: float, end: float) -> None:
        """Add a phase."""
        self.spans.append((name, start, end))

    def seconds(self, name: str) -> float:
        """Seconds from the first start to the last end of a phase; 0 if it never ran."""
        found = [(start, end) for phase, start, end in self.spans if phase == name]
        return max(e for _, e in found) - min(s for s, _ in found) if found else 0.0
