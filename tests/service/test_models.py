"""Versions of the registry, as text."""

from __future__ import annotations

from typing import Any

from mimray.service.commands.models import version_text, versions_text

ROW: dict[str, Any] = {
    "model": "photos@v2",
    "name": "photos",
    "version": 2,
    "aliases": ["best", "champion"],
    "method": "mae",
    "source": "",
    "scores": {"knn": {"metric": "accuracy", "headline": 0.25}},
}


def test_versions__a_line_each() -> None:
    other = {**ROW, "model": "photos@v1", "aliases": [], "scores": {}}
    assert versions_text([ROW, other]).splitlines() == [
        "photos@v2 @best @champion  mae  knn 0.2500",
        "photos@v1  mae",
    ]


def test_version__a_line_a_fact_without_empty_ones() -> None:
    assert [line.split() for line in version_text(ROW).splitlines()] == [
        ["model", "photos@v2"],
        ["name", "photos"],
        ["version", "2"],
        ["aliases", "best", "champion"],
        ["method", "mae"],
        ["knn", "accuracy", "0.2500"],
    ]
