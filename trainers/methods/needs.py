"""Bundles that a method needs: a tokenizer, a teacher, or weights to begin with.

A key of the recipe names each. It is checked before the run, its digest is written into the plan,
and it is copied into the run's directory, from which every worker loads it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mimray.trainers.bundles import (
    CARD,
    ENCODER,
    METHOD,
    BundleCard,
    fetch_bundle,
    read_card,
    verify_weights,
)
from mimray.trainers.config.method import MethodConfig
from mimray.trainers.config.run import Recipe
from mimray.trainers.errors import (
    BundleError,
    ConfigError,
    MissingBundleError,
    RunConflictError,
)
from mimray.trainers.methods import initial
from mimray.trainers.methods.catalogue import build_method, method_class
from mimray.trainers.storage import RunDir

if TYPE_CHECKING:
    from mimray.trainers.methods.base import Method

logger = logging.getLogger(__name__)

Fetch = Callable[[str], Path]
"""A function from what a recipe names to a bundle's folder on this machine."""


@dataclass(frozen=True)
class Need:
    """A bundle that a method needs.

    Attributes:
        key: the key of the recipe's `method` section, one of its `places`, that holds the bundle's
            path or URI; `<key>_sha256` holds the digest.
        folder: name of the bundle's copy in the run and, if it is used always, in the exported
            bundle.
        noun: the bundle's role, as error messages name it.
        check: a function that checks a recipe against the bundle's card and returns the keys of
            the `method` section that follow from the card; raises ConfigError if they do not fit.
        use: the time of its use. start: weights to begin with, read once; training: a frozen
            encoder that the method calls in training alone; always: a network that the method calls
            afterwards too, which goes into the exported bundle.
        missing: the error if the recipe names no bundle; None if the method can do without.
    """

    key: str
    folder: str
    noun: str
    check: Callable[[Recipe, BundleCard], Mapping[str, Any]]
    use: Literal["start", "training", "always"]
    missing: ConfigError | None = None

    @property
    def called(self) -> bool:
        """True for a network that the method calls, beside its own modules."""
        return self.use != "start"

    @property
    def exported(self) -> bool:
        """True for a network that goes into the exported bundle."""
        return self.use == "always"

    def files(self, recipe: Recipe, card: BundleCard) -> tuple[str, ...]:
        """Names of the files of weights that are needed."""
        return (ENCODER, METHOD) if self.exported else (ENCODER,)

    def place(self, recipe: Recipe) -> str:
        """Path or URI of the bundle; empty if the recipe names none."""
        return str(getattr(recipe.method, self.key))

    def digest(self, recipe: Recipe, card: BundleCard) -> str:
        """Hexadecimal SHA-256 of all weights that are needed, and of what they are given.

        A frozen encoder's normalisation counts: other bundles of the same weights give other
        features. Weights to begin with are given the recipe's own.
        """
        files = self.files(recipe, card)
        if self.use == "start" and files == (ENCODER,):
            return card.weights_sha256
        rest = card.method_sha256 if METHOD in files else f" {card.mean} {card.std} {card.pooling}"
        return hashlib.sha256(f"{card.weights_sha256}{rest}".encode()).hexdigest()

    def wanted_digest(self, recipe: Recipe) -> str:
        """The digest in the plan; empty in a recipe without one."""
        return str(getattr(recipe.method, f"{self.key}_sha256"))

    def verify(self, folder: Path, recipe: Recipe) -> BundleCard:
        """Verify a bundle's weights against its card and the plan.

        Args:
            folder: the folder of the bundle.
            recipe: the recipe, with the digest if there is a plan.

        Returns:
            The bundle's description, bundle.json.

        Raises:
            BundleError: the bundle is damaged, or not the one of the plan.
        """
        card = read_card(folder)
        for name in self.files(recipe, card):
            verify_weights(folder, card, name)
        wanted, found = self.wanted_digest(recipe), self.digest(recipe, card)
        if wanted and found != wanted:
            raise BundleError(
                f"the {self.noun} in {folder} ({found[:12]}) is not the one of the plan "
                f"({wanted[:12]})",
                hint=f"name the same one with --set method.{self.key}=…",
            )
        return card

    def follow(self, recipe: Recipe, folder: Path) -> Recipe:
        """Check a recipe against a bundle, and fill in what follows from it."""
        follows = self.check(recipe, read_card(folder))
        return recipe.model_copy(update={"method": recipe.method.model_copy(update=follows)})

    def supply(self, method: Method, folder: Path) -> None:
        """Load a verified bundle into a method."""
        method.take(self.folder, folder)


