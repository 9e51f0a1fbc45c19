"""Names, versions and aliases of bundles, in MLflow's model registry.

A version carries its bundle as artifacts of an MLflow run, so that it outlives the run's own
directory. `mae-photos` means the newest version, `mae-photos@v2` the second, and
`mae-photos@champion` whichever version carries that alias.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from mimray.trainers.bundles import (
    BundleCard,
    FrozenEncoder,
    bundle_place,
    fetch_bundle,
    folder_sha256,
    read_card,
)
from mimray.trainers.bundles import load_bundle as load_bundle_at
from mimray.trainers.data.cache import user_cache
from mimray.trainers.data.files import parent
from mimray.trainers.errors import BundleError, ConfigError, StorageError
from mimray.trainers.storage import RunDir
from mimray.trainers.tracking import Tracker, check_reachable, client_of, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

STORAGE = "runs"
ARTIFACT, HEADS = "bundle", "heads"
_PREFIX = "mimray."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REFERENCE = re.compile(rf"({_NAME.pattern})(?:@({_NAME.pattern}))?")
_NUMBERED = re.compile(r"v([1-9][0-9]*)")


@dataclass(frozen=True)
class Version:
    """One registered bundle.

    Attributes:
        name: the model's name.
        number: the version's number, from 1.
        aliases: the aliases that point at the version.
        run_id: the id of the MLflow run that holds the artifacts.
        facts: method, step, plan hash, data fingerprint, weights' digest and lineage, by name.
        scores: the scores by task, as on the bundle's card.
        heads: places of the heads that are registered with it, among the run's artifacts, by name.
        created_ms: milliseconds since 1970 at registration.
    """

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str
    facts: dict[str, str]
    scores: dict[str, Any]
    created_ms: int
    heads: dict[str, str] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """The reference that names exactly this version."""
        return f"{self.name}@v{self.number}"


class Registry:
    """MLflow's model registry, of bundles; `Registry.open` connects.

    Attributes:
        uri: the MLflow store's URI.
    """

    def __init__(self, client: MlflowClient, uri: str, storage: str) -> None:
        self.uri = uri
        self._client = client
        self._storage = storage

    @classmethod
    def open(cls, storage: str = STORAGE) -> Registry:
        """Connect to the registry of a storage: `MLFLOW_TRACKING_URI`, or SQLite in the storage.

        Raises:
            StorageError: the store cannot be reached.
        """
        uri = tracking_uri(None, storage)
        check_reachable(uri)
        return cls(client_of(uri), uri, storage)

    def register(
        self,
        bundle: str,
        name: str,
        alias: str | None = None,
        lineage: Mapping[str, str] | None = None,
    ) -> Version:
        """Register a bundle under a name; the same weights are not registered twice.

        Args:
            bundle: the path or URI of a bundle, or of a run that has one.
            name: the model's name, of letters, digits and `._-`.
            alias: an alias to point at the version, taken from the one that had it.
            lineage: further facts about the bundle's origin, by name.

        Returns:
            The version, new or found.

        Raises:
            BundleError: there is no bundle.
            ConfigError: the name or the alias is not allowed.
            StorageError: MLflow refuses.
        """
        from mlflow.exceptions import MlflowException

        check_word(name, "--name")
        place, folder = bundle_place(bundle), fetch_bundle(bundle)
        card = read_card(folder)
        same = [v for v in self.versions(name) if v.facts["weights_sha256"] == card.weights_sha256]
        try:
            facts = lineage or {}
            number = same[-1].number if same else self._add(name, place, folder, card, facts)
        except MlflowException as error:
            raise StorageError(f"MLflow at {self.uri} does not take {name!r}: {error}") from error
        if alias is not None:
            self.alias(f"{name}@v{number}", alias)
        return self.find(f"{name}@v{number}")

    def alias(self, reference: str, alias: str) -> Version:
        """Point an alias at a version, whatever it pointed at before.

        Raises:
            ConfigError: the alias is not allowed.
            BundleError: there is no such version.
        """
        check_word(alias, "--alias")
        if _NUMBERED.fullmatch(alias) or alias == "latest":
            raise ConfigError(f"--alias {alias!r} names a version already", hint="another word")
        found = self.find(reference)
        self._client.set_registered_model_alias(found.name, alias, str(found.number))
        return self.find(found.reference)

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, by name and number; those of one name where it is given."""
        condition = None if name is None else f"name = '{name}'"
        aliases: dict[tuple[str, int], list[str]] = {}
        for model in self._client.search_registered_models(condition):
            for alias, number in model.aliases.items():
                aliases.setdefault((model.name, int(number)), []).append(alias)
        found = [
            _version(entry, tuple(sorted(aliases.get((entry.name, int(entry.version)), ()))))
            for entry in self._client.search_model_versions(condition)
            if f"{_PREFIX}weights_sha256" in entry.tags  # the store may hold other models too
        ]
        return sorted(found, key=lambda v: (v.name, v.number))

    def find(self, reference: str) -> Version:
        """The version that `NAME`, `NAME@vN` or `NAME@ALIAS` names.

        Raises:
            BundleError: there is no such version; the message lists those there are.
        """
        match = _REFERENCE.fullmatch(reference)
        known = self.versions(match[1]) if match else []
        if not match or not known:
            names = sorted({v.name for v in self.versions()})
            raise BundleError(
                f"no model {reference!r} in the registry at {self.uri}",
                hint=f"there are {', '.join(names)}" if names else "it is empty",
            )
        wanted = match[2]
        if wanted is None or wanted == "latest":
            return known[-1]
        for version in known:
            if wanted == f"v{version.number}" or wanted in version.aliases:
                return version
        there = [word for v in known for word in (f"v{v.number}", *v.aliases)]
        raise BundleError(
            f"{match[1]} has no version {wanted!r}", hint=f"there are {', '.join(there)}"
        )

    def fetch(self, version: Version) -> Path:
        """The version's bundle as a folder on this machine, copied once from a remote store.

        Raises:
            StorageError: the artifacts are gone or cannot be read.
        """
        return self._artifacts(version, ARTIFACT)

    def heads(self, version: Version) -> dict[str, Path]:
        """The heads that are registered with a version, as folders on this machine, by name.

        Raises:
            StorageError: the artifacts are gone or cannot be read.
        """
        return {name: self._artifacts(version, place) for name, place in version.heads.items()}

    def add_head(self, version: Version, name: str, folder: Path) -> Version:
        """Register a trained head with the version that it was trained on.

        Args:
            version: the encoder's version.
            name: the head's name, of letters, digits and `._-`; one of that name is replaced.
            folder: folder of the head's files.

        Returns:
            The version as it is now.

        Raises:
            ConfigError: the name is not allowed.
            StorageError: MLflow refuses.
        """
        from mlflow.exceptions import MlflowException

        check_word(name, "--name")
        # Another place for other content, so that no copy of an earlier one is taken for it.
        place = f"{HEADS}/{name}-{folder_sha256(folder)[:16]}"
        heads = json.dumps({**version.heads, name: place})
        try:
            self._client.log_artifacts(version.run_id, str(folder), place)
            self._client.set_model_version_tag(
                version.name, str(version.number), f"{_PREFIX}heads", heads
            )
        except MlflowException as error:
            raise StorageError(f"MLflow at {self.uri} does not take {name!r}: {error}") from error
        return self.find(version.reference)

    def _artifacts(self, version: Version, place: str) -> Path:
        """A folder of a version's artifacts on this machine, copied once from a remote store."""
        from mlflow.exceptions import MlflowException

        root = urlsplit(self._client.get_run(version.run_id).info.artifact_uri)
        if root.scheme in ("", "file"):
            folder = Path(unquote(root.path)) / place
        else:
            kept = user_cache("registry") / version.run_id
            folder = kept / place
            if not folder.is_dir():
                aside = kept.with_name(f".{version.run_id}.{os.getpid()}")
                aside.mkdir(parents=True)
                try:
                    self._client.download_artifacts(version.run_id, place, str(aside))
                except (MlflowException, OSError) as error:
                    raise StorageError(f"{version.reference} cannot be read: {error}") from error
                folder.parent.mkdir(parents=True, exist_ok=True)
                (aside / place).rename(folder)
                shutil.rmtree(aside, ignore_errors=True)
        if not folder.is_dir():
            raise StorageError(
                f"the files of {version.reference} are gone from {folder}", hint="register it again"
            )
        return folder

    def add_score(self, version: Version, task: str, score: Mapping[str, Any]) -> None:
        """Write a task's score onto a version, in place of an earlier one."""
        scores = json.dumps({**version.scores, task: dict(score)})
        number = str(version.number)
        self._client.set_model_version_tag(version.name, number, f"{_PREFIX}scores", scores)

    def _add(
        self,
        name: str,
        place: RunDir,
        folder: Path,
        card: BundleCard,
        lineage: Mapping[str, str],
    ) -> int:
        """Upload a bundle and make a version of it; gives the version's number."""
        from mlflow.exceptions import RestException

        facts = {
            "method": card.method,
            "step": str(card.step),
            "samples": str(card.samples),
            "plan_hash": card.plan_hash,
            "data_fingerprint": card.data_fingerprint,
            "weights_sha256": card.weights_sha256,
            "bundle": place.uri,
            "created_by": card.created_by,
            "source": card.source,
            **lineage,
        }
        tracker = Tracker.open(
            None,
            experiment="mimray models",
            run_name=f"{name}: {card.name}",
            storage=self._storage,
            params=card.recipe,
            tags={"mimray.run_dir": parent(place.uri), "mimray.weights": card.weights_sha256},
            resume=False,
        )
        self._client.log_artifacts(tracker.run_id, str(folder), ARTIFACT)
        tracker.finish()
        if not any(m.name == name for m in self._client.search_registered_models()):
            try:
                self._client.create_registered_model(name)
            except RestException as error:  # made by another process meanwhile
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        source = f"runs:/{tracker.run_id}/{ARTIFACT}"
        tags = {f"{_PREFIX}{key}": value for key, value in facts.items()}
        tags[f"{_PREFIX}scores"] = json.dumps(card.scores)
        made = self._client.create_model_version(name, source, tracker.run_id, tags=tags)
        return int(made.version)


