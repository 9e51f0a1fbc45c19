"""Names, versions and aliases of bundles, in MLflow's model registry.

A version carries its bundle as artifacts of an MLflow run, so that it outlives the run's own
directory. `mae-photos` means the newest version, `mae-photos@v2` the second, and
`mae-photos@champion` whichever version carries that alias.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from mimray.trainers.bundles import BundleCard, FrozenEncoder, bundle_place, fetch_bundle, read_card
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
ARTIFACT = "bundle"
_PREFIX = "mimray."
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_REFERENCE = re.compile(rf"({_NAME.pattern})(?:@({_NAME.pattern}))?")
_NUMBERED = re.compile(r"v([1-9][0-9]*)")


@dataclass(frozen=True)
class Version:
    """One registered bundle.

    Attributes:
        name: of the model.
        number: of the version, from 1.
        aliases: that point here.
        run_id: MLflow run that holds its artifacts.
        facts: method, step, plan hash, data fingerprint, digest of the weights, where it came from.
        scores: by task, as on the bundle's card.
        created_ms: when, since 1970.
    """

    name: str
    number: int
    aliases: tuple[str, ...]
    run_id: str
    facts: dict[str, str]
    scores: dict[str, Any]
    created_ms: int

    @property
    def reference(self) -> str:
        """What names exactly this one."""
        return f"{self.name}@v{self.number}"


class Registry:
    """Bundles by name; `Registry.open` connects.

    Attributes:
        uri: of the MLflow store.
    """

    def __init__(self, client: MlflowClient, uri: str, storage: str) -> None:
        self.uri = uri
        self._client = client
        self._storage = storage

    @classmethod
    def open(cls, storage: str = STORAGE) -> Registry:
        """The registry that runs in a storage use: `MLFLOW_TRACKING_URI`, or SQLite there.

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
        """Put a bundle under a name; the same weights are not registered twice.

        Args:
            bundle: path or URI of a bundle or of a run that has one.
            name: letters, digits and `._-`.
            alias: to point at it, taken from whichever version had it.
            lineage: further facts about where it comes from, by name.

        Returns:
            The version, new or found.

        Raises:
            BundleError: there is no bundle.
            ConfigError: a name or alias that is not allowed.
            StorageError: MLflow refuses.
        """
        from mlflow.exceptions import MlflowException

        _check(name, "--name")
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
            ConfigError: an alias that is not allowed.
            BundleError: there is no such version.
        """
        _check(alias, "--alias")
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
            if f"{_PREFIX}weights_sha256" in entry.tags  # others' models may live here too
        ]
        return sorted(found, key=lambda v: (v.name, v.number))

    def find(self, reference: str) -> Version:
        """The version that `NAME`, `NAME@vN` or `NAME@ALIAS` means.

        Raises:
            BundleError: there is none; the message says what there is.
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
        """The version's bundle as a folder on this machine, copied once where it is elsewhere.

        Raises:
            StorageError: its artifacts are gone or cannot be read.
        """
        from mlflow.exceptions import MlflowException

        place = urlsplit(self._client.get_run(version.run_id).info.artifact_uri)
        if place.scheme in ("", "file"):
            folder = Path(unquote(place.path)) / ARTIFACT
        else:
            kept = user_cache("registry") / version.run_id
            folder = kept / ARTIFACT
            if not folder.is_dir():
                aside = kept.with_name(f".{version.run_id}.{os.getpid()}")
                aside.mkdir(parents=True)
                try:
                    self._client.download_artifacts(version.run_id, ARTIFACT, str(aside))
                except (MlflowException, OSError) as error:
                    raise StorageError(f"{version.reference} cannot be read: {error}") from error
                aside.rename(kept)
        if not folder.is_dir():
            raise StorageError(
                f"the files of {version.reference} are gone from {folder}", hint="register it again"
            )
        return folder

    def add_score(self, version: Version, task: str, score: Mapping[str, Any]) -> None:
        """Put a task's headline beside a version, in place of an earlier one."""
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
        """Upload a bundle and make a version of it; gives its number."""
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
            except RestException as error:  # somebody else has, a moment ago
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        source = f"runs:/{tracker.run_id}/{ARTIFACT}"
        tags = {f"{_PREFIX}{key}": value for key, value in facts.items()}
        tags[f"{_PREFIX}scores"] = json.dumps(card.scores)
        made = self._client.create_model_version(name, source, tracker.run_id, tags=tags)
        return int(made.version)


def locate(reference: str) -> str:
    """A bundle's path or URI, from one or from a registered name; what is on disk comes first.

    Args:
        reference: path or URI of a bundle or a run, or `NAME[@ALIAS|@vN]`.

    Raises:
        BundleError: neither is there.
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
    """The version a reference names in the default registry; None where it can be none.

    Raises:
        BundleError: a model of that name is there, but not such a version.
    """
    if "://" in reference or not _REFERENCE.fullmatch(reference):
        return None
    if Path(reference).expanduser().exists():
        return None
    uri = tracking_uri(None, STORAGE)
    file = uri.removeprefix("sqlite:///")
    if file != uri and not Path(file).exists():
        return None  # asking would make an empty database
    registry = Registry.open()
    name = reference.partition("@")[0]
    return registry.find(reference) if registry.versions(name) else None


def load_bundle(path_or_name: str | Path, *, verify: bool = True) -> FrozenEncoder:
    """Load a frozen encoder by its place or by its registered name.

    Args:
        path_or_name: folder of a bundle or a run, or `NAME[@ALIAS|@vN]`.
        verify: hold the weights against the card's digest.

    Returns:
        The encoder on the CPU, in evaluation mode, frozen.

    Raises:
        BundleError: there is none, or it is damaged.
    """
    return load_bundle_at(fetch_bundle(locate(str(path_or_name))), verify=verify)


def _version(entry: ModelVersion, aliases: tuple[str, ...]) -> Version:
    facts = {
        key.removeprefix(_PREFIX): value
        for key, value in entry.tags.items()
        if key.startswith(_PREFIX)
    }
    scores = json.loads(facts.pop("scores", "{}"))
    return Version(
        name=entry.name,
        number=int(entry.version),
        aliases=aliases,
        run_id=entry.run_id,
        facts=facts,
        scores=scores,
        created_ms=int(entry.creation_timestamp),
    )


def _check(word: str, option: str) -> None:
    if not _NAME.fullmatch(word):
        raise ConfigError(
            f"{option} {word!r} is not allowed", hint="letters, digits and . _ - only, 128 at most"
        )
