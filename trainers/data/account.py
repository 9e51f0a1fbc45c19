"""The account of a reading: what it passed over, merged, shortened or reinterpreted, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Of names, so many are shown in a line and kept in JSON.
_SHOWN, _KEPT = 4, 50


@dataclass(frozen=True)
class Reason:
    """A reason to count something under.

    Attributes:
        key: its stable name, as in JSON.
        noun: the thing counted, in the singular.
        action: what became of it: passed over, merged, shortened, reinterpreted or kept.
        why: the reason, for people.
        cure: what the person may do about it; empty for nothing.
        warns: True where pictures may be lost or wrong, so that the line is a warning.
        counts_kinds: True shows the number of each kind, False their names alone.
    """

    key: str
    noun: str
    action: str
    why: str
    cure: str = ""
    warns: bool = False
    counts_kinds: bool = False


_REASONS = (
    # Listing.
    Reason("hidden", "file or folder", "passed over", "hidden, or other programs' bookkeeping"),
    Reason("not_a_picture", "file", "passed over", "no pictures by their names", counts_kinds=True),
    Reason(
        "unreadable_format",
        "file",
        "passed over",
        "pictures in a format that is not read",
        "convert them to JPEG, PNG or TIFF first (`magick mogrify -format png *.heic`)",
        warns=True,
        counts_kinds=True,
    ),
    Reason(
        "name_not_utf8",
        "file or folder",
        "passed over",
        "the name is not UTF-8",
        "rename it (`convmv -f latin1 -t utf8 -r --notest FOLDER`)",
        warns=True,
    ),
    Reason(
        "entered_before", "folder or link", "passed over", "the folder is read already, by its name"
    ),
    Reason("dead_link", "link", "passed over", "it leads nowhere", warns=True),
    Reason("not_permitted", "folder", "passed over", "it may not be entered", warns=True),
    Reason("special_file", "file", "passed over", "neither a file nor a folder"),
    # Splits and classes.
    Reason("other_split", "file", "passed over", "of another split", counts_kinds=True),
    Reason(
        "beside_splits",
        "file",
        "passed over",
        "beside the folders of the splits",
        "give their folder by itself to read them",
        warns=True,
        counts_kinds=True,
    ),
    Reason(
        "split_as_class",
        "folder",
        "reinterpreted",
        "called like a split and read as a class",
        warns=True,
    ),
    Reason("beside_parquet", "file", "passed over", "pictures beside Parquet", warns=True),
    Reason("folders_merged", "folder", "merged", "their Parquet files are read as one dataset"),
    # Pictures.
    Reason(
        "first_page",
        "file",
        "shortened",
        "the first page was taken",
        "--pages all takes each as a picture",
        warns=True,
    ),
    Reason("first_frame", "file", "shortened", "the first frame was taken"),
    Reason("overviews", "file", "shortened", "previews inside of it were left out"),
    Reason(
        "bands_left_out", "picture", "shortened", "bands beside RGB were left out", "see --bands"
    ),
    Reason("on_white", "picture", "reinterpreted", "transparent, laid on white"),
    Reason("cmyk", "picture", "reinterpreted", "CMYK, converted without its colour profile"),
    Reason("to_8_bits", "picture", "reinterpreted", "more than 8 bits a channel, mapped to 8"),
    Reason(
        "dark",
        "picture",
        "reinterpreted",
        "of 16 bits, using under a sixteenth of their range, and so nearly of one gray",
        "--range LOW:HIGH says which values become black and white",
        warns=True,
    ),
    Reason("clipped", "picture", "reinterpreted", "values outside of --range were cut off"),
    Reason(
        "range_unused",
        "picture",
        "kept",
        "--range is for gray and for TIFF, and was not applied to 16-bit colour",
        warns=True,
        counts_kinds=True,
    ),
)
REASONS: Mapping[str, Reason] = {reason.key: reason for reason in _REASONS}


class Account:
    """Counts by reason, and by kind within a reason: a suffix, a name, a number of pages."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def add(self, reason: str, kind: str = "", count: int = 1) -> None:
        """Count something.

        Args:
            reason: a key of `REASONS`.
            kind: the suffix, name or number that tells it from others of the reason.
            count: how many there are.
        """
        assert reason in REASONS, reason
        self._counts.setdefault(reason, Counter())[kind] += count

    def merge(self, other: Account) -> None:
        """Add another account's counts."""
        for reason, kinds in other._counts.items():
            for kind, count in kinds.items():
                self.add(reason, kind, count)

    def total(self, *reasons: str) -> int:
        """The count of some reasons together."""
        return sum(self._counts.get(reason, Counter()).total() for reason in reasons)

    def drop_few_dark(self) -> None:
        """Forget dark pictures unless most of 16 bits are: one among others shows the night."""
        if 2 * self.total("dark") <= self.total("to_8_bits"):
            self._counts.pop("dark", None)

    def lines(self) -> list[str]:
        """The account for people, a line a reason, warnings last."""
        found = sorted(self._reasons(), key=lambda reason: reason.warns)
        return [self._line(reason) for reason in found]

    def short_lines(self) -> list[str]:
        """The account in few lines: counts without reasons in one, each warning in another."""
        calm = [self._head(reason) for reason in self._reasons() if not reason.warns]
        return (["; ".join(calm)] if calm else []) + self.warnings()

    def warnings(self) -> list[str]:
        """The lines of what needs somebody's attention."""
        return [self._line(reason) for reason in self._reasons() if reason.warns]

    def to_json(self) -> list[dict[str, Any]]:
        """The account for programs, an object a reason."""
        return [
            {
                "reason": reason.key,
                "action": reason.action.replace(" ", "_"),
                "count": self.total(reason.key),
                "kinds": dict(self._kinds(reason)[:_KEPT]),
                "warning": reason.warns,
                "message": self._line(reason),
            }
            for reason in self._reasons()
        ]

    def _reasons(self) -> Iterable[Reason]:
        return (reason for reason in _REASONS if reason.key in self._counts)

    def _kinds(self, reason: Reason) -> list[tuple[str, int]]:
        kinds = self._counts[reason.key].items()
        return sorted(((k, n) for k, n in kinds if k), key=lambda kind: (-kind[1], kind[0]))

    def _line(self, reason: Reason) -> str:
        return (
            ("warning: " if reason.warns else "")
            + f"{self._head(reason)}: {reason.why}"
            + (f"; {reason.cure}" if reason.cure else "")
        )

    def _head(self, reason: Reason) -> str:
        count = self.total(reason.key)
        kinds = self._kinds(reason)
        shown = [f"{k} {n}" if reason.counts_kinds else k for k, n in kinds[:_SHOWN]]
        more = ", ..." if len(kinds) > _SHOWN else ""
        listed = f" ({', '.join(shown)}{more})" if shown else ""
        return f"{count} {_plural(reason.noun, count)} {reason.action}{listed}"


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else " or ".join(f"{word}s" for word in noun.split(" or "))
