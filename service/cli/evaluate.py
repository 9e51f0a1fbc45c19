"""`mimray evaluate`."""

from __future__ import annotations

from typing import Any

import click

from mimray.service.cli.options import (
    command_line,
    hold_out_options,
    image_size,
    json_option,
    label_option,
    print_result,
)
from mimray.service.commands.tasks import TASKS, options_text, task_options


@click.command()
@click.argument("bundles", nargs=-1, metavar="BUNDLE…")
@click.option("--task", type=click.Choice(list(TASKS)), default="knn", show_default=True)
@click.option("--data", default=None, help="Pictures; labelled, but for rankme.")
@click.option("--val", default=None, help="Pictures to score on; default: DATA's own split.")
@hold_out_options
@label_option
@click.option(
    "--limit", type=click.IntRange(min=1), default=None, help="N pictures of DATA and of VAL only."
)
@click.option("--epochs", type=click.IntRange(min=1), default=None, help="Length of the training.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="An option of TASK.")
@click.option("--options", "show_options", is_flag=True, help="List the options of TASK.")
@click.option(
    "--image-size",
    callback=image_size,
    metavar="N|HxW",
    help="Input of untrained:ARCH, pixels.",
)
@click.option("--finetune", is_flag=True, help="Dense tasks: train the encoder with the head.")
@click.option("--through", default=None, metavar="URL", help="An endpoint; BUNDLE is its model.")
@click.option("--skip-invalid", is_flag=True, help="Leave out wrong labels and list them.")
@click.option("--compare", is_flag=True, help="One table and one chart of all BUNDLEs.")
@click.option("--out", default=None, help="Where results go; beside each bundle by default.")
@json_option
def evaluate(
    bundles: tuple[str, ...],
    task: str,
    data: str | None,
    show_options: bool,
    compare: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Score an encoder by a task.

    BUNDLE is a run or a bundle; `untrained:RUN` is a fresh encoder of the same shape and
    `untrained:vit_tiny` one of a published shape: what a score must beat.

    \b
    knn, linear    pictures in class folders, with metadata.csv, or Parquet with labels
    finetune       the same; the whole encoder learns
    rankme         any pictures, no labels: the effective rank of the features, a proxy
    segmentation   pictures with index masks, or COCO panoptic or instance files
    dense-knn      the same; patches by the most similar labelled ones, nothing learns
    detection      COCO JSON or Pascal VOC

    Example: mimray evaluate runs/mae-tiny --task segmentation --data scenes
    """  # noqa: D301 (click wants the character)
    if show_options:
        print_result(task_options(task), as_json, options_text)
        return
    if not bundles:
        raise click.UsageError("Missing argument 'BUNDLE…'.")
    if data is None:
        raise click.UsageError("Missing option '--data'.")
    if len(bundles) > 1 and not compare:
        raise click.UsageError("several BUNDLEs go with --compare.")
    from mimray.service.commands.evaluate import EvaluationRequest, result_text, run_evaluate

    request = EvaluationRequest(task=task, data=data, command=command_line(), **asked)
    if compare:
        from mimray.service.commands.compare import comparison_text, run_comparison

        print_result(run_comparison(bundles, request), as_json, comparison_text)
        return
    (result,) = run_evaluate(bundles, request)
    print_result(result, as_json, result_text)
