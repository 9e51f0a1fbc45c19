"""`mimray submit`: a command as a job on a cluster, by Ray's Jobs API."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.service.terminal.console import say
from mimray.trainers.data.files import refuse_secrets
from mimray.trainers.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
AGENT_WITHIN_S = 60.0
HERE = "http://127.0.0.1:8265"
COMMANDS = (
    "pretrain", "adapt", "verdict", "evaluate", "tune", "extract", "reconstruct", "data", "export",
    "serve", "doctor",
)  # fmt: skip
"""The commands that work on a cluster."""


def run_submit(
    command: Sequence[str],
    *,
    address: str | None,
    working_dir: str | None,
    name: str | None,
    detach: bool,
    again: bool,
) -> dict[str, Any]:
    """Submit a command, or find the job that it is, and follow it.

    Args:
        command: the words of a `mimray` command, without `mimray`.
        address: URL of the cluster's dashboard; None takes it from the environment.
        working_dir: path or URI of the code to ship; None for the checkout that this runs from.
        name: the job's name; None to tell it by the command.
        detach: return once it is submitted.
        again: submit anew what has succeeded already.

    Returns:
        What `--json` prints: the job's id and status, its exit code once it has ended, and whether
        it was found there.

    Raises:
        ConfigError: not a command, one that is not for a cluster, or one with a password in it.
        ResourceError: no cluster answers at the address, or it refuses the job.
    """
    _check_command(command)
    client = _client(address or _address())
    base = name or job_name(command)
    jobs = _attempts(client, base)
    newest = jobs[-1] if jobs else None
    found = newest is not None and (
        not newest.status.is_terminal() or (newest.status == "SUCCEEDED" and not again)
    )
    if newest is not None and found:
        job_id = str(newest.submission_id)
        say(f"{job_id} is {newest.status.value.lower()}")
    else:
        job_id = _next_name(base, jobs)
        _submit(client, job_id, command, working_dir)
        say(f"submitted {job_id}" + (f", after {newest.submission_id} has {_ended(newest)}"
                                     if newest is not None else ""))  # fmt: skip
    if not detach and not (found and newest is not None and newest.status.is_terminal()):
        _follow(client, job_id)
    return {"found": found, **_facts(client.get_job_info(job_id))}


def job_name(command: Sequence[str]) -> str:
    """The name by which the same command is the same job.

    Args:
        command: the words of a `mimray` command, without `mimray`.
    """
    digest = hashlib.sha256(json.dumps(list(command)).encode()).hexdigest()[:10]
    return f"mimray-{command[0]}-{digest}"


def _check_command(command: Sequence[str]) -> None:
    if command[0] not in COMMANDS:
        raise ConfigError(
            f"{command[0]!r} cannot run as a job",
            hint=f"mimray submit -- COMMAND …, of {', '.join(COMMANDS)}",
        )
    for word in command:
        refuse_secrets(word)  # Ray keeps the words of a job, and shows them


def _address() -> str:
    given = (os.environ.get(variable, "") for variable in ADDRESS_VARIABLES)
    return next((one for one in given if one.startswith("http")), HERE)


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"no Ray dashboard answers at {address}: {str(error).strip().splitlines()[0]}",
            hint="--address http://HEAD:8265; a cluster of `ray start --head` has one",
        ) from None


def _attempts(client: JobSubmissionClient, base: str) -> list[JobDetails]:
    """The jobs of a name there were so far, oldest first."""
    pattern = re.compile(rf"{re.escape(base)}(-\d+)?")
    found = [job for job in client.list_jobs() if pattern.fullmatch(job.submission_id or "")]
    return sorted(found, key=lambda job: job.start_time or 0)


def _next_name(base: str, jobs: Sequence[JobDetails]) -> str:
    """The first name above those taken, as some jobs between may have been deleted."""
    taken = [str(job.submission_id).removeprefix(base).lstrip("-") or "1" for job in jobs]
    return f"{base}-{max(map(int, taken)) + 1}" if taken else base


def _submit(
    client: JobSubmissionClient, job_id: str, command: Sequence[str], working_dir: str | None
) -> None:
    shipped = working_dir or _checkout()
    program = ["python", "-m", "service"] if shipped else ["mimray"]
    until = time.monotonic() + AGENT_WITHIN_S
    while True:
        try:
            client.submit_job(
                entrypoint=shlex.join([*program, *command]),
                submission_id=job_id,
                runtime_env={"working_dir": shipped} if shipped else None,
                metadata={"mimray.command": shlex.join(["mimray", *command])},
            )
            return
        except (RuntimeError, ValueError) as error:
            # A node takes jobs some seconds after it has started.
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise ResourceError(
                    f"the cluster refuses {job_id}: {str(error).strip().splitlines()[-1]}",
                    hint="--working-dir names the code to ship",
                ) from error
        time.sleep(1)


def _checkout() -> str | None:
    """The checkout that this command runs from; None where mimray is installed without one."""
    root = Path(__file__).resolve().parents[2]
    return str(root) if (root / "pyproject.toml").is_file() else None


def _follow(client: JobSubmissionClient, job_id: str) -> None:
    """Print a job's log on standard error until it ends; Ctrl-C leaves it running."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            sys.stderr.write(text)
            sys.stderr.flush()

    try:
        asyncio.run(tail())
    except (OSError, RuntimeError) as error:  # Ray's and aiohttp's, when the head dies
        raise ResourceError(
            f"lost sight of {job_id}: {error}", hint="the same command looks for it again"
        ) from error
    except KeyboardInterrupt:
        say(f"\n{job_id} runs on; the same command follows it, `ray job stop {job_id}` ends it")


def _ended(job: JobDetails) -> str:
    return {"FAILED": "failed", "STOPPED": "been stopped"}.get(job.status.value, "succeeded")


def _facts(job: JobDetails) -> dict[str, Any]:
    return {
        "id": job.submission_id,
        "status": job.status.value,
        "exit_code": job.driver_exit_code,
        "message": job.message,
    }
