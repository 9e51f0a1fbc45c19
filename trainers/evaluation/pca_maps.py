"""Pictures beside the patch tokens of two encoders, in false colours that can be compared."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.data.decode import decode
from mimray.trainers.data.geometry import Size
from mimray.trainers.data.selection import evenly_spread
from mimray.trainers.data.sources import Source
from mimray.trainers.data.transforms import inference_view
from mimray.trainers.errors import ImageError
from mimray.trainers.evaluation.features.encoders import FeatureEncoder
from mimray.trainers.evaluation.heads.views import fitting_size
from mimray.trainers.models.colours import aligned_colours
from mimray.trainers.models.normalise import normalise
from mimray.trainers.pictures import panel_sheet, png
from mimray.trainers.types import Panel

NUM_PICTURES = 6
# Maps are shown larger than encoders are trained at, since objects are seen in them by then.
_MAX_TOKENS, _MAX_SIDE_PX = 1024, 512


def pca_maps(
    start: FeatureEncoder,
    adapted: FeatureEncoder,
    source: Source,
    *,
    device: str,
    num_pictures: int = NUM_PICTURES,
) -> bytes:
    """Draw pictures in rows; columns are the picture and the tokens of both encoders.

    Colours are the first three principal components of an encoder's last map over all pictures
    shown; those of the adapted encoder are turned onto the start's.

    Args:
        start: an encoder in evaluation mode, on the device.
        adapted: another one, likewise.
        source: the pictures, of which some are taken, evenly spread.
        device: device of the encoders, as torch names it.
        num_pictures: most pictures to show.

    Returns:
        A PNG.

    Raises:
        ImageError: none of these pictures can be decoded.
    """
    pictures = _decoded(source, num_pictures)
    size = fitting_size(
        [(picture.height, picture.width) for picture in pictures],
        math.lcm(start.stride, adapted.stride),
        max_tokens=_MAX_TOKENS,
        max_side_px=_MAX_SIDE_PX,
    )
    maps = [_last_map(encoder, pictures, size, device) for encoder in (start, adapted)]
    grid = (maps[0].shape[2], maps[0].shape[3])
    tokens = [_on_grid(each, grid).flatten(2).transpose(1, 2) for each in maps]  # B N D each
    columns = [shades.reshape(-1, *grid, 3) for shades in aligned_colours(*tokens)]
    shown = np.stack([inference_view(p.convert("RGB"), size, "bicubic") for p in pictures])
    panels = [
        Panel("picture", shown.transpose(0, 2, 3, 1)),
        Panel("start", columns[0]),
        Panel("adapted", columns[1]),
    ]
    return png(panel_sheet(panels))


def _decoded(source: Source, num_pictures: int) -> list[Image.Image]:
    pictures, problem = [], None
    for index in evenly_spread(len(source), num_pictures).tolist():
        try:
            pictures.append(decode(source[index].image).image)
        except ImageError as error:
            problem = error
    if not pictures:
        assert problem is not None
        raise problem
    return pictures


@torch.no_grad()
def _last_map(
    encoder: FeatureEncoder, pictures: list[Image.Image], size: Size, device: str
) -> Tensor:
    """The last layer's map, normed, float [B, D, h, w]; pictures one by one, to bound memory."""
    card = encoder.card
    maps = []
    for picture in pictures:
        shown = picture.convert("L" if card.channels == 1 else "RGB")
        pixels = torch.tensor(inference_view(shown, size, card.interpolation))[None]
        images = normalise(pixels.to(device), card.mean, card.std)
        maps.append(encoder.features(images, (encoder.depth - 1,), norm=True)[0].float().cpu())
    return torch.cat(maps)


def _on_grid(maps: Tensor, grid: Size) -> Tensor:
    if maps.shape[2:] == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear", antialias=True)