def locate(reference: str) -> str:
    """A bundle's path or URI, from a path, a URI or a registered name, in this order.

    Args:
        reference: the path or URI of a bundle or a run, or `NAME[@ALIAS|@vN]`.

    Raises:
        BundleError: there is neither such a path nor such a name.
    """
    if "://" in reference or Path(reference).expanduser().exists():
        return bundle_place(reference).uri
    version = registered(reference)
    if version is None:
        raise BundleError(
            f"no bundle at {reference}, and no model of that name is registered",
            hint="a run's or a bundle's folder, or a name of `mimray models list`",
        )
    return str(Registry.open().fetch(version))


def registered(reference: str) -> Version | None:
    """The version that a reference names in the default registry; None where it names no model.

    Raises:
        BundleError: the model has no such version.
    """
    if "://" in reference or not _REFERENCE.fullmatch(reference):
        return None
    if Path(reference).expanduser().exists():
        return None
    uri = tracking_uri(None, STORAGE)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).exists():
        return None  # a query would make an empty database
    registry = Registry.open()
    name = reference.partition("@")[0]
    return registry.find(reference) if registry.versions(name) else None


def load_bundle(path_or_name: str | Path, *, verify: bool = True) -> FrozenEncoder:
    """Load a frozen encoder by its place or by its registered name.

    Args:
        path_or_name: the folder of a bundle or a run, or `NAME[@ALIAS|@vN]`.
        verify: compare the weights with the card's digest.

    Returns:
        The encoder on the CPU, in evaluation mode, frozen.

    Raises:
        BundleError: there is no bundle, or it is damaged.
    """
    return load_bundle_at(fetch_bundle(locate(str(path_or_name))), verify=verify)


def _version(entry: ModelVersion, aliases: tuple[str, ...]) -> Version:
    facts = {
        key.removeprefix(_PREFIX): value
        for key, value in entry.tags.items()
        if key.startswith(_PREFIX)
    }
    scores = json.loads(facts.pop("scores", "{}"))
    heads = json.loads(facts.pop("heads", "{}"))
    return Version(
        name=entry.name,
        number=int(entry.version),
        aliases=aliases,
        run_id=entry.run_id,
        facts=facts,
        scores=scores,
        created_ms=int(entry.creation_timestamp),
        heads=heads,
    )


def check_word(word: str, option: str) -> None:
    """Refuse a model's name or an alias that is not allowed.

    Args:
        word: the name as given.
        option: the option of the command line that gave it.

    Raises:
        ConfigError: it has other letters, or is too long.
    """
    if not _NAME.fullmatch(word):
        raise ConfigError(
            f"{option} {word!r} is not allowed", hint="letters, digits and . _ - only, 128 at most"
        )
