"""One training step on shapes alone: what it computes and holds, without computing it.

Parameters and pictures lie on torch's meta device and have no values; masks are real, since
shapes depend on them. So a ViT-H takes seconds and no memory, at its real batch and precision.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from trainers.config.run import Recipe
from trainers.methods import build_method
from trainers.methods.base import Method
from trainers.methods.beit import BEiT
from trainers.models.decoders import MAEDecoder

aten = torch.ops.aten

# Modules that turn the last tokens or maps into predictions, by their names in a method.
HEADS = ("head", "decoder.pred", "decoder.to_pixels")
PARTS = ("encoder", "decoder", "head", "tokenizer")


@dataclass(frozen=True)
class Step:
    """Forward and backward of one micro batch.

    Attributes:
        forward_flops: of a picture, by part; a multiply-add counts as 2.
        training_flops: of a picture, forward and backward, what is computed again included.
        encoder_tokens: that leave the encoder for a picture, class token included.
        decoder_tokens: in a transformer decoder, class token included; 0 without one.
        activations: the most bytes held at once beside parameters and their gradients.
        with_gradients: the same, gradients included, which grow while activations go.
    """

    forward_flops: dict[str, float]
    training_flops: float
    encoder_tokens: int
    decoder_tokens: int
    activations: int
    with_gradients: int


def shape_of(recipe: Recipe, dtype: torch.dtype, tokenizer: Recipe | None = None) -> Method:
    """A method without values: parameters of `dtype`, buffers as they are, as DeepSpeed casts.

    Args:
        recipe: what to build.
        dtype: of the parameters.
        tokenizer: recipe of a BEiT's tokenizer; without it, codes come from nowhere.
    """
    with torch.device("meta"):
        method = build_method(recipe)
        for parameter in method.parameters():
            parameter.data = parameter.data.to(dtype)
        if isinstance(method, BEiT):
            found = build_method(tokenizer).eval() if tokenizer else _NoTokenizer(recipe)
            method.attach(found)  # type: ignore[arg-type]
    return method


def parts_of(method: Method) -> dict[str, list[nn.Module]]:
    """The modules of each part but the decoder, which is all the rest."""
    heads = [module for name, module in method.named_modules() if name in HEADS]
    parts = {"encoder": [method.encoder], "head": heads}
    tokenizer = method.tokenizer if isinstance(method, BEiT) else None
    return {**parts, "tokenizer": [tokenizer] if isinstance(tokenizer, nn.Module) else []}


def trace(method: Method, batch: int, *, checkpointing: bool, on_gpu: bool) -> Step:
    """Run one step on shapes.

    Args:
        method: from `shape_of`.
        batch: pictures at once.
        checkpointing: compute the encoder's activations again in the backward pass.
        on_gpu: attention as GPUs compute it; on CPUs a learnt bias keeps it from being fused.
    """
    recipe = method.recipe
    method.train()
    method.encoder.activation_checkpointing = checkpointing
    dtype = next(method.parameters()).dtype
    height, width = recipe.data.image_size
    images = torch.empty(batch, recipe.data.channels, height, width, dtype=dtype, device="meta")
    inputs = {"images": images, **_masks(recipe, method.draw_mask, batch)}
    if recipe.tokenizer_size is not None:
        shape = (batch, recipe.data.channels, *recipe.tokenizer_size)
        inputs["tokenizer_images"] = torch.empty(shape, dtype=torch.uint8, device="meta")

    ledger = _Ledger()
    ledger.ignore([*method.parameters(), *method.buffers()])
    ledger.hold(inputs)
    handles = [p.register_post_accumulate_grad_hook(ledger.gradient) for p in _trained(method)]
    for part, modules in parts_of(method).items():
        for module in modules:
            handles.append(module.register_forward_pre_hook(ledger.enter(part)))
            handles.append(module.register_forward_hook(ledger.leave, always_call=True))
    tokens: list[int] = []

    def count_tokens(_: nn.Module, __: Any, output: Any) -> None:
        tokens.append(output.tokens.shape[1] + output.prefix.shape[1])

    handles.append(method.encoder.register_forward_hook(count_tokens))
    attention = _fused_attention(on_gpu)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", attention), ledger:
            output = method(**inputs)
            forward = {part: flops / batch for part, flops in ledger.flops.items()}
            output.loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        method.zero_grad(set_to_none=True)
    decoder = getattr(method, "decoder", None)
    return Step(
        forward_flops=forward,
        training_flops=sum(ledger.flops.values()) / batch,
        encoder_tokens=tokens[0],
        decoder_tokens=math.prod(recipe.grid) + 1 if isinstance(decoder, MAEDecoder) else 0,
        activations=ledger.most_beside_gradients,
        with_gradients=ledger.most,
    )


class _Ledger(TorchDispatchMode):
    """Sees every operation: counts its FLOPs and the bytes that are alive.

    An operation on both kinds of tensors, with and without values, is run without.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = dict.fromkeys(PARTS, 0.0)
        self.most = self.most_beside_gradients = 0
        self._live = self._gradients = 0
        self._known = WeakIdKeyDictionary()
        self._inside: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = _run(func, args, kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            part = self._inside[-1] if self._inside else "decoder"
            self.flops[part] += formula(*args, **kwargs, out_val=output)
        self.hold(output)
        return output

    def hold(self, tree: Any) -> None:
        """Count the memory behind tensors until the last of them is gone."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage not in self._known:
                self._known[storage] = True
                self._live += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        self.most = max(self.most, self._live)
        self.most_beside_gradients = max(self.most_beside_gradients, self._live - self._gradients)

    def ignore(self, tensors: list[Tensor]) -> None:
        """Leave the memory behind tensors out."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = True

    def gradient(self, parameter: Tensor) -> None:
        """A parameter has got its gradient."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.untyped_storage().nbytes()

    def enter(self, part: str) -> Callable[..., None]:
        """A hook: what follows belongs to this part."""
        return lambda *_: self._inside.append(part)

    def leave(self, *_: Any) -> None:
        """A hook: the part has ended."""
        self._inside.pop()

    def _drop(self, size: int) -> None:
        self._live -= size


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation, on shapes where any of its tensors is one."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    kinds = {tensor.is_meta for tensor in tensors}
    if func is aten._local_scalar_dense.default and kinds == {True}:
        return tensors[0].dtype.is_floating_point * 1.0 or 1  # a value that nobody knows: yes
    if func is aten.bincount.default and kinds == {True}:
        return torch.empty(kwargs.get("minlength", args[-1]), dtype=torch.int64, device="meta")
    if kinds == {True, False}:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            # Only a real mask says how many it chooses.
            args = (args[0], [i for index in args[1] for i in _as_numbers(index)], *args[2:])
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
    return func(*args, **kwargs)


def _as_numbers(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool or index.is_meta:
        return [index]
    return list(index.nonzero().unbind(dim=1))


def _without_values(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _fused_attention(on_gpu: bool) -> Callable[..., Tensor]:
    """Attention that never holds its scores; torch has none for shapes alone."""
    plain = F.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad and not on_gpu:
            return plain(q, k, v, attn_mask=attn_mask, **options)
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*q.shape[:-1], k.shape[-2])
        return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            q, k, v, attn_mask, True, scale=options.get("scale")
        )[0]

    return attention


def _masks(
    recipe: Recipe, draw_mask: Callable[..., np.ndarray | None], batch: int
) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    drawn = [draw_mask(recipe, rng) for _ in range(batch)]
    masks = [mask for mask in drawn if mask is not None]
    return {"mask": torch.from_numpy(np.stack(masks))} if masks else {}


def _trained(method: nn.Module) -> list[nn.Parameter]:
    return [p for p in method.parameters() if p.requires_grad]


class _NoTokenizer:
    """Stands in for a tokenizer that is not there: its codes cost nothing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def codes(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), *self.recipe.grid, dtype=torch.int64)

    def to(self, device: torch.device) -> _NoTokenizer:
        return self
