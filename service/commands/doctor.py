"""`mimray doctor`: checks of this machine, with cures."""

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
    """A verdict with the name of its check."""

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
    """Check everything that training and serving need.

    Args:
        storage: the directory or `pyarrow.fs` URI of runs.
        ports: the TCP ports of serving and of Ray's dashboard.
        memory_gib: memory that must be available, GiB.

    Returns:
        One finding a check, in the order in which to mend them.
    """
    questions: dict[str, Callable[[], Verdict]] = {
        "python": checks.check_python,
        "torch": checks.check_torch,
        "cuda": checks.check_cuda,
        "deepspeed": checks.check_deepspeed,
        "compiler": checks.check_compiler,
        "ray": checks.check_ray,
        "ray cluster": checks.check_cluster,
        "places": checks.check_environment,
        "names": checks.check_names,
        "cpus": checks.check_cpus,
        "memory": partial(checks.check_memory, memory_gib),
        "shared memory": checks.check_shared_memory,
        "open files": checks.check_open_files,
        **{f"port {port}": partial(checks.check_port, port) for port in ports},
        "storage": partial(checks.check_storage, storage),
        "mlflow": partial(checks.check_mlflow, storage),
        "haproxy": checks.check_haproxy,
    }
    # Most of the time goes into imports of torch and DeepSpeed, in different processes.
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
    """Findings as a JSON list of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def _finding(name: str, check: Callable[[], Verdict]) -> Finding:
    try:
        verdict = check()
    except Exception as error:
        # A check that raises is reported as a failure.
        text = str(error) or "no message"
        verdict = Verdict(
            "fail",
            f"{type(error).__name__}: {text}",
            "if something is missing, install mimray again",
        )
    return Finding(name, *verdict)
