from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mimray.trainers.data.account import Account
from mimray.trainers.data.discover import available_splits, class_folders, discover
from mimray.trainers.data.files import list_files
from mimray.trainers.data.splits import preferred_validation, split_of_shard, split_role
from mimray.trainers.errors import DataError, EmptyDatasetError


def tree(root: Path, *paths: str) -> str:
    """Files that are listed, never decoded."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return str(root)


def counts(account: Account) -> dict[str, dict[str, int]]:
    return {entry["reason"]: entry["kinds"] for entry in account.to_json()}


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Training", "train"),
        ("TRAIN", "train"),
        ("train2017", "train"),
        ("training_set", "train"),
        ("Valid", "val"),
        ("eval", "val"),
        ("Dev", "val"),
        ("Testing", "test"),
        ("test_images", "test"),
        ("Unlabelled", "unlabeled"),
        ("split=train", "train"),
        ("trains", None),
        ("trainer", None),
        ("testament", None),
        ("valley", None),
    ],
)
def test_split_role__whatever_case_and_ending(name: str, role: str | None) -> None:
    assert split_role(name) == role


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("train_full-00000-of-00001.parquet", "train_full"),
        ("train/part-00000-of-00001.parquet", "train"),
        ("Test/data/shard-00000-of-00001-ab12.parquet", "Test"),
        ("test/train_full-00000-of-00001.parquet", "test"),
        ("train/test-00000-of-00001.parquet", "test"),
        ("data/part-00000-of-00001.parquet", "part"),
        ("train.parquet", "train"),
        ("Train.parquet", "train"),
        ("cifar10-test.parquet", "test"),
        ("validation_0.parquet", "validation"),
        ("Test/part-0.parquet", "Test"),
        ("part-0.parquet", None),
        ("contest.parquet", None),
    ],
)
def test_split_of_shard__by_name_or_folder(path: str, split: str | None) -> None:
    assert split_of_shard(path) == split


def test_preferred_validation__before_test_whatever_case() -> None:
    assert preferred_validation(["Testing", "Training", "Valid"]) == "Valid"
    assert preferred_validation(["Testing", "Training"]) == "Testing"
    assert preferred_validation(["eval", "val"]) == "val"
    assert preferred_validation(["Training"]) is None


def test_splits__capital_folders_are_no_classes(tmp_path: Path) -> None:
    uri = tree(tmp_path, "Training/a/0.jpg", "Training/b/1.jpg", "Testing/a/2.jpg")
    found = discover(uri)
    assert [file.path for file in found.files] == ["a/0.jpg", "b/1.jpg"]
    assert class_folders(found.files)[0] == ("a", "b")
    assert counts(found.account) == {"other_split": {"Testing": 1}}
    assert [file.path for file in discover(uri, "test").files] == ["a/2.jpg"]
    assert available_splits(uri) == ("Testing", "Training")


def test_splits__unlabeled_pictures_are_a_split(tmp_path: Path) -> None:
    uri = tree(tmp_path, "train/a/0.jpg", "test/a/1.jpg", "unlabeled/x/2.jpg", "unlabeled/x/3.jpg")
    found = discover(uri)
    assert len(found.files) == 1
    assert counts(found.account) == {"other_split": {"test": 1, "unlabeled": 2}}


def test_splits__what_lies_beside_them_is_counted(tmp_path: Path) -> None:
    uri = tree(tmp_path, "Train/0.jpg", "Val/1.jpg", "samples/2.jpg", "3.jpg")
    found = discover(uri)
    assert [file.path for file in found.files] == ["0.jpg"]
    assert counts(found.account)["beside_splits"] == {"samples": 1, "no folder": 1}
    assert "warning: 2 files passed over" in "\n".join(found.account.lines())


def test_splits__inside_of_an_archives_folder(tmp_path: Path) -> None:
    uri = tree(tmp_path, "archive/Data/train/a/0.jpg", "archive/Data/test/a/1.jpg")
    found = discover(uri)
    assert found.root == f"{uri}/archive/Data/train"
    assert [file.path for file in found.files] == ["a/0.jpg"]


@pytest.mark.parametrize(
    "paths",
    [
        ("cats/0.jpg", "dogs/1.jpg", "test/2.jpg"),
        ("cats/0.jpg", "Validation/1.jpg"),
        ("train/0.jpg", "more/1.jpg"),
        ("0.jpg", "Test/1.jpg"),
    ],
)
def test_splits__unclear_ones_are_the_users_choice(tmp_path: Path, paths: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"called like splits \(.*give one of them"):
        discover(tree(tmp_path, *paths))


def test_splits__two_to_train_on_are_the_users_choice(tmp_path: Path) -> None:
    uri = tree(tmp_path, "train/0.jpg", "Training/1.jpg")
    with pytest.raises(DataError, match="several are to train on: Training, train"):
        discover(uri)
    assert len(discover(uri, "train").files) == 1


def test_splits__datasets_side_by_side_are_no_classes(tmp_path: Path) -> None:
    uri = tree(tmp_path, *(f"{d}/{s}/a/0.jpg" for d in ("full", "mini") for s in ("Train", "Val")))
    with pytest.raises(DataError, match="splits of their own: full, mini"):
        discover(uri)


def test_classes__one_called_train_is_said(tmp_path: Path) -> None:
    found = discover(tree(tmp_path, "bus/0.jpg", "car/1.jpg", "train/2.jpg"))
    assert class_folders(found.files)[0] == ("bus", "car", "train")
    assert counts(found.account) == {"split_as_class": {"train": 1}}


def test_list_files__a_leading_underscore_hides_no_picture(tmp_path: Path) -> None:
    uri = tree(
        tmp_path,
        *("_MG_1000.JPG", "_DSC/_DSC1.jpg", "IMG.jpg", "_SUCCESS", "_temporary/0/a.jpg"),
        *("._IMG.jpg", ".git/a.jpg", ".git/b.jpg", "@eaDir/IMG.jpg/thumb.jpg", "__MACOSX/a.jpg"),
    )
    account = Account()
    paths = [file.path for file in list_files(uri, account)]
    assert paths == ["IMG.jpg", "_DSC/_DSC1.jpg", "_MG_1000.JPG"]
    assert account.total("hidden") == 6  # a hidden folder once, whatever lies in it


def test_list_files__each_folder_once_under_its_own_name(tmp_path: Path) -> None:
    uri = tree(tmp_path / "set", "cats/0.jpg", "dogs/deep/1.jpg")
    tree(tmp_path / "far", "2.jpg")
    for link, target in {
        "current": tmp_path / "set",
        "aa": tmp_path / "set/cats",  # before `cats` by name
        "dogs/up": tmp_path,
        "birds": tmp_path / "far",
        "birds2": tmp_path / "far",
    }.items():
        (tmp_path / "set" / link).symlink_to(target)
    (tmp_path / "set/dead.jpg").symlink_to(tmp_path / "nothing")
    account = Account()
    paths = [file.path for file in list_files(uri, account)]
    assert paths == ["birds/2.jpg", "cats/0.jpg", "dogs/deep/1.jpg"]
    found = counts(account)
    assert set(found["entered_before"]) == {"current", "aa", "birds2", "dogs/up/far", "dogs/up/set"}
    assert found["dead_link"] == {"dead.jpg": 1}


def test_list_files__links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "store", "a/0.jpg", "1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a").symlink_to(tmp_path / "store/a")
    (tmp_path / "set/1.jpg").symlink_to(tmp_path / "store/1.jpg")
    assert [f.path for f in list_files(str(tmp_path / "set"))] == ["1.jpg", "a/0.jpg"]


def test_list_files__a_name_that_is_not_utf8_is_passed_over_by_name(tmp_path: Path) -> None:
    uri = tree(tmp_path, "ok.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcnchen.jpg")).write_bytes(b"x")
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/K\xf6ln"))
    tree(bad, "a.jpg")
    account = Account()
    assert [file.path for file in list_files(uri, account)] == ["ok.jpg"]
    assert counts(account)["name_not_utf8"] == {r"M\xfcnchen.jpg": 1, r"K\xf6ln": 1}
    with pytest.raises(DataError, match=r"K\\xf6ln.* is not UTF-8"):
        list_files(str(bad))


def test_list_files__sockets_and_pipes_are_no_files(tmp_path: Path) -> None:
    uri = tree(tmp_path, "ok.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    account = Account()
    assert [file.path for file in list_files(uri, account)] == ["ok.jpg"]
    assert counts(account) == {"special_file": {"pipe.jpg": 1}}


def test_list_files__a_bucket_hides_the_same(tmp_path: Path) -> None:
    tree(tmp_path, "_MG_1.jpg", ".git/a", ".git/b", "sub/_temporary/c", "sub/0.jpg")
    account = Account()
    files = list_files(f"fsspec+file://{tmp_path}", account)
    assert [file.path for file in files] == ["_MG_1.jpg", "sub/0.jpg"]
    assert counts(account) == {"hidden": {".git": 1, "_temporary": 1}}


def test_formats__pictures_that_cannot_be_read_are_a_warning(tmp_path: Path) -> None:
    uri = tree(tmp_path, "0.jpg", "1.HEIC", "2.heic", "3.NEF", "notes.txt", "README")
    account = discover(uri).account
    assert counts(account) == {
        "unreadable_format": {".heic": 2, ".nef": 1},
        "not_a_picture": {".txt": 1, "no suffix": 1},
    }
    assert "warning: 3 files passed over (.heic 2, .nef 1)" in account.lines()[-1]


def test_formats__nothing_else_there_says_what_is(tmp_path: Path) -> None:
    with pytest.raises(EmptyDatasetError, match=r"3 files passed over \(\.heic 3\).*convert"):
        discover(tree(tmp_path, *(f"{i}.heic" for i in range(3))))


def parquet(root: Path, *paths: str) -> str:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"x"]}), root / path)
    return str(root)


@pytest.mark.parametrize(
    "layout",
    [
        "{}/train-00000-of-00001.parquet",
        "{}/train/0000.parquet",  # as the Hub converts repositories
        "{}/data/train-00000-of-00001.parquet",
        "{}/train.parquet",
    ],
)
def test_configurations__folders_are_not_added_up(tmp_path: Path, layout: str) -> None:
    uri = parquet(tmp_path, layout.format("full"), layout.format("mini"))
    with pytest.raises(DataError, match="configurations of a dataset: full.*, mini") as caught:
        discover(uri)
    assert f"{uri}/full" in str(caught.value.hint)
    assert len(discover(f"{uri}/mini").files) == 1


def test_configurations__the_card_names_them(tmp_path: Path) -> None:
    uri = parquet(tmp_path, "data/a_0.parquet", "data/b_0.parquet", "more/c_0.parquet")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: red\n  default: true\n  data_files: data/a_*.parquet\n"
        "- config_name: blue\n  data_files:\n  - split: train\n    path: [data/b_*]\n"
        "- config_name: green\n  data_dir: more\n---\n# Colours\n"
    )
    with pytest.raises(DataError, match="configurations of a dataset: red, blue, green") as caught:
        discover(uri)
    assert caught.value.hint == f"give one of them: {uri}/more"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("configs:", "date: 2024-13-45\nconfigs:"),
        lambda text: text.replace("configs:", "size: !!int many\nconfigs:"),
        lambda text: text.replace("configs:", "license: ~\nconfigs:"),
        lambda text: text.replace("---\n", "--- \n"),
        lambda text: text.replace("data_files: big", "data_dir: null\n  data_files: big"),
    ],
)
def test_configurations__a_card_is_read_as_people_write_it(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    uri = parquet(tmp_path, "big.parquet", "small.parquet")
    card = (
        "---\nconfigs:\n- config_name: big\n  data_files: big.parquet\n"
        "- config_name: small\n  data_files: small.parquet\n---\n# Title\n---\nText\n"
    )
    (tmp_path / "README.md").write_bytes(change(card).encode())
    with pytest.raises(DataError, match="configurations of a dataset: big, small"):
        discover(uri)


def test_configurations__a_card_of_one_and_a_damaged_one_are_no_reason(tmp_path: Path) -> None:
    uri = parquet(tmp_path, "data/train-00000-of-00001.parquet")
    for text in ("---\nconfigs:\n- config_name: a\n  data_files: data/*\n---\n", "---\n: [\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert len(discover(uri).files) == 1


def test_parquet__folders_read_as_one_are_said(tmp_path: Path) -> None:
    found = discover(parquet(tmp_path, "day1/part-0.parquet", "day2/part-0.parquet"))
    assert len(found.files) == 2
    assert counts(found.account) == {"folders_merged": {"day1": 1, "day2": 1}}


def test_parquet__splits_by_file_name_are_not_added_up(tmp_path: Path) -> None:
    uri = parquet(tmp_path, "train.parquet", "test.parquet")
    tree(tmp_path, "a.jpg", "b.heic")
    found = discover(uri)
    assert [file.path for file in found.files] == ["train.parquet"]
    assert counts(found.account) == {
        "other_split": {"test": 1},
        "beside_parquet": {".jpg": 1, ".heic": 1},
    }
