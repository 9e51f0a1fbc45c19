"""Standard errors of scores over pictures, and of differences between two scores.

Another draw of as many pictures would give another score; the standard error is the spread of such
scores. Two encoders scored on the same pictures are compared picture by picture, since what is easy
for one is mostly easy for the other.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from mimray.trainers.data.rng import Stream, generator

NUM_RESAMPLES = 100
NUM_GROUPS = 20
MIN_JACKKNIFE = 5
SIGNIFICANCE = 0.05
"""Share of pairs of equal encoders that are told apart wrongly."""
_Z = 1.959964  # the normal distribution's, two-sided at SIGNIFICANCE

Estimator = Literal["binomial", "bootstrap", "jackknife"]
ESTIMATORS: dict[Estimator, str] = {
    "binomial": "binomial, sqrt(p (1 - p) / n)",
    "bootstrap": f"bootstrap over pictures, {NUM_RESAMPLES} resamples",
    "jackknife": f"jackknife over at most {NUM_GROUPS} groups of pictures",
}


@dataclass(frozen=True)
class Evidence:
    """The content of a score by picture, as far as its standard error and its comparison need it.

    Attributes:
        estimator: way in which the standard error is estimated.
        pictures: digest of the pictures scored on, in their order; equal digests pair two scores.
        num_pictures: number of pictures, N.
        values: N of True where a picture was classified right, of estimator `binomial`; else R
            scores whose standard deviation is the standard error, of resamples that
            are the same for the same number of pictures.
    """

    estimator: Estimator
    pictures: str
    num_pictures: int
    values: tuple[float, ...]

    @property
    def standard_error(self) -> float | None:
        """The standard error; None where the pictures do not suffice to estimate one."""
        if self.num_pictures < 2:
            return None
        if self.estimator == "binomial":
            return accuracy_error(int(sum(self.values)), self.num_pictures)
        found = float(np.std(self.values))
        # Resamples that all agree, as where nothing is found in any, tell nothing of the error.
        return found if math.isfinite(found) and found > 0 else None

    def as_json(self) -> dict[str, Any]:
        """The evidence as JSON: a bit a picture in base64, or a number a resample."""
        values: Any = [float(f"{value:.6g}") for value in self.values]
        if self.estimator == "binomial":
            bits = np.packbits(np.array(self.values, dtype=bool))
            values = base64.b64encode(bits.tobytes()).decode()
        return {
            "estimator": self.estimator,
            "pictures": self.pictures,
            "num_pictures": self.num_pictures,
            "values": values,
        }

    @classmethod
    def of_json(cls, tree: Mapping[str, Any]) -> Evidence:
        """Evidence from what `as_json` gave."""
        count = int(tree["num_pictures"])
        if tree["estimator"] == "binomial":
            packed = np.frombuffer(base64.b64decode(tree["values"]), np.uint8)
            values = np.unpackbits(packed, count=count).astype(bool)
        else:
            values = np.array(tree["values"], np.float64)
        return cls(tree["estimator"], tree["pictures"], count, tuple(values.tolist()))


def of_accuracy(right: np.ndarray, val_fingerprint: str, index: np.ndarray) -> Evidence:
    """Evidence of an accuracy.

    Args:
        right: bool [N], True where a picture was classified right.
        val_fingerprint: fingerprint of the pictures scored on.
        index: int64 [N], the place of each picture in its dataset.
    """
    return Evidence(
        "binomial", digest_of(val_fingerprint, index), len(right), tuple(right.tolist())
    )


def by_bootstrap(
    score_of: Callable[[np.ndarray], float | None], val_fingerprint: str, num_pictures: int
) -> Evidence | None:
    """Evidence of a score over a set of pictures, by the bootstrap.

    Args:
        score_of: the score by the times that each picture counts, int64 [N]; None where that
            cannot be measured.
        val_fingerprint: fingerprint of the pictures scored on.
        num_pictures: number of pictures, N.

    Returns:
        The evidence; None where no resample can be measured.

    Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
    """
    found = [score_of(counts) for counts in resamples(num_pictures)]
    values = np.array([math.nan if value is None else value for value in found])
    if np.isnan(values).all():
        return None
    # A resample without any labelled object tells nothing; its place is the mean of the others.
    values = np.where(np.isnan(values), np.nanmean(values), values)
    pictures = digest_of(val_fingerprint, np.arange(num_pictures))
    return Evidence("bootstrap", pictures, num_pictures, tuple(values.tolist()))


def resamples(num_pictures: int) -> np.ndarray:
    """Times that each picture counts in each resample, int64 [NUM_RESAMPLES, N].

    They depend on the number of pictures alone, so that scores of two encoders are paired.
    """
    rng = generator(0, Stream.RESAMPLE, num_pictures)
    drawn = (rng.random((NUM_RESAMPLES, num_pictures)) * num_pictures).astype(np.int64)
    return np.stack([np.bincount(row, minlength=num_pictures) for row in drawn])


def by_jackknife(
    score_without: Callable[[np.ndarray], float], val_fingerprint: str, index: np.ndarray
) -> Evidence | None:
    """Evidence of a score that a resample with repetitions would bias, by the grouped jackknife.

    Args:
        score_without: the score without some pictures, bool [N], True where left out.
        val_fingerprint: fingerprint of the pictures scored on.
        index: int64 [N], the place of each picture in its dataset.

    Returns:
        The evidence; None where there are fewer pictures than `MIN_JACKKNIFE`.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", eq. 11.5, of groups.
    """
    num_pictures = len(index)
    if num_pictures < MIN_JACKKNIFE:
        return None
    num_groups = min(NUM_GROUPS, num_pictures)
    groups = np.arange(num_pictures) % num_groups
    found = np.array([score_without(groups == group) for group in range(num_groups)])
    # Scaled, so that their plain standard deviation is the jackknife's standard error.
    values = found.mean() + (found - found.mean()) * math.sqrt(num_groups - 1)
    pictures = digest_of(val_fingerprint, index)
    return Evidence("jackknife", pictures, num_pictures, tuple(values.tolist()))


def accuracy_error(num_right: int, num_pictures: int) -> float:
    """Binomial standard error of an accuracy.

    Where all pictures or none are right the formula would say 0, as if that were certain; one
    picture of each kind is then counted besides (Laplace's rule of succession).

    Args:
        num_right: pictures classified right.
        num_pictures: pictures classified, at least 1.
    """
    share, count = num_right / num_pictures, float(num_pictures)
    if share in (0.0, 1.0):
        share, count = (num_right + 1) / (num_pictures + 2), count + 2
    return math.sqrt(share * (1 - share) / count)


def digest_of(val_fingerprint: str, index: np.ndarray) -> str:
    """A digest of the pictures scored on, in their order."""
    content = val_fingerprint.encode() + np.ascontiguousarray(index, np.int64).tobytes()
    return hashlib.sha256(content).hexdigest()[:16]


class Figure(NamedTuple):
    """A score with its uncertainty, as far as it is known.

    Attributes:
        value: the headline.
        standard_error: its standard error; None where it is not known.
        evidence: the content by picture, as JSON; None in results of earlier versions.
    """

    value: float
    standard_error: float | None = None
    evidence: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Figure:
        """The headline of a result, which may be of an earlier version."""
        return cls(result["headline"], result.get("standard_error"), result.get("evidence"))


@dataclass(frozen=True)
class Difference:
    """The difference between two scores.

    Attributes:
        value: the first less the second.
        standard_error: the difference's standard error; None where it is not known.
        paired: True if both are of the same pictures and were compared picture by picture.
        told_apart: True if chance over pictures alone explains it in fewer than 5 % of cases;
            None where that is not known.
        interval: the bounds of the difference's 95 % interval, which leaves 0 out where the scores
            are told apart; None where it is not known.
    """

    value: float
    standard_error: float | None
    paired: bool
    told_apart: bool | None
    interval: tuple[float, float] | None = None

    def text(self) -> str:
        """The difference for people: `-0.0334 ± 0.0478, not told apart`."""
        if self.standard_error is None:
            return f"{self.value:+.4f}"
        verdict = "" if self.told_apart else ", not told apart"
        return f"{self.value:+.4f} ± {self.standard_error:.4f}{verdict}"


def difference(first: Figure, second: Figure) -> Difference:
    """Compare two scores, picture by picture where both are of the same pictures.

    Accuracies on the same pictures are told apart by McNemar's exact test; other scores where they
    differ by more than 1.96 standard errors of the difference.

    Args:
        first: a score.
        second: the score that it is held against.

    Source: McNemar 1947, "Note on the Sampling Error of the Difference Between Correlated
        Proportions or Percentages".
    """
    value = first.value - second.value
    if first.evidence and second.evidence:
        one, other = Evidence.of_json(first.evidence), Evidence.of_json(second.evidence)
        if (one.pictures, one.estimator) == (other.pictures, other.estimator):
            return _paired(value, one, other)
    if first.standard_error is None or second.standard_error is None:
        return Difference(value, None, paired=False, told_apart=None)
    error = math.hypot(first.standard_error, second.standard_error)
    return _by_normal(value, error, paired=False)


def _paired(value: float, one: Evidence, other: Evidence) -> Difference:
    ours, theirs = np.array(one.values), np.array(other.values)
    if one.estimator != "binomial":
        error = float(np.std(ours - theirs))
        if one.standard_error is None and other.standard_error is None:
            return Difference(value, None, paired=True, told_apart=None)
        return _by_normal(value, error, paired=True)
    gained = int((ours & ~theirs).sum())
    lost = int((theirs & ~ours).sum())
    unlike, count = gained + lost, one.num_pictures
    error = math.sqrt(max(0.0, unlike - (gained - lost) ** 2 / count)) / count
    low, high = paired_interval(gained, lost, count)
    told_apart = not low <= 0 <= high
    return Difference(value, error, paired=True, told_apart=told_apart, interval=(low, high))


def _by_normal(value: float, error: float, *, paired: bool) -> Difference:
    return Difference(value, error, paired, abs(value) > _Z * error, around(value, error))


def around(value: float, standard_error: float) -> tuple[float, float]:
    """The 95 % interval of an estimate that is normally distributed."""
    return value - _Z * standard_error, value + _Z * standard_error


def paired_interval(gained: int, lost: int, num_pictures: int) -> tuple[float, float]:
    """The exact 95 % interval of the difference of two accuracies on the same pictures.

    It is conditional on the number of pictures that only one of the two has right: Clopper and
    Pearson's interval of the share of these that the first has right. It leaves 0 out exactly where
    McNemar's exact test tells the two apart. Where they are right on the same pictures, the bounds
    are those of the share of pictures on which they differ.

    Args:
        gained: number of pictures that the first alone has right.
        lost: number of pictures that the second alone has right.
        num_pictures: number of pictures, N.

    Source: Newcombe 1998, "Improved confidence intervals for the difference between binomial
        proportions based on paired data", the exact conditional method; Clopper & Pearson 1934.
    """
    from scipy.stats import binomtest

    unlike = gained + lost
    if not unlike:
        most = binomtest(0, num_pictures).proportion_ci(1 - SIGNIFICANCE).high
        return -float(most), float(most)
    share = binomtest(gained, unlike).proportion_ci(1 - SIGNIFICANCE, method="exact")
    scale = unlike / num_pictures
    return float((2 * share.low - 1) * scale), float((2 * share.high - 1) * scale)


def figure_text(value: float, standard_error: float | None) -> str:
    """A score with its standard error, `0.2083 ± 0.0371`; alone where that is not known."""
    digits = 4 if abs(value) < 10 else 2
    error = "" if standard_error is None else f" ± {standard_error:.{digits}f}"
    return f"{value:.{digits}f}{error}"


def described(result: Mapping[str, Any]) -> str:
    """A result's headline with its standard error and number of pictures, which may be missing.

    Args:
        result: a result, or a score of a card, of this version or an earlier one; `num_seeds` says
            of how many other seeds the headline is the mean.
    """
    count, num_seeds = result.get("num_val"), result.get("num_seeds")
    pictures = "" if count is None else f" on {count:,} pictures"
    seeds = "" if num_seeds is None else f", the mean of other seeds ({num_seeds})"
    return figure_text(result["headline"], result.get("standard_error")) + pictures + seeds
