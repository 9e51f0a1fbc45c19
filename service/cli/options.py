"""Options and output that several commands share."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from typing import Any

import click

from mimray.trainers.errors import ConfigError
from mimray.trainers.redaction import masked

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
label_option = click.option(
    "--label", metavar="COLUMN", default=None, help="Column of the labels; `label` by default."
)


def hold_out_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--val-share` and `--val-seed`, for pictures to score on that the data has no split of."""
    share = click.option(
        "--val-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        default=None,
        help="Share of each class held out to score on, where DATA has no split; 0.2 by default.",
    )
    seed = click.option(
        "--val-seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed of what is held out.",
    )
    return share(seed(command))


def init_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--init` and `--partial`, for weights to begin with."""
    init = click.option(
        "--init",
        default=None,
        metavar="BUNDLE|CHECKPOINT",
        help="Weights to begin with: a bundle, run, registered name, SWEEP:best, timm:NAME or "
        "another library's checkpoint.",
    )
    partial = click.option(
        "--partial", is_flag=True, help="Begin with those of the weights that fit."
    )
    return init(partial(command))


workers_option = click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Training workers."
)
steps_option = click.option(
    "--steps", type=click.IntRange(min=1), default=None, help="Length, in updates."
)
set_option = click.option(
    "--set", "overrides", multiple=True, metavar="A.B=VALUE", help="Override a key."
)


def image_size(ctx: click.Context, option: click.Parameter, text: str | None) -> Any:
    """Callback of `--image-size`: (height, width) in pixels from `224` or `192x256`."""
    if not text:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise ConfigError(f"--image-size {text!r} is neither a side nor HEIGHTxWIDTH in pixels")
    return int(match[1]), int(match[2] or match[1])


def layer_list(ctx: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...]:
    """Callback of `--layers`: the numbers of `2,5,8,11`; none without the option."""
    try:
        return tuple(int(layer) for layer in text.split(",")) if text else ()
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of layers such as 2,5,8,11") from None


def command_line() -> str:
    """The command line of this process, for the record, without passwords."""
    return masked(shlex.join(["mimray", *sys.argv[1:]]))


def print_result(result: Any, as_json: bool, text: Callable[[Any], str] | None = None) -> None:
    """Print a result on standard output.

    Args:
        result: a value that JSON can hold.
        as_json: print it as JSON, on one line.
        text: renders the result for people; without it nothing is printed for them.
    """
    if as_json:
        click.echo(json.dumps(result))
    elif text is not None:
        click.echo(text(result))


def verdict_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a verdict: the pictures that an encoder is judged by, and how many of them."""
    options = (
        click.option(
            "--labelled", default=None, help="Labelled pictures: with masks, boxes or classes."
        ),
        click.option(
            "--val", default=None, help="Pictures to score on; default: LABELLED's own split."
        ),
        click.option("--retain", default=None, help="A second data set, to see what was lost."),
        click.option(
            "--task",
            "tasks",
            multiple=True,
            metavar="TASK",
            help="A task on LABELLED; by its labels.",
        ),
        hold_out_options,
        label_option,
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            default=None,
            help="N pictures of each data set only, in the verdict.",
        ),
        click.option("--skip-invalid", is_flag=True, help="Leave out wrong labels and list them."),
    )
    for option in reversed(options):
        command = option(command)
    return command
