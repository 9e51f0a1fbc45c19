"""Devices, and ways to make an encoder faster on them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mimray.trainers.bundles import FrozenEncoder

logger = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device of a name; `auto` is a GPU if there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def torch_threads(count: int, name: str, *, num_threads: int) -> ThreadPoolExecutor:
    """A pool of threads, each with its own number of torch threads.

    Args:
        count: number of the threads.
        name: prefix of their names.
        num_threads: torch's threads of each.
    """
    import torch

    return ThreadPoolExecutor(
        count,
        thread_name_prefix=name,
        initializer=torch.set_num_threads,
        initargs=(num_threads,),
    )


def what_pays(
    compile: str | bool, device: torch.device
) -> Callable[[FrozenEncoder], object] | None:
    """The function that makes an encoder faster; None for none.

    Args:
        compile: `auto` for `compile_encoder` on GPUs and `pack_linears` on CPUs, where a compiled
            ViT-Ti/16 took 1.09 times as long as one that is not, after 154 s of compiling; True
            for the first, False for nothing.
        device: the device that the encoder runs on.
    """
    if compile == "auto":
        return compile_encoder if device.type == "cuda" else pack_linears
    return compile_encoder if compile else None


def compile_encoder(encoder: FrozenEncoder) -> bool:
    """Have torch compile an encoder for its device and batches of any size.

    Args:
        encoder: the encoder, which is changed; if compiling fails it stays as it was.

    Returns:
        True if it is compiled.
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


def pack_linears(encoder: FrozenEncoder) -> None:
    """Have oneDNN compute an encoder's linear layers, from weights in its own layout.

    On 2 cores of an EPYC with AVX-512 this made ViT-B/16 1.2 and ViT-Ti/16 1.1 times as fast as
    torch's own matrix products; numbers change by a few 1e-6. The weights are in memory twice.

    Args:
        encoder: the encoder, float32 on a CPU, which is changed; without oneDNN it stays as it was.
    """
    import torch
    from timm.layers import Mlp
    from torch import nn

    from mimray.trainers.models.mlp import ProjectionWithoutKeyBias

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    modules = list(encoder.encoder.modules())
    # The activation in the same pass over memory as the product before it.
    fused = {
        module.fc1
        for module in modules
        if isinstance(module, Mlp) and type(module.act) is nn.GELU
        if module.act.approximate == "none"
    }
    packable = (nn.Linear, ProjectionWithoutKeyBias)  # a projection's keys have a bias of zero
    for module in modules:
        if isinstance(module, Mlp) and module.fc1 in fused:
            module.act = nn.Identity()
        elif isinstance(module, nn.Linear) and type(module) in packable:
            _pack(module, "gelu" if module in fused else "none")


def _pack(linear: nn.Linear, activation: str) -> None:
    """Replace a layer's forward; its weights stay for others to read."""
    import torch

    # What torch's own compiler makes of a linear layer (`torch._inductor.mkldnn_ir`).
    operations = torch.ops.mkldnn
    weight = operations._reorder_linear_weight(linear.weight.detach(), None)
    bias = None if linear.bias is None else linear.bias.detach()
    algorithm = "none" if activation == "gelu" else ""

    def forward(x: Tensor) -> Tensor:
        y: Tensor = operations._linear_pointwise(x, weight, bias, activation, [], algorithm)
        return y

    object.__setattr__(linear, "forward", forward)
