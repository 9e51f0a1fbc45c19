"""`mimray serve`: frozen encoders behind HTTP."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mimray.service.terminal.console import say, warn
from mimray.trainers.errors import ServingError

if TYPE_CHECKING:
    from mimray.serving.config import ServeConfig
    from mimray.serving.deploy.serve_schema import Version


CANARY_ALIAS = "canary"
_MODEL_KEYS = ("replicas", "max_batch_size", "device")


def resolve(reference: str) -> Version:
    """Fetch the bundle that a reference names now, with the number of its version.

    Raises:
        BundleError: there is no such bundle.
    """
    from mimray.serving.deploy.serve_schema import Version
    from mimray.trainers.bundles import fetch_bundle, read_card
    from mimray.trainers.registry import Registry, locate, registered

    version = registered(reference)
    heads = {} if version is None or not version.heads else Registry.open().heads(version)
    place = locate(reference)
    folder = fetch_bundle(place).resolve()
    card = read_card(folder)
    if card.for_research_only:
        warn(f"{reference} is under the licence {card.license}, which forbids a commercial service")
    number = "1" if version is None else str(version.number)
    return Version(
        reference,
        folder,
        number,
        uri=place if "://" in place else "",
        heads=tuple((name, str(head.resolve())) for name, head in heads.items()),
    )


def serve_config(
    bundles: Sequence[str],
    file: Path | None,
    canary: str | None,
    options: Mapping[str, Any],
    heads: Sequence[str] = (),
) -> ServeConfig:
    """The endpoint that a command line asks for, checked.

    Args:
        bundles: models as `NAME=BUNDLE`, or as `BUNDLE`, named after its card or registration.
        file: a `serve.yaml` that the models are added to.
        canary: the share of requests for the version with the alias `canary` of every model here.
        options: keys of the endpoint and of every model in `bundles`; None leaves one unset.
        heads: trained heads, as `[MODEL:]NAME=FOLDER`.

    Raises:
        ServingError: two models of one name, a canary without a registered model, or a head of no
            model.
        ConfigError: keys or values that are not allowed.
        BundleError: a bundle that is not one.
    """
    from mimray.serving.config import check_config, load_config

    tree: dict[str, Any] = load_config(file) if file is not None else {}
    said = {key: value for key, value in options.items() if value is not None}
    settings = {key: said.pop(key) for key in _MODEL_KEYS if key in said}
    tree |= said
    models = dict(tree.get("models") or {})
    for item in bundles:
        name, reference = _named(item)
        if name in models:
            raise ServingError(
                f"two models are named {name!r}", hint="NAME=BUNDLE names them apart"
            )
        models[name] = {"bundle": reference, **settings}
        if canary is not None:
            base, at, _ = reference.partition("@")
            if not at:
                raise ServingError(
                    f"--canary needs registered models with an alias, and {reference} is none",
                    hint=f"such as {base}@champion",
                )
            models[name]["canary"] = {"bundle": f"{base}@{CANARY_ALIAS}", "share": canary}
    if not models:
        raise ServingError("there is nothing to serve", hint="name a bundle, or give --config")
    for item in heads:
        model, name, place = _head(item, list(models))
        mine = dict(models[model])
        models[model] = mine | {"heads": {**(mine.get("heads") or {}), name: place}}
    tree["models"] = models
    return check_config(tree, str(file) if file is not None else "serve")


def run_serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM, following aliases."""
    from mimray.serving.deploy.endpoint import start

    logging.getLogger("ray").setLevel(logging.ERROR)
    say("starting…")
    with start(config, resolve) as endpoint:
        for name, version in endpoint.versions.items():
            say(f"serving {name}, version {version}")
        for name, reason in endpoint.without_canary.items():
            warn(f"{name} has no canary, so every request goes to one version: {reason}")
        say(f"  page     {endpoint.url}/")
        say(f"  features POST {endpoint.url}/v1/features")
        for name, heads in endpoint.heads.items():
            if heads:
                say(f"  answers  POST {endpoint.url}/v1/predict?model={name}  {', '.join(heads)}")
        say(f"  OIP v2   POST {endpoint.url}/v2/models/NAME/infer")
        say("Ctrl-C ends it")
        endpoint.wait(say)
    say("stopped")


def write_build(config: ServeConfig, out: Path | None) -> str:
    """The YAML that `serve deploy` takes, written to `out` too where that is given."""
    from mimray.serving.deploy.rollout import check_version
    from mimray.serving.deploy.serve_schema import ReplicaResources, Served, serve_schema
    from mimray.trainers.environment.network import is_loopback
    from mimray.trainers.errors import MimrayError

    models, resources = [], {}
    for name, model in config.models.items():
        stable, canary = resolve(model.bundle), None
        if model.canary is not None:
            try:
                canary = resolve(model.canary.bundle)
            except MimrayError as error:
                warn(f"no canary of {name}: {error}")
        if canary is not None and canary.number == stable.number:
            warn(f"no canary of {name}: it is version {stable.number} as well")
            canary = None
        for version in filter(None, (stable, canary)):
            check_version(model, version)
        models.append(Served(name, model, stable, canary))
        cpus = model.num_cpus or 1.0
        resources[name] = ReplicaResources(cpus, model.num_gpus or 0.0, max(1, int(cpus)))
    tree = serve_schema(
        config, models, resources, key_sha256=None, needs_key=not is_loopback(config.host)
    )
    text = yaml.safe_dump(tree, sort_keys=False)
    if out is not None:
        out.write_text(text, encoding="utf-8")
    return text


def _head(item: str, models: Sequence[str]) -> tuple[str, str, str]:
    """Split `[MODEL:]NAME=FOLDER`; the model may be left out where there is one."""
    left, equals, place = item.partition("=")
    model, colon, name = left.rpartition(":")
    if not (equals and name and place):
        raise ServingError(f"--head {item!r} is not [MODEL:]NAME=FOLDER")
    if not colon:
        if len(models) > 1:
            raise ServingError(
                f"--head {item!r} does not say whose it is",
                hint=f"{models[0]}:{item}; there are {', '.join(models)}",
            )
        model = models[0]
    if model not in models:
        raise ServingError(f"--head {item!r}: there is no model {model!r}", hint=", ".join(models))
    return model, name, place


def _named(item: str) -> tuple[str, str]:
    """Split one argument into the name in the URL and the reference of the bundle."""
    from mimray.trainers.bundles import fetch_bundle, read_card
    from mimray.trainers.registry import locate, registered

    name, equals, reference = item.partition("=")
    if equals and "/" not in name:  # `=` also stands in paths and in the options of a URI
        return name, reference
    if registered(item):  # served under its own name, whatever version it is
        return item.partition("@")[0], item
    return read_card(fetch_bundle(locate(item))).name, item
