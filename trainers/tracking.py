"""Runs, metrics and pictures in MLflow.

`metrics.jsonl` in the run's directory is the record, and MLflow a view of it. A tracking server
that cannot be reached when a run opens is an error. One that stops answering later is a warning:
points wait, and follow when it answers again.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from mimray.trainers.errors import StorageError
from mimray.trainers.redaction import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run
    from PIL.Image import Image

    from mimray.trainers.config.run import Plan
    from mimray.trainers.storage import RunDir

RUN_DIR_TAG = "mimray.run_dir"

# MLflow's limits; that of tags is the one of servers before 2.21.
_KEY_CHARS = 250
_PARAM_CHARS = 6000
_TAG_CHARS = 5000
_PARAMS_A_CALL = 100
_METRICS_A_CALL = 1000

# What MLflow keeps runs in, by the scheme of its URI.
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")

_REACH_TIMEOUT_S = 10.0
_RETRY_AFTER_S = 60.0

logger = logging.getLogger(__name__)


class Tracker:
    """One MLflow run being written; `Tracker.open` makes it.

    Attributes:
        uri: the tracking URI in use, for `mlflow ui --backend-store-uri`.
        run_id: MLflow's id of the run.
    """

    def __init__(
        self, client: MlflowClient, uri: str, run_id: str, logged_up_to: Mapping[str, int]
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = client
        self._logged_up_to = logged_up_to
        self._waiting: list[Metric] = []
        self._next_try_s = 0.0

    @classmethod
    def open(
        cls,
        uri: str | None,
        *,
        experiment: str,
        run_name: str,
        storage: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        resume: bool = True,
    ) -> Tracker:
        """Open the MLflow run of a training, going on with the one it already has.

        Args:
            uri: the tracking URI; None takes `MLFLOW_TRACKING_URI`, and without that SQLite in
                `storage` (see `tracking_uri`).
            experiment: the MLflow experiment's name, made when missing.
            run_name: the run's name.
            storage: the directory or URI of all runs.
            params: nested values, flattened to `a.b.c`. On resuming, those already there stay.
            tags: further tags; `mimray.run_dir` is `<storage>/<run_name>` unless given.
            resume: go on with the run of this name and `mimray.run_dir`, if there is one. Steps
                that it holds already are not written twice, so say False when a training starts
                over.

        Raises:
            StorageError: the store cannot be reached or refuses.
        """
        from mlflow.exceptions import MlflowException

        where = tracking_uri(uri, storage)
        tags = {RUN_DIR_TAG: f"{storage.rstrip('/')}/{run_name}", **tags}
        check_reachable(where)
        try:
            with _creation_lock(where):
                client = client_of(where)
                artifacts = _artifact_root(where, storage)
                experiment_id = _experiment_id(client, experiment, artifacts)
                run = _find_run(client, experiment_id, run_name, tags) if resume else None
                logged_up_to = _last_steps(client, run) if run else {}
                if run is None:
                    run = client.create_run(experiment_id, run_name=run_name)
                else:
                    client.update_run(run.info.run_id, status="RUNNING")
                _describe(client, run, flatten(params), tags)
        except MlflowException as error:
            raise StorageError(
                f"MLflow at {where} refuses the run {run_name!r}: {error}",
                hint="set MLFLOW_TRACKING_URI to a store that works, or unset it for SQLite",
            ) from error
        if logged_up_to:
            last = max(logged_up_to.values())
            logger.info("MLflow run %s goes on after step %d", run.info.run_id, last)
        return cls(client, where, run.info.run_id, logged_up_to)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write scalars of one step.

        Args:
            step: the step of the values.
            metrics: values by name.
        """
        self.rows([{"step": step, "time": time.time(), **metrics}])

    def rows(self, rows: Iterable[Mapping[str, float]]) -> int:
        """Write scalars of several steps, at the time that each was made.

        Args:
            rows: values by name, with `step`, and `time` in seconds since 1970.

        Returns:
            Number of values that MLflow did not have.
        """
        from mlflow.entities import Metric

        new = [
            Metric(key, float(value), int(row["time"] * 1000), int(row["step"]))
            for row in rows
            for key, value in row.items()
            if key not in ("step", "time") and row["step"] > self._logged_up_to.get(key, -1)
        ]
        self._waiting += new
        if time.monotonic() >= self._next_try_s:
            self._send()
        return len(new)

    def score(self, step: int, figures: Mapping[str, float]) -> None:
        """Write figures measured after training, each time they are measured.

        Args:
            step: the updates after which the encoder was measured.
            figures: values by name.
        """
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._waiting += [Metric(k, float(v), now_ms, step) for k, v in figures.items()]
        self._send()

    def picture(self, name: str, image: Image | bytes, step: int) -> None:
        """Write a picture; MLflow shows those of one name as a series over steps.

        Args:
            name: the series' name, of letters, digits and `_-./ `.
            image: a picture, or the bytes of a PNG.
            step: the step of the picture.
        """
        from mlflow.exceptions import MlflowException
        from PIL import Image as PillowImage

        if time.monotonic() < self._next_try_s:
            logger.warning("MLflow does not answer: no picture %r at step %d", name, step)
            return
        if isinstance(image, bytes):
            image = PillowImage.open(io.BytesIO(image))
        try:
            self._client.log_image(self.run_id, image, key=name, step=step, synchronous=True)
        except (MlflowException, OSError) as error:
            self._next_try_s = time.monotonic() + _RETRY_AFTER_S
            logger.warning("MLflow took no picture %r at step %d: %s", name, step, error)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        """Close the run.

        Args:
            status: the run's final status, in MLflow's terms.
        """
        from mlflow.exceptions import MlflowException

        self._send()
        if self._waiting:
            logger.warning("%d point(s) never reached MLflow at %s", len(self._waiting), self.uri)
        try:
            self._client.set_terminated(self.run_id, status)
        except MlflowException as error:
            logger.warning("MLflow run %s could not be closed: %s", self.run_id, error)

    def _send(self) -> None:
        """Send the points that wait; after a failure they stay, and the next attempt is put off."""
        from mlflow.exceptions import MlflowException

        try:
            while self._waiting:
                self._client.log_batch(self.run_id, metrics=self._waiting[:_METRICS_A_CALL])
                del self._waiting[:_METRICS_A_CALL]
        except MlflowException as error:
            # MLflow has retried by now; without a pause every step would wait for it.
            self._next_try_s = time.monotonic() + _RETRY_AFTER_S
            logger.warning(
                "MLflow does not answer, %d point(s) wait %.0f s: %s",
                len(self._waiting),
                _RETRY_AFTER_S,
                masked(str(error)),
            )


