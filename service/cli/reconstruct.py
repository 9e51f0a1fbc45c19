"""`mimray reconstruct`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run")
@click.argument("pictures", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--mask-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True))
@click.option("--seed", default=0, show_default=True, help="Seed of masks and of drawn samples.")
@click.option(
    "--oracle", is_flag=True, help="Lend normalised targets the hidden patches' own colours."
)
def reconstruct(
    run: str,
    pictures: tuple[str, ...],
    out: Path,
    mask_ratio: float | None,
    seed: int,
    oracle: bool,
) -> None:
    """Draw what the method makes of pictures of yours, beside the originals.

    Example: mimray reconstruct runs/demo a.jpg b.jpg --out sheet.png
    """
    from mimray.service.commands.reconstruct import draw_reconstructions

    draw_reconstructions(run, pictures, out, mask_ratio=mask_ratio, seed=seed, oracle=oracle)
    click.echo(f"{out}: {len(pictures)} pictures")
