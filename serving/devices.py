"""What a model runs on, and whether it is compiled for it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainers.bundles import FrozenEncoder

logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` for a GPU where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pays_to_compile(wanted: str | bool, device: torch.device) -> bool:
    """Whether to compile: as told, or by `auto` on GPUs alone.

    On CPUs a compiled ViT-Ti/16 took 1.09 times as long as one that is not, after 154 s of
    compiling.
    """
    return device.type == "cuda" if wanted == "auto" else bool(wanted)


def compile_encoder(encoder: FrozenEncoder) -> bool:
    """Have torch compile an encoder, batches of any size alike; as it was, where that fails.

    Args:
        encoder: to be changed; where it is, it is compiled for.

    Returns:
        Whether it is compiled now.
    """
    import torch

    inner, card = encoder.encoder, encoder.card
    device = next(inner.parameters()).device
    example = torch.zeros(2, card.channels, *card.image_size, device=device)
    plain = inner.forward_intermediates
    fast = torch.compile(plain, dynamic=True)
    try:
        with torch.inference_mode():
            fast(example, (), True)
    except Exception as error:  # compilers fail in every way; what is not compiled still answers
        logger.warning("the model is not compiled: %s", str(error).splitlines()[0])
        return False
    object.__setattr__(inner, "forward_intermediates", fast)
    return True
