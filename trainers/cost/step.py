"""One training step on shapes alone: what it computes and holds, without computing it.

Parameters and pictures lie on torch's meta device and have no values; masks are real, since
shapes depend on them. So a ViT-H takes seconds and no memory, at its real batch and precision.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
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

from mimray.trainers.config.run import Recipe
from mimray.trainers.methods import build_method
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.beit import BEiT, Tokenizer
from mimray.trainers.models.decoders import MAEDecoder

aten = torch.ops.aten

PARTS = ("encoder", "decoder", "head", "tokenizer")
# Modules that turn the last tokens or maps into predictions, by their names in a method.
HEADS = ("head", "decoder.pred", "decoder.to_pixels")


@dataclass(frozen=True)
class Step:
    """Forward and backward of one micro batch.

    Attributes:
        forward_flops: of a picture, by part; a multiply-add counts as 2.
        training_flops: of a picture, forward and backward, what is computed again included.
        encoder_tokens: that leave the encoder for a picture, class token included.
        decoder_tokens: in a transformer decoder, class token included; 0 without one.
        activations: the most bytes held at once beside parameters and their gradients.
        with_gradients: the same, gradients included, which come while activations go.
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
            assert isinstance(found, Tokenizer)
            method.attach(found)
    return method


def parts_of(method: Method) -> dict[str, list[nn.Module]]:
    """The modules of each part; the decoder is all that is in none of them."""
    heads = [module for name, module in method.named_modules() if name in HEADS]
    tokenizer = method.tokenizer if isinstance(method, BEiT) else None
    apart: list[nn.Module] = [tokenizer] if isinstance(tokenizer, nn.Module) else []
    return {"encoder": [method.encoder], "head": heads, "tokenizer": apart}


