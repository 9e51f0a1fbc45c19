from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow import fs as pafs

from mimray.trainers.data.ingest_plan import plan_ingest, read_unit
from mimray.trainers.data.inspect import inspect
from mimray.trainers.data.labels import choose_column
from mimray.trainers.data.selection import labels_of
from mimray.trainers.data.shards import Row, ShardWriter
from mimray.trainers.data.sources import Source, open_source
from mimray.trainers.errors import DataError


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, features: dict[str, Any] | None = None, **columns: Any) -> Path:
    """Parquet of pictures with some columns beside them; gives the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    images = [{"bytes": picture(i), "path": f"{i}.png"} for i in range(count)]
    table = pa.table({"image": images, **columns})
    if features is not None:
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path)
    return path.parent


def found(place: Path, label: str | None = None) -> tuple[tuple[str, ...], list[int]]:
    source = open_source(str(place), label=label)
    labels = labels_of(source)
    records = [source[index].label for index in range(len(source))]
    assert records == [None if number < 0 else number for number in labels]
    return source.facts.class_names, labels.tolist()


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["dog", "cat", None, ""], ("cat", "dog"), [1, 0, -1, -1]),
        (pa.array(["b", "a"]).dictionary_encode(), ("a", "b"), [1, 0]),
        (pa.array(["b", "a"], pa.large_string()), ("a", "b"), [1, 0]),
        ([True, False, None], ("False", "True"), [1, 0, -1]),
        ([1.0, 0.0, float("nan"), None], ("0", "1"), [1, 0, -1, -1]),
        ([3, 9703, 977, 3, 5219, -1], ("3", "977", "5219", "9703"), [0, 3, 1, 0, 2, -1]),
        ([5219404, 7], ("7", "5219404"), [1, 0]),
        (pa.array([10, 2], pa.uint8()), ("2", "10"), [1, 0]),
    ],
)
def test_parquet__values_of_any_type_are_classes(
    tmp_path: Path, values: Any, names: tuple[str, ...], labels: list[int]
) -> None:
    assert found(write(tmp_path / "a.parquet", label=values)) == (names, labels)


def test_parquet__shards_may_hold_whole_numbers_as_floats_or_not(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", label=[2, 4])
    write(tmp_path / "b.parquet", label=[4.0, None])
    assert found(tmp_path) == (("2", "4"), [0, 1, 1, -1])


HF = {
    "fine_label": {"_type": "ClassLabel", "names": ["a", "b", "c"]},
    "coarse_label": {"_type": "ClassLabel", "names": ["x", "y"]},
}


def test_parquet__one_of_several_columns_is_chosen(tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", HF, fine_label=[0, 2], coarse_label=[1, 1], fold=[5, 7])
    assert found(place, "fine_label") == (("a", "b", "c"), [0, 2])
    assert found(place, "coarse_label") == (("x", "y"), [1, 1])
    assert found(place, "fold") == (("5", "7"), [0, 1])
    prints = {
        open_source(str(place), label=label).facts.fingerprint
        for label in (None, "fine_label", "coarse_label")
    }
    assert len(prints) == 3, "the same pictures under other labels are other data"
    with pytest.raises(DataError, match=r"no column 'fine'.*fine_label, coarse_label, fold"):
        open_source(str(place), label="fine")


def test_parquet__the_lone_class_label_needs_no_option(tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", {"y": HF["coarse_label"]}, y=[1, 0], fold=[5, 7])
    assert found(place) == found(place, "y") == (("x", "y"), [1, 0])
    by_default, asked = open_source(str(place)), open_source(str(place), label="y")
    assert by_default.facts == asked.facts


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"labels": [0, 1]}, r"labels \(int64\): --label labels takes it"),
        ({"label": [[0], [1, 2]]}, "label .*holds lists, and only one label a picture"),
        ({"label": [0.5, 1.0]}, "label holds 0.5, which is no class"),
        ({"label": [float("inf"), 1.0]}, "label holds inf"),
        ({"label": [{"a": 1}, {"a": 2}]}, "label .*struct.*no class"),
        ({"label": [None, None]}, "label .*null.*holds no value"),
        ({"label": pa.array([None, -1], pa.int8())}, "column of labels holds none"),
        ({"caption": ["a cat", "a dog"], "id": [1, 2]}, r"caption \(string\).*id \(int64\)"),
    ],
)
def test_parquet__columns_that_are_not_taken_are_named(
    tmp_path: Path, columns: dict[str, Any], reason: str
) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", **columns)))
    assert source.labels() is None
    assert source.facts.class_names == ()
    with pytest.raises(DataError, match=f"has no labels; .*{reason}"):
        labels_of(source)


def test_parquet__what_cannot_be_a_label_is_refused_only_where_labels_are_read(
    tmp_path: Path,
) -> None:
    place = str(write(tmp_path / "a.parquet", score=[0.5, 1.0], tags=[["a"], ["b"]]))
    for column, reason in (("score", "holds 0.5"), ("tags", "holds lists")):
        with pytest.raises(DataError, match=reason):
            open_source(place, label=column)
        assert len(open_source(place, with_labels=False)) == 2


def test_labels__what_is_odd_is_said(tmp_path: Path) -> None:
    place = write(tmp_path / "a.parquet", label=["Cat", "cat", None, "dog"])
    source = open_source(str(place))
    assert source.facts.class_names == ("Cat", "cat", "dog")
    notes = " ".join(source.label_notes)
    assert "1 of 4 pictures have no label" in notes
    assert "'Cat' and 'cat' differ in case" in notes
    assert inspect(str(place)).label_notes == source.label_notes
    assert inspect(str(place)).label_counts == {"Cat": 1, "cat": 1, "dog": 1}
    each = write(tmp_path / "each/a.parquet", label=[f"picture {i}" for i in range(9)])
    assert "class of its own" in open_source(str(each)).label_notes[-1]


def pictures(place: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(picture(seed))


@pytest.mark.parametrize(
    ("name", "text", "names", "labels"),
    [
        ("metadata.csv", "file_name,label\na.png,dog\nb.png,cat\n", ("cat", "dog"), [1, 0, -1]),
        ("metadata.csv", "\ufefffile_name,label\r\n./a.png,7\r\nb.png,3", ("3", "7"), [1, 0, -1]),
        ("metadata.csv", "label,file_name\n1.0,a.png\n0.0,c.png\n", ("0", "1"), [1, -1, 0]),
        ("metadata.csv", "file_name,label\na.png,007\nb.png,7\n", ("007", "7"), [0, 1, -1]),
        ("metadata.csv", 'file_name,label\na.png,"x, y"\nb.png,\n', ("x, y",), [0, -1, -1]),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "label": true}\n{"file_name": "b.png", "label": false}\n\n',
            ("False", "True"),
            [1, 0, -1],
        ),
        (
            "metadata.jsonl",
            '{"file_name": "c.png", "label": 2, "box": [1]}\n{"file_name": "a.png", "box": "-"}\n',
            ("2",),
            [-1, -1, 0],
        ),
    ],
)  # fmt: skip
def test_folder__labels_of_a_table_beside_the_pictures(
    tmp_path: Path, name: str, text: str, names: tuple[str, ...], labels: list[int]
) -> None:
    pictures(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / name).write_bytes(text.encode())
    assert found(tmp_path) == (names, labels)


def test_folder__tables_of_splits_and_of_the_whole(tmp_path: Path) -> None:
    pictures(tmp_path, "train/a.png", "train/deep/b.png", "val/a.png")
    (tmp_path / "train/metadata.csv").write_text("file_name,label\na.png,x\ndeep\\b.png,y\n")
    (tmp_path / "val/metadata.csv").write_text("file_name,label\na.png,y\n")
    assert found(tmp_path) == (("x", "y"), [0, 1])
    assert labels_of(open_source(str(tmp_path), split="val")).tolist() == [0]
    assert open_source(str(tmp_path), split="val").facts.class_names == ("y",)
    for table in tmp_path.glob("*/metadata.csv"):
        table.unlink()
    (tmp_path / "metadata.csv").write_text("file_name,kind\ntrain/a.png,u\nval/a.png,v\n")
    assert found(tmp_path, "kind") == (("u",), [0, -1])


def test_folder__a_table_goes_before_class_folders_only_if_it_has_labels(tmp_path: Path) -> None:
    pictures(tmp_path, "cat/a.png", "dog/b.png")
    before = open_source(str(tmp_path)).facts
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/a.png,furry\n")
    assert found(tmp_path) == (("cat", "dog"), [0, 1])
    assert open_source(str(tmp_path)).facts == before
    (tmp_path / "metadata.csv").write_text("file_name,label\ncat/a.png,u\ndog/b.png,v\nx.png,u\n")
    source = open_source(str(tmp_path))
    assert source.facts.class_names == ("u", "v")
    assert source.facts.fingerprint != before.fingerprint
    assert "1 pictures that are not there, the first x.png" in source.label_notes[-1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name,label\na.png,x\n", "no column file_name"),
        ("file_name,kind\na.png,x\n", "metadata.csv: column kind .*--label kind"),
        ("file_name,label\na.png,0.5\n", "column label holds 0.5"),
        ("file_name,label\na.png,x,y\n", "row 2 has 3 cells, its head 2"),
    ],
)
def test_folder__a_table_that_is_not_taken_is_named(tmp_path: Path, text: str, reason: str) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match=f"has no labels; .*{reason}"):
        labels_of(open_source(str(tmp_path)))
    (tmp_path / "metadata.csv").rename(tmp_path / "labels.csv")
    with pytest.raises(DataError, match=r"labels\.csv: not read; labels are read from metadata"):
        labels_of(open_source(str(tmp_path)))


HUGE = "12345678901234567890123"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", f"file_name,id,label\na.png,{HUGE},x\nb.png,3,y\n"),
        ("metadata.csv", f"file_name,id,label\na.png,{2**63},x\nb.png,3,y\n"),
        ("metadata.csv", f"file_name,id,label\na.png,{'9' * 5000},x\nb.png,3,y\n"),
        ("metadata.csv", " file_name ,label,,\na.png,x,,\nb.png,y,,\n"),
        ("metadata.jsonl", f'{{"file_name":"a.png","id":{HUGE},"label":"x"}}\n'),
        ("metadata.jsonl", f'{{"file_name":"a.png","id":{2**64 - 1},"label":"x"}}\n'),
        ("metadata.jsonl", f'{{"file_name":"a.png","id":[{{"n":{HUGE}}}],"label":"x"}}\n'),
        ("metadata.jsonl", '{"file_name":"a.png","id":"\\ud800","label":"x"}\n'),
        ("metadata.jsonl", '{"file_name":"a.png","\\ud800":1,"label":"x"}\n'),
        ("metadata.jsonl", '{"file_name":"a.png","id":1,"id":2,"label":"x"}\n'),
        ("metadata.jsonl", '{"file_name":"a.png","o":{"label":1,"label":2},"label":"x"}\n'),
    ],
)
def test_folder__other_columns_are_no_reason_to_lose_labels(
    tmp_path: Path, name: str, text: str
) -> None:
    pictures(tmp_path, "a.png", "b.png")
    if name.endswith("l"):
        text += '{"file_name":"b.png","label":"y"}\n'
    (tmp_path / name).write_text(text)
    assert found(tmp_path) == found(tmp_path, "label") == (("x", "y"), [0, 1])


def test_folder__numbers_beside_text_are_text_of_any_length(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,label\na.png,{HUGE}\nb.png,cat\n")
    assert found(tmp_path) == ((HUGE, "cat"), [0, 1])


def test_folder__numbers_as_names_of_pictures_are_text(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text(" file_name,label\n1,x\n2,y\n")
    assert "2 pictures that are not there" in " ".join(open_source(str(tmp_path)).label_notes)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("metadata.csv", f"file_name,label\n\nb.png,1\na.png,{HUGE}\n", f"row 4.*label.*{HUGE}"),
        ("metadata.csv", f"file_name,label\na.png,-{2**63 + 1}\n", "row 2.*label.*beyond 64 bits"),
        ("metadata.csv", "file_name,label, label\na.png,x,y\n", "two columns called label"),
        ("metadata.csv", "file_name,file_name,label\na.png,b.png,y\n", "two columns called file_n"),
        ("metadata.jsonl", f'\n{{"file_name":"a.png","label":{HUGE}}}\n', f"line 2: .*{HUGE}"),
        ("metadata.jsonl", '{"file_name":1,"label":"x"}\n', "line 1: file_name is 1, which is no"),
        (
            "metadata.jsonl",
            '{"file_name":"a.png","label":"x"}\n{"file_name":["b.png"],"label":"x"}\n',
            r'line 2: file_name is \["b.png"\]',
        ),
        ("metadata.jsonl", '{"file_name":"\\ud800","label":"x"}\n', "line 1: .*not Unicode"),
        ("metadata.jsonl", '{"file_name":"a.png","label":"\\ud800"}\n', "line 1: .*not Unicode"),
        ("metadata.jsonl", '{"file_name":"a.png","label":1,"label":2}\n', "line 1 has label twice"),
        ("metadata.jsonl", "[" * 100_000, "line 1 is no JSON"),
    ],
)
def test_folder__what_is_wrong_in_a_table_is_told_with_its_row(
    tmp_path: Path, name: str, text: str, reason: str
) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name} .*{reason}") as caught:
        open_source(str(tmp_path), label="label")
    assert "\n" not in str(caught.value)
    source = open_source(str(tmp_path))
    assert source.labels() is None
    assert any(name in note for note in source.label_notes)


def test_folder__a_picture_has_one_label(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,x\na.png,y\n")
    with pytest.raises(DataError, match=r"gives a\.png two labels, x and y"):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), with_labels=False)) == 2
    with pytest.raises(DataError, match="no column 'kind'"):
        open_source(str(tmp_path), label="kind")


def planned(place: Path, label: str | None = None) -> tuple[tuple[str, ...], list[int | None]]:
    (plan,) = plan_ingest(str(place), label=label).values()
    rows = [row for unit in plan.units.to_pylist() for row in read_unit(unit, plan.layout)]
    rows.sort(key=lambda row: row.source)
    return plan.class_names, [row.label for row in rows]


def test_ingest__keeps_labels_and_names(tmp_path: Path) -> None:
    text = write(tmp_path / "text/a.parquet", label=["dog", "cat", None])
    assert planned(text) == (("cat", "dog"), [1, 0, None])
    several = write(tmp_path / "hf/a.parquet", HF, fine_label=[0, 2], coarse_label=[1, 1])
    assert planned(several, "coarse_label") == (("x", "y"), [1, 1])
    assert planned(several) == ((), [None, None])
    numbers = write(tmp_path / "ids/a.parquet", label=[977.0, 3.0, -1.0])
    assert planned(numbers) == ((), [977, 3, None]), "other programs know them by these numbers"
    pictures(tmp_path / "table", "a.png", "b.png")
    (tmp_path / "table/metadata.csv").write_text("file_name,label\nb.png,dog\n")
    assert planned(tmp_path / "table") == (("dog",), [None, 0])


def read_labels(place: Path) -> dict[str, tuple[tuple[str, ...], list[str | int | None]]]:
    """By split: the names of all classes, and of the pictures', sorted by source."""
    found = {}
    for split, plan in plan_ingest(str(place)).items():
        rows = [row for unit in plan.units.to_pylist() for row in read_unit(unit, plan.layout)]
        labels = [row.label for row in sorted(rows, key=lambda row: row.source)]
        names = dict(enumerate(plan.class_names))
        found[split] = plan.class_names, [names.get(n, n) for n in labels]  # type: ignore[arg-type]
    return found