def track(
    run: RunDir,
    plan: Plan,
    *,
    storage: str,
    command: str,
    uri: str | None = None,
    resume: bool = True,
) -> Tracker:
    """Open the MLflow run of a training by its directory.

    Args:
        run: the run's directory, whose name is the run's.
        plan: its plan.
        storage: the directory or URI of all runs.
        command: the command line that launched it.
        uri: the tracking URI; None takes the one of `tracking_uri`.
        resume: go on with the MLflow run that it has, if any.

    Raises:
        StorageError: as `Tracker.open`.
    """
    return Tracker.open(
        uri,
        experiment="mimray",
        run_name=run.name,
        storage=storage,
        params=plan.recipe.model_dump(mode="json", exclude={"about"})
        | {"lr": plan.lr, "steps": plan.steps, "data_uri": plan.data.uri},
        tags={
            RUN_DIR_TAG: run.uri,
            "mimray.plan_hash": plan.hash,
            "mimray.data_fingerprint": plan.data.fingerprint,
            "mimray.command": command,
        },
        resume=resume,
    )


def tracking_uri(uri: str | None, storage: str) -> str:
    """Decide where runs are tracked.

    Args:
        uri: the tracking URI that the user gave, if any.
        storage: the directory or URI of all runs.

    Returns:
        `uri`, or `MLFLOW_TRACKING_URI`, or SQLite in `storage`; SQLite in `./runs` when `storage`
        is remote.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return chosen
    root = _local_root(storage)
    if root is None:
        root = Path("runs").absolute()
        logger.info(
            "no MLFLOW_TRACKING_URI and %s is remote: this run is tracked in %s on this machine; "
            "elsewhere `mimray ui --storage %s` shows it",
            storage,
            root,
            storage,
        )
    return _sqlite_in(root)


def check_reachable(uri: str) -> None:
    """Ask a server's health, or a database's tables, once; MLflow would retry for minutes.

    Args:
        uri: the tracking URI; one that is neither HTTP nor a database passes, and so does a SQLite
            file that is yet to be made.

    Raises:
        StorageError: nothing answers, or what answers is no database.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        _check_server(uri)
    elif scheme in _DATABASES:
        _check_database(uri)


def _check_server(uri: str) -> None:
    try:
        # Whose account asks is nothing to the answer, and urllib takes no account in an address.
        parts = urlsplit(uri)
        anyone = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        urlopen(f"{anyone.rstrip('/')}/health", timeout=_REACH_TIMEOUT_S).close()
    except HTTPError:
        return  # something answers; the client finds out about access
    except (URLError, OSError) as error:
        raise StorageError(
            f"no MLflow server answers at {uri}: {error}",
            hint="start it, or unset MLFLOW_TRACKING_URI to track in SQLite beside the run",
        ) from error


