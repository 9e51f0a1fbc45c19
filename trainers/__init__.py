"""Everything that learns: data, models, methods, the training loop and the frozen result.

The public names are loaded on first use, so that importing a leaf of this package
(`mimray.trainers.errors`, `mimray.trainers.config`) costs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mimray.trainers.evaluation.load_head import load_head as load_head
    from mimray.trainers.methods.load import load_method as load_method
    from mimray.trainers.registry import load_bundle as load_bundle

__all__ = ["load_bundle", "load_head", "load_method"]


def __getattr__(name: str) -> Any:
    if name == "load_bundle":
        from mimray.trainers.registry import load_bundle

        return load_bundle
    if name == "load_head":
        from mimray.trainers.evaluation.load_head import load_head

        return load_head
    if name == "load_method":
        from mimray.trainers.methods.load import load_method

        return load_method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
