"""FLOPs and activation memory of one training step, traced on shapes alone.

Parameters and pictures lie on torch's meta device and have no values; masks are real, since
shapes depend on them. So a ViT-H takes seconds and no memory, at its real batch and precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mimray.trainers.bundles import BundleCard
from mimray.trainers.config.run import Recipe
from mimray.trainers.engine.average import with_average
from mimray.trainers.methods.base import Method
from mimray.trainers.methods.catalogue import build_method, inputs_of
from mimray.trainers.methods.inputs import placeholders
from mimray.trainers.methods.lora import adapt
from mimray.trainers.models.blocks import checkpoint_activations
from mimray.trainers.models.decoders import CrossDecoder, MAEDecoder

aten = torch.ops.aten

REST = "decoder"
"""The part of all modules that are in no other part."""

LOWERED = frozenset(
    ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "matmul", "__matmul__", "mm")
    + ("bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")
)
"""Names of the operations that autocast computes in the lower precision."""


@dataclass(frozen=True)
class Step:
    """FLOPs, tokens and memory of the forward and backward pass of one micro batch.

    Attributes:
        forward_flops: forward FLOPs per picture, by part; a multiply-add counts as 2.
        training_flops: forward and backward FLOPs per picture, recomputation included.
        encoder_tokens: tokens that leave the encoder per picture, class token included.
        decoder_tokens: tokens in a transformer decoder, class token included where it is decoded;
            0 without one.
        activations: peak of bytes held beside parameters and their gradients.
        with_gradients: peak of bytes held beside parameters; gradients are allocated while
            activations are freed.
    """

    forward_flops: dict[str, float]
    training_flops: float
    encoder_tokens: int
    decoder_tokens: int
    activations: int
    with_gradients: int


def shape_of(recipe: Recipe, dtype: torch.dtype, networks: Mapping[str, BundleCard]) -> Method:
    """A method on the meta device, cast as by DeepSpeed: parameters to `dtype`, buffers not.

    Args:
        recipe: the recipe of the method.
        dtype: the parameters' data type.
        networks: cards of the networks that the method calls but does not own, by the folder of
            their need; one that is missing costs nothing.
    """
    with torch.device("meta"):
        method = build_method(recipe)
        if recipe.method.holds_start:
            method.hold_start()
        adapt(method)
        with_average(method)
        for parameter in method.parameters():
            parameter.data = parameter.data.to(dtype)
        for need in method.needs():
            if need.called:
                method.expect(need.folder, networks.get(need.folder))
    return method


def part_names(method: Method) -> list[str]:
    """Names of a method's parts, the encoder's and `REST` first."""
    first = ["encoder", REST]
    return first + [name for name in method.parts() if name not in first]


def trace(
    method: Method,
    batch: int,
    *,
    checkpointing: bool,
    on_gpu: bool,
    autocast: torch.dtype | None = None,
) -> Step:
    """Trace one step on shapes.

    Args:
        method: a result of `shape_of`.
        batch: pictures in the micro batch.
        checkpointing: True to compute the activations of blocks again in the backward pass.
        on_gpu: True for attention as GPUs compute it; on CPUs a learnt bias keeps it from being
            fused.
        autocast: the data type of products and convolutions of fp32 weights; None for theirs.
    """
    method.train()
    checkpoint_activations(method, checkpointing)
    recipe, dtype = method.recipe, next(method.parameters()).dtype
    inputs = placeholders(inputs_of(recipe), recipe, batch, dtype)
    called = [module for modules in method.parts().values() for module in modules]
    weights = [t for m in (method, *called) for t in (*m.parameters(), *m.buffers())]
    ledger = _Ledger(part_names(method), ignored=weights)
    ledger.hold(inputs)
    decoder = getattr(method, "decoder", None)
    tokens: list[int] = []
    decoded: list[int] = []

    def count_tokens(_: nn.Module, __: Any, output: Any) -> None:
        tokens.append(output.tokens.shape[:2].numel() + output.prefix.shape[:2].numel())

    def count_decoded(module: Any, _: Any, prediction: Tensor) -> None:
        decoded.append(prediction.shape[1] + module.num_prefix)

    with ExitStack() as stack:
        stack.callback(method.zero_grad, set_to_none=True)
        for handle in (
            method.encoder.register_forward_hook(count_tokens),
            *_watch_parts(method, ledger),
            *_watch_gradients(method, ledger),
        ):
            stack.callback(handle.remove)
        if isinstance(decoder, MAEDecoder | CrossDecoder):
            stack.callback(decoder.register_forward_hook(count_decoded).remove)
        attention = _fused_attention(on_gpu)
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(mock.patch.object(method, "within", ledger.within))
        if autocast is not None:
            # It has no effect on the meta device; it tells where a method switches it off.
            stack.enter_context(torch.autocast("cpu", autocast, cache_enabled=False))
            stack.enter_context(_Autocast(autocast, on_gpu))
        with ledger:
            output = method(**inputs)
            forward = {part: flops / batch for part, flops in ledger.flops.items()}
            _backward(output.loss)
    return Step(
        forward_flops=forward,
        training_flops=sum(ledger.flops.values()) / batch,
        encoder_tokens=sum(tokens) // batch,
        decoder_tokens=sum(decoded),
        activations=ledger.most_beside_gradients,
        with_gradients=ledger.most,
    )


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the FLOPs of every operation, and the bytes of live tensors.

    Args:
        parts: names of the method's parts.
        ignored: tensors whose memory is not counted.
    """

    def __init__(self, parts: Iterable[str], ignored: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = dict.fromkeys(parts, 0.0)
        self.most = self.most_beside_gradients = 0
        self._live = self._gradients = 0
        self._known = WeakIdKeyDictionary()
        self._parts = [REST]
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
        """Count the storage of tensors until the last reference to it is gone."""
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
        """Count a parameter's new gradient."""
        assert parameter.grad is not None
        self._gradients += parameter.grad.untyped_storage().nbytes()

    def enter(self, part: str) -> None:
        """Attribute the following operations to a part."""
        self._parts.append(part)

    def leave(self) -> None:
        """Return to the part before."""
        self._parts.pop()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Attribute operations within the context to a part."""
        self.enter(part)
        try:
            yield
        finally:
            self.leave()

    def _drop(self, size: int) -> None:
        self._live -= size


def _backward(loss: Tensor) -> None:
    """Backward pass within torch function modes, which torch's own functions for it would leave.

    Blocks are computed again there under activation checkpointing.
    """
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (),
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip


class _Autocast(TorchFunctionMode):
    """Autocast on the meta device, which torch's own passes over.

    Args:
        dtype: the lower precision.
        on_gpu: True to normalise in fp32, as autocast does on GPUs and does not on CPUs.

    Source: torch's lists of operations, "CUDA Ops that can autocast to float16" and "to float32".
    """

    def __init__(self, dtype: torch.dtype, on_gpu: bool) -> None:
        super().__init__()
        self._dtype = dtype
        self._raised = ("layer_norm", "group_norm") if on_gpu else ()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu"):
            to = self._dtype if name in LOWERED else None
            to = torch.float32 if name in self._raised else to
            if to is not None:
                args, kwargs = tree_map_only(
                    Tensor, lambda t: t.to(to) if t.is_floating_point() else t, (args, kwargs)
                )
        return func(*args, **kwargs)


def _watch_parts(method: Method, ledger: _Ledger) -> Iterator[Any]:
    for part, modules in method.parts().items():
        for module in modules:
            yield module.register_forward_pre_hook(lambda *_, part=part: ledger.enter(part))
            yield module.register_forward_hook(lambda *_: ledger.leave())


def _watch_gradients(method: Method, ledger: _Ledger) -> Iterator[Any]:
    for parameter in method.parameters():
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook
            yield hook(ledger.gradient)  # type: ignore[no-untyped-call]


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation, on the meta device if any of its tensors lies there."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    kinds = {tensor.is_meta for tensor in tensors}
    if func is aten._local_scalar_dense.default and kinds == {True}:
        return 1  # the value is unknown; conditions on it count as true
    if func is aten.bincount.default and kinds == {True}:
        _, _, size = (*args, None, 0)[:3]
        return torch.empty(size, dtype=torch.int64, device="meta")
    if kinds == {True, False}:
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            # The number of chosen elements is known from a real mask only.
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
    """Attention that never holds its scores; torch does not fuse it on the meta device."""
    plain = F.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad and not on_gpu:
            return plain(q, k, v, attn_mask=attn_mask, **options)
        bias = (
            None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
        )
        mixed: Tensor = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, compute_log_sumexp=True, scale=options.get("scale")
        )[0]
        return mixed

    return attention