class Initial(Need):
    """Weights that a method begins with: the encoder, and its own head or decoder if there is one.

    Args:
        method: the recipe's `method` section.
    """

    def __init__(self, method: MethodConfig) -> None:
        super().__init__(method.init_key, "initial", "encoder", _nothing_follows, "start")

    def files(self, recipe: Recipe, card: BundleCard) -> tuple[str, ...]:
        """The encoder's, and the method's rest where both are of one method."""
        return (ENCODER, METHOD) if initial.has_rest(recipe, card) else (ENCODER,)

    def follow(self, recipe: Recipe, folder: Path) -> Recipe:
        """Complete the recipe's encoder by that of the weights."""
        return initial.follow(recipe, folder)

    def supply(self, method: Method, folder: Path) -> None:
        """Begin with the weights."""
        initial.begin(method, folder)


def _nothing_follows(recipe: Recipe, card: BundleCard) -> Mapping[str, Any]:
    return {}


def needs_of(recipe: Recipe) -> tuple[Need, ...]:
    """The needs of a recipe's method; the last is the weights to begin with, for any method."""
    # Without places the import of the method is spared.
    own = method_class(recipe.method.name).needs() if recipe.method.places else ()
    return (*own, Initial(recipe.method))


def begins_with_weights(recipe: Recipe) -> bool:
    """True if a recipe names weights to begin with."""
    return any(not need.called and need.place(recipe) for need in needs_of(recipe))


def with_needs(recipe: Recipe, fetch: Fetch = fetch_bundle, run: RunDir | None = None) -> Recipe:
    """Check a recipe against the bundles it names, and fill in what follows from them.

    Args:
        recipe: a recipe of any method.
        fetch: a function that gives a bundle's folder on this machine from what the recipe names.
        run: the run's directory, whose copies serve where a bundle is gone since the run began.

    Returns:
        The recipe with the bundles' digests, and the keys that follow from the bundles.

    Raises:
        ConfigError: the recipe names no bundle although it needs one, or one that does not fit; or
            it adapts or holds on to weights and names none.
        BundleError: a bundle is missing or damaged, or does not match the recipe's digest.
    """
    if not begins_with_weights(recipe):
        if recipe.lora is not None:
            raise ConfigError(
                "lora adapts an encoder's weights, and the recipe names none to begin with",
                hint="--init BUNDLE, or --set lora=null",
            )
        if recipe.method.holds_start:
            raise ConfigError(
                f"{recipe.method.name} holds on to weights to begin with (method.gram_weight), "
                "and the recipe names none",
                hint="--init BUNDLE, or --set method.gram_weight=0",
            )
    return _filled(recipe, fetch, run)


def _filled(recipe: Recipe, fetch: Fetch, run: RunDir | None = None) -> Recipe:
    for need in needs_of(recipe):
        if not need.place(recipe):
            if need.missing is not None:
                raise need.missing
            continue
        folder = _fetched(need, recipe, fetch, run)
        recipe = need.follow(recipe, folder)
        card = need.verify(folder, recipe)
        found = {f"{need.key}_sha256": need.digest(recipe, card)}
        method = recipe.method.model_copy(update=found)
        recipe = recipe.model_copy(update={"method": method})
    return recipe


def _fetched(need: Need, recipe: Recipe, fetch: Fetch, run: RunDir | None) -> Path:
    try:
        return fetch(need.place(recipe))
    except BundleError as error:
        kept = run is not None and run.exists(f"{need.folder}/{CARD}")
        if not kept or not isinstance(error, MissingBundleError):
            named = f"method.{need.key}: {error.args[0]}"
            raise type(error)(named, hint=error.hint) from None
        assert run is not None
        logger.warning("%s; the run's own copy serves", error.args[0])
        return fetch_bundle((run / need.folder).uri)


def initial_lines(recipe: Recipe, asked: Recipe, fetch: Fetch, run: RunDir | None) -> list[str]:
    """Sentences for people on the weights that a run begins with; none if they are fresh.

    Args:
        recipe: a recipe that is complete, with its classes.
        asked: the recipe as it was asked for.
        fetch: a function that gives a bundle's folder on this machine from what the recipe names.
        run: the run's directory, if there is one.
    """
    need = Initial(recipe.method)
    if not need.wanted_digest(recipe):
        return []
    with torch.device("meta"):
        method = build_method(recipe)
    return initial.described(method, _fetched(need, recipe, fetch, run), asked)


