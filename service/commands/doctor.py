"""`mimray doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial

from mimray.service.commands import doctor_checks as checks
from mimray.service.commands.doctor_checks import Status, Verdict


@dataclass(frozen=True)
class Finding:
    """A named verdict."""

    name: str
    status: Status
    detail: str
    cure: str = ""


def diagnose(
    *,
    storage: str = "runs",
    ports: Sequence[int] = (8000, 8265),
    memory_gib: float = 4.0,
) -> list[Finding]:
    """Look at everything that training and serving stand on.

    Args:
        storage: where runs would be kept, a path or a `pyarrow.fs` URI.
        ports: TCP ports that serving and Ray's dashboard would take.
        memory_gib: memory that must be available.

    Returns:
        One finding a check, in the order in which to mend things.
    """
    questions: dict[str, Callable[[], Verdict]] = {
        "python": checks.check_python,
        "torch": checks.check_torch,
        "cuda": checks.check_cuda,
        "deepspeed": checks.check_deepspeed,
        "compiler": checks.check_compiler,
        "ray": checks.check_ray,
        "ray cluster": checks.check_cluster,
        "memory": partial(checks.check_memory, memory_gib),
        "shared memory": checks.check_shared_memory,
        "open files": checks.check_open_files,
        **{f"port {port}": partial(checks.check_port, port) for port in ports},
        "storage": partial(checks.check_storage, storage),
        "mlflow": partial(checks.check_mlflow, storage),
        "haproxy": checks.check_haproxy,
    }
    # Most of the time goes into importing torch and DeepSpeed, in different processes.
    with ThreadPoolExecutor(len(questions)) as pool:
        return list(pool.map(_finding, questions.keys(), questions.values()))


def render(findings: Sequence[Finding]) -> str:
    """Findings as a plain table, each cure below its line."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
        if finding.cure:
            lines.append(f"{'':<{width + 6}}  -> {finding.cure}")
    counts = Counter(finding.status for finding in findings)
    lines.append("")
    lines.append(f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} to mend")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """Findings for machines: a JSON list of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def _finding(name: str, check: Callable[[], Verdict]) -> Finding:
    try:
        verdict = check()
    except Exception as error:
        # A doctor reports what it cannot make out, and goes on to the next question.
        text = str(error) or "no message"
        verdict = Verdict(
            "fail",
            f"{type(error).__name__}: {text}",
            "if something is missing, install mimray again",
        )
    return Finding(name, *verdict)