def _check_database(uri: str) -> None:
    import sqlalchemy
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = sqlalchemy.make_url(uri)
        if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
            return
        engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        sqlalchemy.inspect(engine).get_table_names()
    except (SQLAlchemyError, ImportError) as error:
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> StorageError:
    cause = str(getattr(error, "orig", None) or error).splitlines()[0]
    return StorageError(
        f"MLflow's database {masked(uri)} cannot be opened: {masked(cause)}",
        hint="move a damaged file or one of something else away, and `mimray ui` makes MLflow's "
        "view of runs again; start a server, and install its driver: pip install "
        "'mimray[postgresql]' has that of postgresql+psycopg://",
    )


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as MLflow's params: dotted names, strings, neither too long.

    Args:
        nested: mappings of mappings of values; sequences become JSON.
        prefix: a text put before each name.
    """
    flat: dict[str, str] = {}
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            text = json.dumps(value) if isinstance(value, list | tuple) else str(value)
            flat[key[:_KEY_CHARS]] = _cut(text, _PARAM_CHARS)
    return flat


def client_of(uri: str) -> MlflowClient:
    """MLflow's client of a store, without telemetry and with warnings alone in the log.

    Raises:
        StorageError: the store is a database in which MLflow cannot make its tables.
    """
    # MLflow reports its use to its makers by default.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Points wait here for a server that is away; MLflow's own tries would take four minutes each.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    from mlflow import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        # Dozens of lines about schema migrations would bury the progress bar.
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return MlflowClient(tracking_uri=uri)
    except SQLAlchemyError as error:
        raise _unusable(uri, error) from error


@contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Let one process at a time make the tables of a new SQLite file, since migrations race."""
    path = uri.removeprefix("sqlite:///")
    if path == uri or not path:
        yield
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        lock = Path(f"{path}.lock").open("w")  # noqa: SIM115
    except OSError as error:
        raise StorageError(
            f"cannot write MLflow's database {path}: {error.strerror}",
            hint="choose another --storage, or set MLFLOW_TRACKING_URI",
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes
        yield


def _local_root(storage: str) -> Path | None:
    """Absolute path of a local storage; None for a remote one."""
    path = storage.removeprefix("file://")
    return None if "://" in path else Path(path).expanduser().absolute()


def _sqlite_in(root: Path) -> str:
    return f"sqlite:///{root / 'mlflow.db'}"


def _artifact_root(uri: str, storage: str) -> str | None:
    """The URI of artifacts beside our own SQLite file; None for a store that has its own."""
    root = _local_root(storage) or Path("runs").absolute()
    return (root / "mlruns").as_uri() if uri == _sqlite_in(root) else None


def _experiment_id(client: MlflowClient, name: str, artifact_root: str | None) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_root))
        except MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:  # no other process has made it meanwhile
                raise
    return str(found.experiment_id)


def _find_run(
    client: MlflowClient, experiment_id: str, run_name: str, tags: Mapping[str, str]
) -> Run | None:
    """The newest run of this name and run directory."""
    conditions = (
        f"attributes.run_name = {_quoted(run_name)} "
        f"and tags.`{RUN_DIR_TAG}` = {_quoted(_cut(tags[RUN_DIR_TAG], _TAG_CHARS))}"
    )
    runs = client.search_runs(
        [experiment_id], conditions, max_results=1, order_by=["attributes.start_time DESC"]
    )
    return runs[0] if runs else None


def _last_steps(client: MlflowClient, run: Run) -> dict[str, int]:
    """The last step of every metric of a run."""
    history = client.get_metric_history
    return {
        key: max(point.step for point in history(run.info.run_id, key)) for key in run.data.metrics
    }


def _describe(
    client: MlflowClient, run: Run, params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Write tags, and the params that are not there yet, since MLflow lets none be changed."""
    from mlflow.entities import Param, RunTag

    new = [Param(key, value) for key, value in params.items() if key not in run.data.params]
    for start in range(0, len(new), _PARAMS_A_CALL):
        client.log_batch(run.info.run_id, params=new[start : start + _PARAMS_A_CALL])
    run_tags = [RunTag(key, _cut(value, _TAG_CHARS)) for key, value in tags.items()]
    client.log_batch(run.info.run_id, tags=run_tags)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _quoted(value: str) -> str:
    """A string in MLflow's filter language, which has two quotes and no escape."""
    quote = '"' if "'" in value else "'"
    return f"{quote}{value}{quote}"
