from __future__ import annotations

from pathlib import Path

from PIL import Image

from mimray.trainers.evaluation.score import Setting
from mimray.trainers.evaluation.splits import open_splits


def test_open_splits__finds_capitals_and_notes_what_was_passed_over_once(tmp_path: Path) -> None:
    for split in ("Training", "Testing"):
        for name, gray in (("a", 0), ("b", 255)):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), gray).save(tmp_path / split / name / "0.png")
    (tmp_path / "IMG.HEIC").write_bytes(b"a phone's")
    splits = open_splits(
        Setting(str(tmp_path), None, None, 0, False, "cpu", tmp_path, lambda *_: None)
    )
    assert "/Training/" in splits.train.name(0)
    assert "/Testing/" in splits.val.name(0)
    (note,) = splits.notes
    assert note.startswith(f"{tmp_path}: warning: 1 file passed over (.heic 1)")