def trace(method: Method, batch: int, *, checkpointing: bool, on_gpu: bool) -> Step:
    """Run one step on shapes.

    Args:
        method: from `shape_of`.
        batch: pictures at once.
        checkpointing: compute the encoder's activations again in the backward pass.
        on_gpu: attention as GPUs compute it; on CPUs a learnt bias keeps it from being fused.
    """
    method.train()
    method.encoder.activation_checkpointing = checkpointing
    inputs = _inputs(method, batch)
    ledger = _Ledger(ignored=[*method.parameters(), *method.buffers()])
    ledger.hold(inputs)
    tokens: list[int] = []

    def count_tokens(_: nn.Module, __: Any, output: Any) -> None:
        tokens.append(output.tokens.shape[1] + output.prefix.shape[1])

    with ExitStack() as stack:
        stack.callback(method.zero_grad, set_to_none=True)
        for handle in (
            method.encoder.register_forward_hook(count_tokens),
            *_watch_parts(method, ledger),
            *_watch_gradients(method, ledger),
        ):
            stack.callback(handle.remove)
        attention = _fused_attention(on_gpu)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        if isinstance(method, BEiT):
            codes = ledger.within("tokenizer", method.codes)
            stack.enter_context(mock.patch.object(method, "codes", codes))
        with ledger:
            output = method(**inputs)
            forward = {part: flops / batch for part, flops in ledger.flops.items()}
            output.loss.backward()
    in_decoder = isinstance(getattr(method, "decoder", None), MAEDecoder)
    return Step(
        forward_flops=forward,
        training_flops=sum(ledger.flops.values()) / batch,
        encoder_tokens=tokens[0],
        decoder_tokens=math.prod(method.recipe.grid) + 1 if in_decoder else 0,
        activations=ledger.most_beside_gradients,
        with_gradients=ledger.most,
    )


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation: counts its FLOPs, and the bytes that are alive.

    Args:
        ignored: tensors whose memory does not count.
    """

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = dict.fromkeys(PARTS, 0.0)
        self.most = self.most_beside_gradients = 0
        self._live = self._gradients = 0
        self._known = WeakIdKeyDictionary()
        self._parts = ["decoder"]
        for tensor in ignored:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = _run(func, args, kwargs)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops[self._parts[-1]] += formula(*args, **kwargs, out_val=output)
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

    def gradient(self, parameter: Tensor) -> None:
        """A parameter has got its gradient."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.untyped_storage().nbytes()

    def enter(self, part: str) -> None:
        """What follows belongs to this part."""
        self._parts.append(part)

    def leave(self) -> None:
        """The part has ended."""
        self._parts.pop()

    def within(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, as a part."""

        def wrapped(*args: Any) -> Any:
            self.enter(part)
            try:
                return function(*args)
            finally:
                self.leave()

        return wrapped

    def _drop(self, size: int) -> None:
        self._live -= size


def _watch_parts(method: Method, ledger: _Ledger) -> Iterator[Any]:
    parts = parts_of(method)
    for part in ("encoder", "head"):
        for module in parts[part]:
            yield module.register_forward_pre_hook(lambda *_, part=part: ledger.enter(part))
            yield module.register_forward_hook(lambda *_: ledger.leave())


def _watch_gradients(method: Method, ledger: _Ledger) -> Iterator[Any]:
    for parameter in method.parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook
            yield hook(ledger.gradient)  # type: ignore[no-untyped-call]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation; without values where any of its tensors has none."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    kinds = {tensor.is_meta for tensor in tensors}
    if func is aten._local_scalar_dense.default and kinds == {True}:
        return 1  # of a value that nobody knows; where it is asked for, it says yes
    if func is aten.bincount.default and kinds == {True}:
        _, _, size = (*args, None, 0)[:3]
        return torch.empty(size, dtype=torch.int64, device="meta")
    if kinds == {True, False}:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            # Only a real mask says how many it chooses.
            args = (args[0], [i for index in args[1] for i in _as_numbers(index)], *args[2:])
        args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
    return func(*args, **kwargs)


def _as_numbers(index: Tensor | None) -> list[Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return list(index.nonzero().unbind(dim=1))


def _without_values(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _fused_attention(on_gpu: bool) -> Callable[..., Tensor]:
    """Attention that never holds its scores; by itself torch has none for shapes alone."""
    plain = F.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad and not on_gpu:
            return plain(q, k, v, attn_mask=attn_mask, **options)
        bias = None if attn_mask is None else attn_mask.expand(*q.shape[:-1], k.shape[-2])
        mixed: Tensor = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, compute_log_sumexp=True, scale=options.get("scale")
        )[0]
        return mixed

    return attention


def _inputs(method: Method, batch: int) -> dict[str, Tensor]:
    """What the loop hands to a method, in its precision; one mask for each picture."""
    recipe, dtype = method.recipe, next(method.parameters()).dtype
    chans = recipe.data.channels
    inputs = {
        "images": torch.empty(batch, chans, *recipe.data.image_size, dtype=dtype, device="meta")
    }
    rng = np.random.default_rng(0)
    drawn = [method.draw_mask(recipe, rng) for _ in range(batch)]
    masks = [mask for mask in drawn if mask is not None]
    if masks:
        inputs["mask"] = torch.from_numpy(np.stack(masks))
    if recipe.tokenizer_size is not None:
        shape = (batch, chans, *recipe.tokenizer_size)
        inputs["tokenizer_images"] = torch.empty(shape, dtype=torch.uint8, device="meta")
    if recipe.learns_classes:
        inputs["labels"] = torch.empty(batch, dtype=torch.int64, device="meta")
    return inputs


class _NoTokenizer(Tokenizer):
    """Stands in for a tokenizer that is not there; its codes cost nothing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def codes(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), *self.recipe.grid, dtype=torch.int64)

    def decode_codes(self, codes: Tensor) -> Tensor:
        raise NotImplementedError("no training step decodes codes")

    def to(self, device: torch.device) -> _NoTokenizer:
        return self
