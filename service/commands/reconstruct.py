"""`mimray reconstruct`: a method's view of pictures, drawn beside the originals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def draw_reconstructions(
    run: str,
    pictures: Sequence[str],
    out: Path,
    *,
    mask_ratio: float | None,
    seed: int,
    oracle: bool,
) -> None:
    """Draw a sheet: a row a picture, a column a panel of the method.

    Args:
        run: a bundle's or a run's path or URI.
        pictures: the pictures' files.
        out: the file of the sheet.
        mask_ratio: the share of patches to hide, over (0, 1); the recipe's by default.
        seed: the seed of masks and of drawn samples.
        oracle: lend normalised targets the hidden patches' own mean and deviation.

    Raises:
        BundleError: there is no bundle.
        DataError: a picture is missing or broken.
    """
    from mimray.trainers.bundles import fetch_bundle
    from mimray.trainers.data.decode import decode_rgb
    from mimray.trainers.errors import DataError
    from mimray.trainers.methods.load import load_method
    from mimray.trainers.methods.reconstruction import reconstruct
    from mimray.trainers.pictures import panel_sheet

    method = load_method(fetch_bundle(run))
    for name in pictures:
        if not Path(name).is_file():
            raise DataError(f"no picture at {name}")
    images = [decode_rgb(Path(name).read_bytes()) for name in pictures]
    panels = reconstruct(method, images, mask_ratio=mask_ratio, seed=seed, oracle=oracle).panels
    sheet = panel_sheet(panels, captions=[Path(p).name for p in pictures])
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
