"""Exponential moving averages (EMA) of modules, such as teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mimray.trainers.config.schedule import Schedule


class MovingAverages(nn.Module):
    """Exponential moving averages of modules: theta' <- m theta' + (1 - m) theta.

    The averages are copies in evaluation mode that get no gradients. Their weights are buffers, so
    they are in checkpoints and bundles, and ZeRO neither shards nor optimises them. They stay in
    fp32 when the method is cast, since in bf16 an update of less than a 256th of a weight is lost.
    The engine updates them after each step from the optimiser's fp32 weights.

    The rounding error of each fp32 sum is kept in bf16 and added with the next update. Without it
    an average stands still as soon as (1 - m) of the way to its goal is less than half a unit in
    the last place: at m = .9999 for the last 3e-4 of it.

    Args:
        followed: modules and single parameters to average, by the names of the method's attributes;
            `averages.NAME` follows `NAME`.
        momentum: the schedule of m.

    Source: Tarvainen & Valpola 2017, "Mean teachers are better role models", eq. 1; rounding errors
        by Knuth's two-sum (The Art of Computer Programming, vol. 2, 4.2.2, theorem B).
    """

    _precision: Tensor

    def __init__(
        self, followed: Mapping[str, nn.Module | nn.Parameter], momentum: Schedule
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.names = tuple(followed)
        # Its dtype is the one the method was cast to.
        self.register_buffer("_precision", torch.empty(0), persistent=False)
        self.residuals = nn.Module()
        for name, one in followed.items():
            for leaf, parameter in _parameters(name, one):
                if parameter.requires_grad:
                    self.residuals.register_buffer(
                        _flat(leaf), torch.zeros_like(parameter, dtype=torch.bfloat16)
                    )
            if isinstance(one, nn.Parameter):
                self.register_buffer(name, one.detach().clone())
            else:
                self.add_module(name, _as_buffers(copy.deepcopy(one)))
        self.eval()

    def follows(self, name: str) -> bool:
        """True if a parameter or buffer of the method, by its name, is averaged or copied."""
        return name.split(".", 1)[0] in self.names

    def forward(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call an average without gradients, in the method's precision.

        Args:
            name: the name of the followed module.
            arguments: positional arguments of the module.
            options: keyword arguments of the module.
        """
        device, dtype = self._precision.device, self._precision.dtype
        lower = dtype != torch.float32 and device.type != "meta"
        context = torch.autocast(device.type, dtype) if lower else nullcontext()
        with torch.no_grad(), context:
            return self.get_submodule(name)(*arguments, **options)

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]], momentum: float) -> None:
        """Update the averages by one step.

        Args:
            weights: fp32 weights and buffers of the followed modules, by their names in the method.
                Those that are no trained parameters, such as counters, are copied.
            momentum: the momentum m of this step.
        """
        averages = dict(self.named_buffers())
        for name, value in weights:
            average = averages[name]
            residual = averages.get(f"residuals.{_flat(name)}")
            if residual is None:  # a counter or a statistic
                average.copy_(value)
            else:
                _move(average, residual, value.to(average.device), 1 - momentum)

    @torch.no_grad()
    def begin(self, method: nn.Module) -> None:
        """Begin anew with the weights of the followed modules.

        Args:
            method: the module that has them, under the names that are followed.
        """
        for name in self.names:
            averages = dict(self.get_submodule(name).named_buffers())
            for key, value in method.get_submodule(name).state_dict().items():
                averages[key].copy_(value)

    def train(self, mode: bool = True) -> MovingAverages:
        """Keep evaluation mode, whatever the argument."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MovingAverages:
        before = {n: b for n, b in self.named_buffers() if b is not self._precision}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            if buffer.is_floating_point():
                module, _, leaf = name.rpartition(".")
                moved = buffer.to(self.get_buffer(name).device)
                setattr(self.get_submodule(module), leaf, moved)
        return self


def _parameters(name: str, one: nn.Module | nn.Parameter) -> Iterable[tuple[str, nn.Parameter]]:
    return [(name, one)] if isinstance(one, nn.Parameter) else one.named_parameters(prefix=name)


def _flat(name: str) -> str:
    """A name without dots, which a buffer's may not contain."""
    return name.replace(".", "/")


def _move(average: Tensor, residual: Tensor, goal: Tensor, share: float) -> None:
    """Move `average + residual` towards a goal by a share of the way, in place."""
    low = residual.float()
    change = (goal.float() - average).sub_(low).mul_(share).add_(low)
    total = average + change
    back = total - average
    residual.copy_((average - (total - back)) + (change - back))
    average.copy_(total)


def _as_buffers(module: nn.Module) -> nn.Module:
    """Replace a module's parameters by buffers, in place."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach().clone())
    return module
