"""Bundles that a recipe names by the trial of a sweep."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mimray.trainers.config.run import Recipe


def with_places(recipe: Recipe, storage: str) -> Recipe:
    """A recipe with the runs that `SWEEP:best` and `SWEEP:7` stand for in their places.

    Args:
        recipe: a recipe of any method.
        storage: the directory or URI of all runs and sweeps.

    Raises:
        StorageError: there is no such sweep or trial.
    """
    named = {
        key: place for key in recipe.method.bundle_keys if (place := getattr(recipe.method, key))
    }
    if not any(":" in place for place in named.values()):
        return recipe  # spares the import

    from mimray.tuning.record import trial_place

    found = {key: trial_place(place, storage) for key, place in named.items()}
    return recipe.model_copy(update={"method": recipe.method.model_copy(update=found)})