def test_ingest__a_class_has_one_number_in_all_splits(tmp_path: Path) -> None:
    all_names = ("cat", "dog", "emu")
    pictures(
        tmp_path / "folder",
        *(f"{n}/1.png" for n in ("train/cat", "train/dog", "Test/dog", "Test/emu")),
    )
    expected = {"train": (all_names, ["cat", "dog"]), "test": (all_names, ["dog", "emu"])}
    assert read_labels(tmp_path / "folder") == expected
    for name, kind in (
        ("text", pa.string()),
        ("dictionary", pa.dictionary(pa.int32(), pa.string())),
    ):
        for split, labels in (("train", ["cat", "dog"]), ("test", ["dog", "emu"])):
            place = tmp_path / name / f"{split}-00000-of-00001.parquet"
            write(place, label=pa.array(labels).cast(kind))
        assert read_labels(tmp_path / name) == expected


def test_ingest__numbers_of_named_classes_become_those_of_all_splits(tmp_path: Path) -> None:
    def features(*names: str) -> dict[str, Any]:
        return {"label": {"_type": "ClassLabel", "names": list(names)}}

    place = tmp_path / "index"
    write(place / "train-00000-of-00001.parquet", features("dog", "cat"), label=[0, 1, None, 2])
    write(place / "test-00000-of-00001.parquet", features("emu", "dog"), label=[0, 1, -1])
    names = ("cat", "dog", "emu")
    assert read_labels(place) == {
        "train": (names, ["dog", "cat", None, 3]),  # beyond its names, as before
        "test": (names, ["emu", "dog", None]),
    }
    whole = tmp_path / "whole"
    write(whole / "train-00000-of-00001.parquet", features("dog", "emu", "cat"), label=[0, 2])
    write(whole / "test-00000-of-00001.parquet", features("cat", "dog"), label=[0, 1])
    names = ("dog", "emu", "cat")
    assert read_labels(whole) == {"train": (names, ["dog", "cat"]), "test": (names, ["cat", "dog"])}
    twice = write(tmp_path / "twice/a.parquet", features("a", "a"), label=[0, 1])
    assert planned(twice) == (("a", "a"), [0, 1]), "one split keeps its numbers"


