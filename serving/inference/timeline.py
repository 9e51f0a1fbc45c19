"""When the phases of a request ran."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Timeline:
    """When the phases of one request ran: name, start and end on `time.perf_counter`."""

    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def add(self, name: str, start: float, end: float) -> None:
        """Note a phase."""
        self.spans.append((name, start, end))

    def seconds(self, name: str) -> float:
        """From the first start to the last end of a phase; 0 where it never ran."""
        found = [(start, end) for phase, start, end in self.spans if phase == name]
        return max(e for _, e in found) - min(s for s, _ in found) if found else 0.0
