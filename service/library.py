"""The commands as functions, for scripts and notebooks: `import mimray`, then `mimray.pretrain(…)`.

Each does what the command of its name does, with the same defaults, progress and records, and
raises a `MimrayError` where the command would print one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimray.service.commands.overrides import assignments, with_init, with_workers

if TYPE_CHECKING:
    from mimray.serving.deploy.endpoint import Endpoint
    from mimray.trainers.bundles import FrozenEncoder

Settings = Mapping[str, Any]
"""Values by key of a recipe, a task or a sweep, such as `{"method.mask_ratio": 0.6}`."""
Place = str | Path


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        folder: path or URI of the run: metrics, checkpoints, pictures.
        bundle: path or URI of its frozen encoder.
        step: updates made.
        loss: loss of the last of them.
        details: all that `mimray pretrain --json` prints.
    """

    folder: str
    bundle: str
    step: int
    loss: float
    details: dict[str, Any] = field(repr=False)

    def encoder(self) -> FrozenEncoder:
        """The frozen encoder, on the CPU."""
        from mimray.trainers import load_bundle

        return load_bundle(self.bundle)

    def _repr_png_(self) -> bytes | None:
        """The reconstruction of hidden patches as PNG, which notebooks show."""
        return _picture(f"{self.folder}/reconstruction.png")


@dataclass(frozen=True)
class Evaluation:
    """The score of an encoder by a task.

    Attributes:
        encoder: the encoder as it was named.
        task: the task's name.
        metric: name of the headline.
        headline: the figure encoders are compared by; larger is better.
        standard_error: the headline's over pictures; None where it is not known.
        metrics: every figure by name.
        pictures: paths or URIs of pictures of the result.
        head: folder of the trained head, for `load_head` and `serve`; None where none is left.
        details: all that `mimray evaluate --json` prints.
    """

    encoder: str
    task: str
    metric: str
    headline: float
    standard_error: float | None
    metrics: dict[str, Any] = field(repr=False)
    pictures: list[str] = field(repr=False)
    head: str | None
    details: dict[str, Any] = field(repr=False)

    def _repr_png_(self) -> bytes | None:
        """The first picture of the result as PNG, which notebooks show."""
        return _picture(self.pictures[0]) if self.pictures else None


@dataclass(frozen=True)
class Sweep:
    """The outcome of a search.

    Attributes:
        folder: path or URI of the sweep: its trials, study and report.
        metric: name of the score.
        best: the best trial: `trial`, `score`, `params`; None where none has a score.
        trials: all trials.
        report: paths of the report by kind.
        details: all that `mimray tune --json` prints.
    """

    folder: str
    metric: str
    best: dict[str, Any] | None
    trials: list[dict[str, Any]] = field(repr=False)
    report: Any = field(repr=False)
    details: dict[str, Any] = field(repr=False)