def foresee(
    recipe: Recipe, fetch: Fetch = fetch_bundle
) -> tuple[Recipe, dict[str, BundleCard], list[str]]:
    """Apply `with_needs` as far as the networks that a recipe needs are there already.

    Args:
        recipe: a recipe of any method.
        fetch: a function that gives a bundle's folder on this machine from what the recipe names.

    Returns:
        The recipe, the cards of the networks that the method calls, by the folder of their need,
        and a note for each that is missing.

    Raises:
        ConfigError: a network does not fit the recipe.
    """
    networks: dict[str, BundleCard] = {}
    notes: list[str] = []
    any_there = False
    for need in needs_of(recipe):
        place = need.place(recipe)
        if not place:
            if need.called:
                notes.append(f"method.{need.key} names no {need.noun}, so that none is counted")
            continue
        if need.wanted_digest(recipe) and not need.called:
            continue  # the recipe is complete
        try:
            folder = fetch(place)
        except BundleError as error:
            if not (need.called or isinstance(error, MissingBundleError)):
                raise
            ending = "so that none is counted" if need.called else "so that nothing follows from it"
            notes.append(f"there is no {need.noun} at {place} yet, {ending}")
            continue
        any_there = True
        if need.called:
            networks[need.folder] = read_card(folder)
    complete = _filled(recipe, fetch) if any_there and not notes else recipe
    return complete, networks, notes


def keep_needs(recipe: Recipe, run: RunDir, fetch: Fetch = fetch_bundle) -> None:
    """Copy the bundles that a recipe needs into its run, where every worker finds them.

    Args:
        recipe: a recipe of any method, with the digests of its bundles.
        run: the run's directory.
        fetch: a function that gives a bundle's folder on this machine from what the recipe names.

    Raises:
        BundleError: a bundle is missing.
        StorageError: the directory cannot be written.
    """
    for need in needs_of(recipe):
        if not need.place(recipe):
            continue
        folder, place = _fetched(need, recipe, fetch, run), run / need.folder
        place.create()
        if place.local is not None and place.local.samefile(folder):
            continue
        names = need.files(recipe, read_card(folder))
        for name in (*names, CARD):  # the card last, since it makes a folder a bundle
            place.upload(folder / name, name)


def check_outside(recipe: Recipe, run: RunDir) -> None:
    """Refuse to delete a run's directory that holds a bundle its recipe needs.

    Raises:
        RunConflictError: a bundle lies in the directory.
    """
    for need in needs_of(recipe):
        if need.place(recipe) and run.holds(_directory(need.place(recipe))):
            raise RunConflictError(
                f"--fresh would delete {run} and method.{need.key} with it",
                hint=f"choose another --name, or copy the {need.key} first",
            )


def _directory(place: str) -> RunDir:
    """The directory of a bundle, or of a checkpoint of another library."""
    return RunDir(place) if "://" in place else RunDir(str(Path(place).expanduser()))


def kept_needs(recipe: Recipe, run: RunDir) -> dict[str, Path]:
    """Folders, on this machine, of a run's copies of the networks to export, by name."""
    return {
        need.folder: fetch_bundle((run / need.folder).uri)
        for need in needs_of(recipe)
        if need.exported and run.exists(f"{need.folder}/{CARD}")
    }


def inherited_license(recipe: Recipe, run: RunDir) -> str:
    """The licences of all bundles that a run keeps and learns from, joined by ` and `."""
    found = (
        read_card(fetch_bundle((run / need.folder).uri)).license
        for need in needs_of(recipe)
        if run.exists(f"{need.folder}/{CARD}")
    )
    return " and ".join(dict.fromkeys(license for license in found if license))


def load_needs(method: Method, run: RunDir) -> None:
    """Load the bundles that a method needs from its run.

    Args:
        method: the method, freshly built.
        run: the run's directory.

    Raises:
        BundleError: a bundle is missing or damaged, or not the one of the plan.
    """
    for need in needs_of(method.recipe):
        if need.place(method.recipe):
            folder = fetch_bundle((run / need.folder).uri)
            need.verify(folder, method.recipe)
            need.supply(method, folder)


def supply(method: Method, name: str, folder: Path) -> None:
    """Load one of the bundles that a method needs.

    Args:
        method: the method, whose `needs` name the bundle.
        name: the `folder` of the need.
        folder: the folder of the bundle.

    Raises:
        BundleError: the bundle is damaged, or not the one of the plan.
    """
    (need,) = (need for need in method.needs() if need.folder == name)
    need.verify(folder, method.recipe)
    need.supply(method, folder)
