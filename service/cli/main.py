"""The `mimray` command: the group, its exit statuses and the wiring of its commands.

Exit status: 0 success, 2 a user's mistake told in one line, 75 stopped from outside (the same
command goes on), 130 and 143 ended by SIGINT and SIGTERM with nothing kept, 1 anything else.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

import click

from mimray import __version__
from mimray.service.cli.adapt import adapt
from mimray.service.cli.data import data
from mimray.service.cli.demo import demo
from mimray.service.cli.doctor import doctor
from mimray.service.cli.evaluate import evaluate
from mimray.service.cli.export import export
from mimray.service.cli.extract import extract
from mimray.service.cli.import_weights import import_
from mimray.service.cli.keys import keys
from mimray.service.cli.models import models
from mimray.service.cli.plan import plan
from mimray.service.cli.pretrain import pretrain
from mimray.service.cli.recipes import recipes
from mimray.service.cli.reconstruct import reconstruct
from mimray.service.cli.serve import serve
from mimray.service.cli.submit import submit
from mimray.service.cli.tune import tune
from mimray.service.cli.ui import ui
from mimray.service.cli.verdict import verdict
from mimray.trainers.errors import MimrayError, ResourceError, StoppedError, StorageError

# What no code can help: permissions, read-only places, no room, too many open files.
_REFUSED_BY_THE_MACHINE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
)
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
COMMANDS: tuple[click.Command, ...] = (
    adapt,
    data,
    demo,
    doctor,
    evaluate,
    export,
    extract,
    import_,
    keys,
    models,
    plan,
    pretrain,
    recipes,
    reconstruct,
    serve,
    submit,
    tune,
    ui,
    verdict,
)


class _Group(click.Group):
    """Turns our errors into one line on standard error and the right exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("error: interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)
        except Exception as error:
            refusal = _refusal(error)
            if refusal is None or ctx.params.get("debug"):
                raise
            click.echo(f"error: {refusal}", err=True)
            ctx.exit(refusal.exit_code)


def _refusal(error: Exception) -> MimrayError | None:
    """The error to tell in one line; None for a bug of ours."""
    if isinstance(error, MimrayError):
        return error
    if isinstance(error, OSError) and error.errno in _REFUSED_BY_THE_MACHINE:
        return StorageError(
            f"{error.filename or 'a file'}: {error.strerror}",
            hint="look at its permissions and room; `mimray doctor` looks at this machine",
        )
    return _loss_of_ray(error) if "ray" in sys.modules else None


def _loss_of_ray(error: Exception) -> MimrayError | None:
    """The error of a cluster that is gone, or of a process that was killed; None for others."""
    from ray.exceptions import OutOfMemoryError, RayActorError, RaySystemError

    if isinstance(error, OutOfMemoryError):
        return ResourceError(
            "a node ran out of memory, and Ray killed a process of this command",
            hint="smaller batches, fewer processes at once, or nothing else beside it",
        )
    if not isinstance(error, RayActorError | RaySystemError):
        return None
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return None  # its own error, and no loss
    return StoppedError(
        f"the Ray cluster is gone, or has lost a process of this command: "
        f"{str(error).strip().splitlines()[0]}",
        hint="when it is there again, the same command goes on from what was kept",
    )


@click.group(cls=_Group, context_settings=CONTEXT)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(__version__, prog_name="mimray")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Pre-train a masked image model on your own pictures, and serve its encoder.

    Example: mimray pretrain mae-tiny --data PICTURES --steps 100
    """
    from mimray.trainers.cluster import set_environment
    from mimray.trainers.environment.findings import require_working_directory

    set_environment()
    if ctx.invoked_subcommand != "doctor":
        require_working_directory()


for _command in COMMANDS:
    cli.add_command(_command)


def main() -> None:
    """Entry point of the `mimray` command."""
    _use_utf8()
    cli(prog_name="mimray")


def _use_utf8() -> None:
    """Read and write text and names as UTF-8, here and in every process started from here.

    With another locale, Python has to be started again for it.
    """
    os.environ.setdefault("PYTHONUTF8", "1")
    if not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        # PYTHONIOENCODING may still say otherwise.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