def test_ingest__splits_without_labels_or_names_stay_so(tmp_path: Path) -> None:
    pictures(tmp_path / "some", "train/cat/1.png", "train/dog/1.png", "unlabeled/1.png")
    assert read_labels(tmp_path / "some") == {
        "train": (("cat", "dog"), ["cat", "dog"]),
        "unlabeled": ((), [None]),
    }
    for split, labels in (("train", [977, 3]), ("test", [3, 5])):
        write(tmp_path / f"numbers/{split}-00000-of-00001.parquet", label=labels)
    assert read_labels(tmp_path / "numbers") == {"train": ((), [977, 3]), "test": ((), [3, 5])}


@pytest.mark.parametrize("odd", ["\x0b", "\x85", "\u2028", "\r", "\x1c"])
def test_shards__names_of_classes_come_back_whatever_breaks_lines(tmp_path: Path, odd: str) -> None:
    names = (f"a{odd}b", "c")
    writer = ShardWriter(
        pafs.LocalFileSystem(), str(tmp_path), class_names=names, shard_bytes=1 << 20
    )
    writer.add(Row(image=b"x", sha256=b"y", label=1, width=1, height=1, source="s"))
    writer.close()
    schema = pq.read_schema(tmp_path / "shard-00000.parquet")
    assert choose_column(schema, None, ("image",), "x").classes.names == names


