"""Bundles that a method needs from elsewhere: a tokenizer, a teacher, weights to begin with.

Each is named by a key of the recipe, checked before the run, its digest written into the plan,
copied into the run's directory, and loaded from there by every worker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.trainers.bundles import (
    CARD,
    ENCODER,
    METHOD,
    BundleCard,
    bundle_place,
    fetch_bundle,
    read_card,
    verify_weights,
)
from mimray.trainers.config.run import Recipe, parse_recipe
from mimray.trainers.errors import BundleError, ConfigError, RunConflictError
from mimray.trainers.methods.catalogue import method_class
from mimray.trainers.storage import RunDir

if TYPE_CHECKING:
    from mimray.trainers.methods.base import Method


@dataclass(frozen=True)
class Need:
    """A bundle that a method needs.

    Attributes:
        key: of the recipe's `method` section, one of its `places`: where the bundle lies.
            `<key>_sha256` is the digest.
        folder: name of the folder that keeps it in the run and, where it stays, in the bundle.
        noun: what the bundle is to the method, as errors call it.
        check: holds a recipe against the bundle's card and gives the keys of the method's section
            that follow from it; raises ConfigError where they do not fit.
        stays: True for a network that the method calls while it trains and afterwards, which goes
            into the exported bundle; False for an encoder's weights to begin with.
        missing: refusal where no place is named; None where the method does without.
    """

    key: str
    folder: str
    noun: str
    check: Callable[[Recipe, BundleCard], Mapping[str, Any]]
    stays: bool
    missing: ConfigError | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Files of weights that are needed."""
        return (ENCODER, METHOD) if self.stays else (ENCODER,)

    def place(self, recipe: Recipe) -> str:
        """Where it lies, path or URI; empty for nowhere."""
        return str(getattr(recipe.method, self.key))

    def digest(self, card: BundleCard) -> str:
        """SHA-256 of all weights that are needed, hex."""
        if not self.stays:
            return card.weights_sha256
        return hashlib.sha256(f"{card.weights_sha256}{card.method_sha256}".encode()).hexdigest()

    def wanted_digest(self, recipe: Recipe) -> str:
        """The digest that the plan was made with; empty before there is one."""
        return str(getattr(recipe.method, f"{self.key}_sha256"))

    def verify(self, folder: Path, recipe: Recipe) -> BundleCard:
        """The card of a bundle that is whole and the one of the plan.

        Raises:
            BundleError: it is damaged, or another one.
        """
        card = read_card(folder)
        for name in self.files:
            verify_weights(folder, card, name)
        wanted, found = self.wanted_digest(recipe), self.digest(card)
        if wanted and found != wanted:
            raise BundleError(
                f"the {self.noun} in {folder} ({found[:12]}) is not the one of the plan "
                f"({wanted[:12]})",
                hint=f"name the same one with --set method.{self.key}=…",
            )
        return card


def needs_of(recipe: Recipe) -> tuple[Need, ...]:
    """What the method of a recipe needs."""
    if not recipe.method.places:
        return ()  # without importing the method
    return method_class(recipe.method.name).needs()


def with_needs(recipe: Recipe) -> Recipe:
    """Hold a recipe against the bundles it names, and write down which ones they are.

    Args:
        recipe: of any method.

    Returns:
        The recipe with digests, and the keys that follow from the bundles, filled in.

    Raises:
        ConfigError: it names none where one is needed, or one that does not fit.
        BundleError: there is no such bundle, it is damaged, or another one than the digest says.
    """
    for need in needs_of(recipe):
        if not need.place(recipe):
            if need.missing is not None:
                raise need.missing
            continue
        folder = fetch_bundle(need.place(recipe))
        follows = need.check(recipe, read_card(folder))
        card = need.verify(folder, recipe)
        found = {f"{need.key}_sha256": need.digest(card), **follows}
        method = recipe.method.model_copy(update=found)
        recipe = recipe.model_copy(update={"method": method})
    return recipe


def foresee(recipe: Recipe) -> tuple[Recipe, dict[str, Recipe], list[str]]:
    """A recipe as `with_needs` leaves it, where what it needs may not be there yet.

    Args:
        recipe: of any method.

    Returns:
        The recipe, the recipes of the networks that stay beside the method by their folder, and a
        note for each that is not there.

    Raises:
        ConfigError: one is there and does not fit.
    """
    networks: dict[str, Recipe] = {}
    notes: list[str] = []
    for need in needs_of(recipe):
        place = need.place(recipe)
        if not need.stays:
            continue
        if not place:
            notes.append(f"method.{need.key} names no {need.noun}, so that none is counted")
            continue
        try:
            folder = fetch_bundle(place)
        except BundleError:
            notes.append(f"there is no {need.noun} at {place} yet, so that none is counted")
            continue
        networks[need.folder] = parse_recipe(read_card(folder).recipe, str(folder))
    return (recipe if notes else with_needs(recipe)) if networks else recipe, networks, notes


def keep_needs(recipe: Recipe, run: RunDir) -> None:
    """Copy what a recipe needs into its run, where every worker finds it.

    Args:
        recipe: of any method.
        run: the run's directory.

    Raises:
        BundleError: a bundle is no longer where it was.
        StorageError: it cannot be written.
    """
    for need in needs_of(recipe):
        if not need.place(recipe):
            continue
        folder, place = fetch_bundle(need.place(recipe)), run / need.folder
        place.create()
        if place.local is not None and place.local.samefile(folder):
            continue
        for name in (*need.files, CARD):  # the card last: it makes a folder a bundle
            place.upload(folder / name, name)


def check_outside(recipe: Recipe, run: RunDir) -> None:
    """Refuse to delete a run's directory that holds what its recipe needs.

    Raises:
        RunConflictError: the bundle lies in there.
    """
    for need in needs_of(recipe):
        if need.place(recipe) and run.holds(bundle_place(need.place(recipe))):
            raise RunConflictError(
                f"--fresh would delete {run} and method.{need.key} with it",
                hint=f"choose another --name, or copy the {need.key} first",
            )


def kept_needs(recipe: Recipe, run: RunDir) -> dict[str, Path]:
    """The networks that stay with a run's method: their folders on this machine by name."""
    return {
        need.folder: fetch_bundle((run / need.folder).uri)
        for need in needs_of(recipe)
        if need.stays and run.exists(f"{need.folder}/{CARD}")
    }


def load_needs(method: Method, run: RunDir) -> None:
    """Give a method what its run keeps for it.

    Args:
        method: freshly built.
        run: the run's directory.

    Raises:
        BundleError: something is damaged, or another one than that of the plan.
    """
    for need in method.needs():
        if need.place(method.recipe):
            supply(method, need.folder, fetch_bundle((run / need.folder).uri))


def supply(method: Method, name: str, folder: Path) -> None:
    """Give a method one of the bundles it needs.

    Args:
        method: whose `needs` name it.
        name: the need's `folder`.
        folder: the bundle's.

    Raises:
        BundleError: it is damaged, or another one than that of the plan.
    """
    (need,) = (need for need in method.needs() if need.folder == name)
    need.verify(folder, method.recipe)
    method.take(name, folder)
