"""The exceptions of the project.

    MimrayError
    ├── ConfigError            a recipe, a key, a value
    ├── DataError              a dataset as a whole
    │   ├── EmptyDatasetError
    │   ├── ImageError         one picture that cannot be used
    │   └── TooManyRejectedError
    ├── ResourceError          the cluster cannot give what was asked
    ├── StorageError           disk full, not writable, not shared
    ├── RunConflictError       a run of this name holds another recipe
    ├── CheckpointError        a checkpoint that is damaged or does not fit
    ├── BundleError            a frozen encoder that cannot be loaded or written
    │   ├── MissingBundleError
    │   └── NoCheckpointError  weights of another library that cannot be read
    ├── NonFiniteLossError     training diverged
    ├── CodebookCollapseError  a tokenizer uses next to none of its codes
    ├── CollapseError          a teacher says the same of every picture
    ├── StoppedError           ended from outside; the same command goes on
    └── ServingError           the endpoint (its own leaves live in `mimray.serving.wire.errors`)

Every error that a person can cause is one of these; the command line prints it in one line
and exits with `exit_code`. Broken invariants of our own are asserts.
"""

from __future__ import annotations

from typing import Any

from mimray.trainers.redaction import masked


class MimrayError(Exception):
    """Base of every error a user may see; passwords in its addresses are masked.

    Args:
        message: a sentence on what is wrong, with the name and the value.
        hint: the cure, in a few words; empty for none.
    """

    code = "error"
    exit_code = 2
    # True if every rank of a training raises the same error, so that none is left waiting.
    on_every_rank = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(masked(message))
        self.hint = masked(hint)

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message} ({self.hint})" if self.hint else message

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors travel between Ray processes; the default would drop keyword arguments.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(kind: type[MimrayError], args: tuple[Any, ...], state: dict[str, Any]) -> MimrayError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(MimrayError):
    """A recipe, a key or a value that is not allowed."""

    code = "config"


class DataError(MimrayError):
    """A dataset that cannot be used as asked."""

    code = "data"


class EmptyDatasetError(DataError):
    """A dataset without a single picture."""

    code = "empty_dataset"


class ImageError(DataError):
    """One picture that cannot be decoded or is not acceptable.

    Args:
        reason: a stable key, e.g. `truncated`, `too_small`, `too_large`, `not_an_image`.
        message: a sentence on what is wrong, for people.
        hint: the cure, in a few words; empty for none.
    """

    code = "image"

    def __init__(self, reason: str, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), (self.reason, *self.args), self.__dict__)

    def __str__(self) -> str:
        message = str(self.args[-1])
        return f"{message} ({self.hint})" if self.hint else message


class TooManyRejectedError(DataError):
    """More unusable pictures than the user allowed."""

    code = "too_many_rejected"


class ResourceError(MimrayError):
    """The cluster can never give what was asked for."""

    code = "resources"


class StorageError(MimrayError):
    """A place that cannot be written, is full, or is not seen by every node."""

    code = "storage"


class RunConflictError(MimrayError):
    """A run of this name exists and was made by another recipe or other data."""

    code = "run_conflict"


class CheckpointError(MimrayError):
    """A checkpoint that is damaged or does not fit the run."""

    code = "checkpoint"


class BundleError(MimrayError):
    """A bundle that cannot be loaded or written."""

    code = "bundle"


class MissingBundleError(BundleError):
    """No bundle where one was named, or none yet."""

    code = "missing_bundle"


class NoCheckpointError(BundleError):
    """No weights can be read from what was named as a checkpoint of another library."""

    code = "no_checkpoint"


class NonFiniteLossError(MimrayError):
    """The loss became NaN or infinite; the update was not made."""

    code = "non_finite_loss"
    exit_code = 1


class CodebookCollapseError(MimrayError):
    """Too few codes of a tokenizer are in use for further training to be worthwhile."""

    code = "codebook_collapse"
    exit_code = 1


class CollapseError(MimrayError):
    """A method that learns from a teacher of its own has come to say the same of every picture."""

    code = "collapse"
    exit_code = 1


class StoppedError(MimrayError):
    """A training was asked to end; the same command goes on from its last checkpoint."""

    code = "stopped"
    exit_code = 75  # EX_TEMPFAIL of sysexits.h: not done, try again


class ServingError(MimrayError):
    """The endpoint cannot start, or answered with an error."""

    code = "serving"
