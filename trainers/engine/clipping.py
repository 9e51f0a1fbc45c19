"""Clipping of gradients, each parameter's by its own norm."""

from __future__ import annotations

from mimray.trainers.engine.deepspeed import Engine


def clip_each(engine: Engine, limit: float) -> None:
    """Scale down the gradient of every parameter whose norm is above a limit, in place.

    Called between the backward pass and the step of an update, with gradients that are means over
    workers and micro batches. Under ZeRO each rank has a part of most gradients: norms are of whole
    ones, so that the result depends on neither stage nor workers. Collective under ZeRO.

    DeepSpeed's own `gradient_clipping` is by the norm of all gradients together, which lets one
    large gradient shorten the update of every parameter.

    Args:
        engine: the engine of the method, of any ZeRO stage, without loss scaling or offloading.
        limit: the largest norm.

    Source: Caron et al. 2021 (DINO), the official code's `clip_gradients`.
    """
    from deepspeed.utils import (
        safe_get_full_grad,
        safe_get_local_grad,
        safe_set_full_grad,
        safe_set_local_grad,
    )

    for parameter in engine.module.parameters():
        gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
        if gradient is None:
            continue
        scale = (limit / (gradient.float().norm() + 1e-6)).clamp(max=1.0)
        if hasattr(parameter, "ds_id"):  # ZeRO 3, whose parts are padded
            safe_set_local_grad(parameter, safe_get_local_grad(parameter) * scale)
        else:
            safe_set_full_grad(parameter, gradient * scale)