def pretrain(
    recipe: str,
    data: Place,
    *,
    name: str | None = None,
    storage: Place = "runs",
    steps: int | None = None,
    workers: int | None = None,
    init: str | None = None,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Run:
    """Pre-train an encoder; called again, it goes on where it was, or gives what is finished.

    Args:
        recipe: a shipped recipe's name, such as `mae-tiny`, or the path of one.
        data: path or URI of the pictures.
        name: name of the run; the recipe's by default.
        storage: path or URI of all runs.
        steps: length in updates; the recipe's by default.
        workers: training workers; the recipe's by default.
        init: weights to begin with: a bundle, a run, a registered name, `timm:NAME`.
        settings: values by key of the recipe.
        fresh: delete what an earlier run of this name left.

    Raises:
        MimrayError: a mistake, before a worker starts where possible.
    """
    from mimray.service.commands.pretrain import run_pretrain

    overrides = with_init(assignments(settings or {}), init, partial=False)
    told = run_pretrain(
        recipe,
        data=str(data),
        name=name or Path(recipe).stem,
        storage=str(storage),
        steps=steps,
        overrides=with_workers(overrides, workers),
        fresh=fresh,
        command=f"mimray.pretrain({recipe!r}, {str(data)!r})",
    )
    return Run(told["run"], told["bundle"], int(told["step"]), float(told["loss"]), told)


def evaluate(
    bundle: Place,
    task: str,
    data: Place,
    *,
    val: Place | None = None,
    label: str | None = None,
    limit: int | None = None,
    epochs: int | None = None,
    seed: int = 0,
    settings: Settings | None = None,
    val_share: float | None = None,
    val_seed: int = 0,
    finetune: bool = False,
    through: str | None = None,
    skip_invalid: bool = False,
    out: Place | None = None,
) -> Evaluation:
    """Score an encoder by a task.

    Args:
        bundle: a bundle, a run, a registered name, `untrained:…`; with `through`, the name of a
            model.
        task: `knn`, `linear`, `finetune`, `rankme`, `segmentation`, `dense-knn` or `detection`.
        data: path or URI of the pictures to learn from.
        val: path or URI of those to score on; by default the data's own split, or a part held out.
        label: column of the labels.
        limit: so many pictures of each only.
        epochs: length of what is trained; the task's own by default.
        seed: seed of everything drawn.
        settings: values by option of the task.
        val_share: share of each class held out, where the data has no split; 0.2 by default.
        val_seed: seed of what is held out.
        finetune: train the encoder with the head, in tasks on maps.
        through: an endpoint's address, for tasks on maps.
        skip_invalid: leave out pictures with wrong labels, and list them.
        out: path or URI of the results; beside the bundle by default.

    Raises:
        MimrayError: a mistake, before anything heavy starts where possible.
    """
    from mimray.service.commands.evaluate import EvaluationRequest, run_evaluate
    from mimray.trainers.storage import RunDir

    request = EvaluationRequest(
        task=task,
        data=str(data),
        val=None if val is None else str(val),
        label=label,
        limit=limit,
        epochs=epochs,
        seed=seed,
        overrides=assignments(settings or {}),
        val_share=val_share,
        val_seed=val_seed,
        finetune=finetune,
        through=through,
        skip_invalid=skip_invalid,
        out=None if out is None else str(out),
        command=f"mimray.evaluate({str(bundle)!r}, {task!r}, {str(data)!r})",
    )
    (told,) = run_evaluate([str(bundle)], request)
    folder = RunDir(told["folder"]) / task
    return Evaluation(
        encoder=told["encoder"],
        task=task,
        metric=told["metric"],
        headline=told["headline"],
        standard_error=told["standard_error"],
        metrics=told["metrics"],
        pictures=told["pictures"],
        head=folder.uri if folder.exists("head.json") else None,
        details=told,
    )


def extract(
    bundle: Place,
    data: Place,
    out: Place,
    *,
    pooled: Sequence[str] = (),
    layers: Sequence[int] = (),
    tokens: bool = False,
    split: str | None = None,
    label: str | None = None,
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Write an encoder's features of pictures as Parquet; called again, it does what is missing.

    Args:
        bundle: a bundle, a run, a registered name, `untrained:…`.
        data: path or URI of the pictures, labelled or not.
        out: path or URI of the folder of the features.
        pooled: `mean`, `cls`; `mean` where nothing else is asked for.
        layers: layers whose maps are kept, negative from the end.
        tokens: keep the patch tokens.
        split: split of the data, where there are several.
        label: column of the labels.
        settings: further options by name, such as `{"dtype": "float16"}`.

    Returns:
        What `mimray extract --json` prints.

    Raises:
        MimrayError: a mistake, before anything is computed.
    """
    from pydantic import ValidationError

    from mimray.service.commands.extract import check_spec, run_extract
    from mimray.trainers.config.explain import explain

    asked = {"pooled": tuple(pooled), "layers": tuple(layers), "tokens": tokens, **(settings or {})}
    try:
        spec = check_spec(asked)
    except ValidationError as error:
        raise explain(error, asked, "extract", keys=(*asked,), hint="see `mimray extract --help`"
                      ) from None  # fmt: skip
    return run_extract(str(bundle), str(data), str(out), spec, split=split, label=label)


def tune(
    sweep: str,
    data: Place,
    *,
    name: str | None = None,
    storage: Place = "runs",
    concurrent: int | None = None,
    settings: Settings | None = None,
    fresh: bool = False,
) -> Sweep:
    """Search recipes, ranked by what the frozen encoder is worth; called again, it goes on.

    Args:
        sweep: a shipped sweep's name, such as `mae-mask-depth`, or the path of one.
        data: path or URI of the pictures to train on.
        name: name of the sweep; the file's by default.
        storage: path or URI of all runs and sweeps.
        concurrent: trials at once; as many as fit by default.
        settings: values by key of the sweep, such as `{"budget.steps": 400}`.
        fresh: delete what an earlier sweep of this name left.

    Raises:
        MimrayError: a mistake, before a worker starts.
    """
    from mimray.service.commands.tune import TuneRequest, run_tune

    told = run_tune(
        TuneRequest(
            sweep=sweep,
            data=str(data),
            name=name,
            storage=str(storage),
            overrides=assignments(settings or {}),
            concurrent=concurrent,
            resume=None,
            fresh=fresh,
            command=f"mimray.tune({sweep!r}, {str(data)!r})",
        )
    )
    return Sweep(told["sweep"], told["metric"], told["best"], told["trials"], told["report"], told)


def serve(
    models: Mapping[str, Place],
    *,
    heads: Mapping[str, Mapping[str, Place]] | None = None,
    config: Place | None = None,
    host: str | None = None,
    port: int | None = None,
    keys: Place | None = None,
    **options: Any,
) -> Endpoint:
    """Serve frozen encoders over HTTP until the endpoint is closed; a context manager.

    Args:
        models: bundles, runs or registered names, by the models' names in the URL.
        heads: trained heads of each model: folders by the heads' names.
        config: path of a serve.yaml that the models are added to.
        host: address to listen on; 127.0.0.1 by default, and others need keys.
        port: port to listen on; 8000 by default.
        keys: path of a file of `mimray keys`.
        options: options of every model here: `replicas`, `max_batch_size`, `device`.

    Returns:
        The endpoint, ready to answer; `url` is its address, `follow()` looks aliases up.

    Raises:
        MimrayError: a mistake, or it did not start.
    """
    from mimray.service.commands.serve import resolve, serve_config
    from mimray.serving.deploy.endpoint import start

    asked = {"host": host, "port": port, "keys": None if keys is None else str(keys), **options}
    made = serve_config(
        [f"{name}={place}" for name, place in models.items()],
        None if config is None else Path(config),
        None,
        asked,
        [
            f"{model}:{name}={place}"
            for model, named in (heads or {}).items()
            for name, place in named.items()
        ],
    )
    return start(made, resolve)


def _picture(place: str) -> bytes | None:
    """A picture's bytes; None where it is not there."""
    from mimray.trainers.data.files import parent
    from mimray.trainers.storage import RunDir

    folder, name = RunDir(parent(place)), place.rpartition("/")[2]
    return folder.read(name) if folder.exists(name) else None
