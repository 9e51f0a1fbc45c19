"""Keys that recipes had in earlier versions, in bundles and plans that those versions wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RETIRED_METHOD_KEYS = {"revive_below": 0.0}
"""The value of each key of `method` at which it had no effect.

They shaped the training alone, not the weights: what was trained with them is read without them.
"""


def without_retired(recipe: Any) -> tuple[Any, dict[str, Any]]:
    """Leave out retired keys of a recipe's tree.

    Args:
        recipe: the tree as it was read; anything else is returned as it is.

    Returns:
        The tree without them; and those that had an effect, by dotted key.
    """
    method = recipe.get("method") if isinstance(recipe, Mapping) else None
    if not isinstance(method, Mapping):
        return recipe, {}
    kept = {key: value for key, value in method.items() if key not in RETIRED_METHOD_KEYS}
    had_effect = {
        f"method.{key}": method[key]
        for key, without_effect in RETIRED_METHOD_KEYS.items()
        if method.get(key, without_effect) != without_effect
    }
    return {**recipe, "method": kept}, had_effect
