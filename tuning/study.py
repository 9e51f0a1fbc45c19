"""A sweep's study in Optuna's database, which may restart while the sweep goes on."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mimray.trainers.errors import RunConflictError, StorageError
from mimray.trainers.redaction import masked
from mimray.tuning.config import SweepConfig
from mimray.tuning.search import sampler
from mimray.tuning.space import space_digest

if TYPE_CHECKING:
    import optuna

PATIENCE_S = 120.0
_PAUSE_S = 1.0
_SPACE = "mimray.space"

logger = logging.getLogger(__name__)


def open_study(
    config: SweepConfig, name: str, storage: str, *, fresh: bool = False
) -> optuna.Study:
    """Open a sweep's study, or make it.

    Args:
        config: the sweep's configuration.
        name: the study's name, unique in its storage.
        storage: the URL of a database.
        fresh: delete an earlier study of that name.

    Raises:
        RunConflictError: a study of that name searches another space.
        StorageError: the database does not answer.
        ConfigError: a value that Optuna cannot keep.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    digest = space_digest(config)
    with study_errors(storage):
        database = _database(storage)
        if fresh and name in optuna.get_all_study_names(database):
            optuna.delete_study(study_name=name, storage=database)
        study = optuna.create_study(
            storage=database,
            study_name=name,
            sampler=sampler(config, 0),
            direction="maximize",
            load_if_exists=True,
        )
        there = study.user_attrs.get(_SPACE)
        if there is None and not study.trials:
            study.set_user_attr(_SPACE, digest)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([config.score.task])
        elif there != digest:
            raise RunConflictError(
                f"the study {name!r} in {masked(storage)} belongs to another space",
                hint="another --name, or `study: NAME` in the sweep",
            )
    return study


@contextmanager
def study_errors(storage: str) -> Iterator[None]:
    """Name the database in errors of it, however deep in Tune they come from.

    Args:
        storage: the URL of the database.

    Raises:
        StorageError: it does not answer, or refuses.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, SQLAlchemyError | StorageInternalError):
                raise _failure(storage, cause.__cause__ or cause) from error
            cause = cause.__cause__
        raise


def _failure(storage: str, cause: BaseException) -> StorageError:
    return StorageError(
        f"Optuna's storage {masked(storage)} does not answer: {masked(str(cause).splitlines()[0])}",
        hint="sqlite:///FILE or postgresql://USER@HOST/DATABASE (pip install psycopg[binary]); the "
        "same command continues a sweep",
    )


def _database(url: str) -> optuna.storages.RDBStorage:
    """Optuna's database, whose connections outlive a restart of the server.

    A connection is tried before it is used, and one that is lost is made again for two minutes.
    """
    import optuna
    from sqlalchemy import event

    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:  # the database's driver
        raise _failure(url, error) from error

    # As SQLAlchemy documents it: what a listener returns is the connection.
    @event.listens_for(storage.engine, "do_connect")
    def patiently(dialect: Any, record: Any, args: Any, kwargs: Any) -> Any:
        until, told = time.monotonic() + PATIENCE_S, False
        while True:
            try:
                return dialect.connect(*args, **kwargs)
            except dialect.loaded_dbapi.OperationalError as error:
                if time.monotonic() + _PAUSE_S > until:
                    raise
                if not told:
                    reason = masked(str(error).strip().splitlines()[-1])
                    logger.warning(
                        "Optuna's storage does not answer: %s; trying again for %g s",
                        reason, PATIENCE_S,
                    )  # fmt: skip
                told = True
                time.sleep(_PAUSE_S)

    return storage