def test_ingest__refuses_a_class_whose_name_has_a_line_break(tmp_path: Path) -> None:
    place = write(tmp_path / "a/a.parquet", label=["a\nb", "c"])
    with pytest.raises(DataError, match=r"class 'a\\nb', whose name has a line break"):
        plan_ingest(str(place))
    pictures(tmp_path / "b", "train/a\nb/1.png", "train/c/1.png")
    with pytest.raises(DataError, match="line break"):
        plan_ingest(str(tmp_path / "b"))


def test_ingest__a_list_has_neither_column_nor_split(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b\u2028c.png")
    place = tmp_path / "list.txt"
    place.write_text("a.png\r\nb\u2028c.png\n")
    assert plan_ingest(str(place))[""].num_pictures == 2
    with pytest.raises(DataError, match="without a column 'x'"):
        plan_ingest(str(place), label="x")
    with pytest.raises(DataError, match="without a split 'val'"):
        plan_ingest(str(place), split="val")


def test_identities__are_the_same_before_and_after_ingest(tmp_path: Path) -> None:
    pictures(tmp_path / "folder", "cat/a.png", "dog/b.png")

    def sources(place: Path) -> list[str]:
        (plan,) = plan_ingest(str(place)).values()
        rows = [row for unit in plan.units.to_pylist() for row in read_unit(unit, plan.layout)]
        return sorted(row.source for row in rows)

    def identities(place: Path) -> list[str]:
        source: Source = open_source(str(place))
        return source.identities()

    bare = tmp_path / "bare/a.parquet"
    bare.parent.mkdir()
    pq.write_table(pa.table({"image": [picture(0), picture(1)]}), bare)
    named = write(tmp_path / "named/a.parquet", label=[0, 1])
    for place in (tmp_path / "folder", bare.parent, named):
        assert identities(place) == sources(place)
