from __future__ import annotations

import pytest

from mimray.trainers.data.files import (
    is_inside,
    is_parquet,
    is_picture,
    join,
    parent,
    split_options,
)
from mimray.trainers.storage import RunDir

OPTIONS = "?endpoint_override=127.0.0.1:9000&scheme=http&region=here"


@pytest.mark.parametrize(
    ("base", "joined"),
    [
        (f"s3://bucket/runs{OPTIONS}", f"s3://bucket/runs/a/b{OPTIONS}"),
        (f"s3://bucket/{OPTIONS}", f"s3://bucket/a/b{OPTIONS}"),
        ("s3://bucket", "s3://bucket/a/b"),
        ("/what?/runs/", "/what?/runs/a/b"),  # a local path has no options
        ("/", "/a/b"),
    ],
)
def test_join__appends_before_the_options(base: str, joined: str) -> None:
    assert join(base, "a/b") == joined


@pytest.mark.parametrize(
    ("uri", "above"),
    [
        (f"s3://bucket/runs/a{OPTIONS}", f"s3://bucket/runs{OPTIONS}"),
        (f"s3://bucket/runs/{OPTIONS}", f"s3://bucket{OPTIONS}"),
        ("/folder/file", "/folder"),
        ("/file", "/"),
        ("file", "."),
    ],
)
def test_parent__keeps_the_options(uri: str, above: str) -> None:
    assert parent(uri) == above


def test_suffixes__are_those_of_the_file() -> None:
    assert is_parquet(f"s3://bucket/train.parquet{OPTIONS}")
    assert is_picture(f"s3://bucket/a.PNG{OPTIONS}")
    assert split_options("/a?b.png") == ("/a?b.png", "")


def test_run_dir__options_stay_at_the_end_and_the_client_is_shared() -> None:
    runs = RunDir(f"s3://bucket/runs/{OPTIONS}")
    run = runs / "first"
    assert run.uri == f"s3://bucket/runs/first{OPTIONS}"
    assert (run.root, run.name, run.path("a")) == (
        "bucket/runs/first",
        "first",
        "bucket/runs/first/a",
    )
    assert run.filesystem is runs.filesystem
    again = RunDir(run.uri)
    assert (again.root, again.filesystem) == (run.root, run.filesystem)


@pytest.mark.parametrize("path", ["a", "a/b.png", "./a", "a/../b", "..a/b", "a..", "a\\b"])
def test_is_inside__a_path_below(path: str) -> None:
    assert is_inside(path)


@pytest.mark.parametrize("path", ["..", "../a", "a/../../b", "/etc/passwd", "..\\a", "\\a", "//a"])
def test_is_inside__not_a_path_that_leads_out(path: str) -> None:
    assert not is_inside(path)
