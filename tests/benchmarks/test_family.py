"""The driver of `benchmarks/family.py`, with commands that only write down what they were asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

SPEEDS = {"mae-tiny": 200.0, "simmim-tiny": 100.0, "dvae-tiny": 50.0, "beit-tiny": 25.0}


class Commands:
    """Stands in for `mimray`: trainings have the speeds above, scores count up."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.slower, self.broken = 1.0, ""

    def __call__(self, *arguments: str) -> dict[str, Any]:
        from measuring import CommandFailedError

        self.asked.append(arguments)
        options = dict(zip(arguments, arguments[1:], strict=False))
        if self.broken and self.broken in arguments:
            raise CommandFailedError("exit 1")
        if arguments[0] == "plan":
            return {"training_flops": {"plain": 1e9}}
        if arguments[0] == "evaluate":
            value = len(self.asked) / 1000
            found = {"metric": "accuracy", "headline": value, "standard_error": 0.01}
            return {**found, "num_val": 10, "metrics": {"AP50": 0.5}}
        if arguments[0] == "pretrain":
            self._train(arguments[1], Path(options["--storage"]) / options["--name"], options)
        return {}

    def _train(self, recipe: str, run: Path, options: dict[str, str]) -> None:
        steps, speed = int(options["--steps"]), SPEEDS[recipe] / self.slower
        run.mkdir(parents=True, exist_ok=True)
        lines = [
            {"step": s, "samples": 64 * s, "images_per_s": speed, "probe_knn_accuracy": s / steps}
            for s in range(5, steps + 1, 5)
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (run / "plan.json").write_text(json.dumps({"recipe": {"method": {"mask_ratio": 0.75}}}))

    def lengths(self) -> dict[str, int]:
        """Steps by run, of trainings that are none for a speed."""
        found = {}
        for arguments in self.asked:
            options = dict(zip(arguments, arguments[1:], strict=False))
            if arguments[0] == "pretrain" and not options["--storage"].endswith("speed"):
                found[options["--name"]] = int(options["--steps"])
        return found


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import family
    import measuring

    fake = Commands()
    monkeypatch.setattr(measuring, "mimray", fake)
    monkeypatch.setattr(family, "mimray", fake)
    monkeypatch.setattr(family, "has_command", lambda name: False)
    monkeypatch.setattr(family, "chart", lambda found, out: None)  # a second each
    return fake


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data/tiny-imagenet-50"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"label": [0, 1, 2, 3, 4, 0]}), folder / "train.parquet")
    return tmp_path / "data"


def family_main(
    monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *arguments: str
) -> dict[str, Any]:
    """The benchmark's command; returns the figures that it keeps."""
    import family

    monkeypatch.setattr(sys, "argv", ["family.py", str(data), str(out), *arguments])
    family.main()
    found: dict[str, Any] = json.loads((out / "family.json").read_text())
    return found


def test_methods__get_as_much_time_each(
    commands: Commands, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    found = family_main(
        monkeypatch, data, out, "--minutes", "40", "--only", "mae,simmim,beit,untrained",
        "--guide", str(tmp_path / "guide.yaml"),
    )  # fmt: skip
    # 40 minutes at 200, 100 and 25 pictures a second; of BEiT's a quarter is the tokenizer's.
    assert commands.lengths() == {
        "mae": 2400 * 200 // 64,
        "simmim": 2400 * 100 // 64,
        "beit-dvae": round(600 * 50 / 64),
        "beit": round(1800 * 25 / 64),
    }
    beit = found["runs"]["beit"]
    assert beit["pflop"] == pytest.approx(64e-6 * (round(600 * 50 / 64) + round(1800 * 25 / 64)))
    # All speeds are measured before anything is trained for long.
    order = [options[1] for options in commands.asked if options[0] == "pretrain"]
    speed = ["mae-tiny", "dvae-tiny", "simmim-tiny", "beit-tiny"]
    assert order[:8] == [*speed, *reversed(speed)]
    assert set(found["scores"]) == {"mae", "simmim", "beit", "untrained"}
    assert all(len(scores) == 6 for scores in found["scores"].values())
    text = (out / "family.md").read_text()
    assert "| linear probe, % |" in text
    from family_tables import chart

    chart(found, out)
    assert (out / "family.png").stat().st_size > 1000
    rows = yaml.safe_load((tmp_path / "guide.yaml").read_text())["rows"]
    assert [row["detection"] for row in rows] == ["50.0"] * 4
    assert all(float(row["knn"]) > 0 for row in rows)


def test_same_command__goes_on_and_repeats_no_score(
    commands: Commands, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    commands.broken = "dense-knn"
    with pytest.raises(SystemExit, match="mae: exit 1"):
        family_main(monkeypatch, data, out, "--only", "mae,simmim")
    assert len(commands.lengths()) == 2  # what fails keeps no other from its turn
    commands.broken = ""
    before = len(commands.asked)
    found = family_main(monkeypatch, data, out, "--only", "mae,simmim")
    again = commands.asked[before:]
    assert not [a for a in again if any("speed" in word for word in a)]
    assert len([a for a in again if a[0] == "evaluate"]) == 6  # three of each
    assert all(len(scores) == 6 for scores in found["scores"].values())
    with pytest.raises(SystemExit, match="was begun with"):
        family_main(monkeypatch, data, out, "--only", "mae", "--minutes", "3")
    with pytest.raises(SystemExit):
        family_main(monkeypatch, data, out, "--only", "maee")


def test_a_method_that_fails__keeps_no_other_from_its_turn(
    commands: Commands, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.broken = "simmim-tiny"
    with pytest.raises(SystemExit, match="simmim: exit 1"):
        family_main(monkeypatch, data, tmp_path / "out", "--only", "simmim,mae")
    assert set(commands.lengths()) == {"mae"}
    commands.broken = "mae-tiny"
    with pytest.raises(SystemExit, match="mae, which others are held against"):
        family_main(monkeypatch, data, tmp_path / "other", "--only", "simmim")


def test_later_speeds__are_put_right_by_maes(
    commands: Commands, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_main(monkeypatch, data, tmp_path / "out", "--only", "mae")
    commands.slower = 2.0
    found = family_main(monkeypatch, data, tmp_path / "out", "--only", "simmim")
    assert found["speeds"]["mae"]["images_per_s"] == 200
    assert found["speeds"]["simmim"]["images_per_s"] == 100
    assert found["speeds"]["simmim"]["measured"] == [50, 50]


def test_adaptation__is_paired_by_seed(
    commands: Commands, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    found = family_main(monkeypatch, data, out, "--only", "adapt", "--minutes", "1")
    assert pq.read_table(out / "half/train.parquet")["label"].to_pylist() == [0, 1, 0]
    assert [(one["on"], one["seed"]) for one in found["adapted"]] == [
        (target, seed) for target in ("camvid", "bccd") for seed in range(3)
    ]
    starts = {name for name in commands.lengths() if name.startswith("start")}
    assert starts == {"start-0", "start-1", "start-2"}
    assert "mae --init" in (out / "family.md").read_text()
    before = len(commands.asked)
    family_main(monkeypatch, data, out, "--only", "adapt", "--minutes", "1")
    assert not [a for a in commands.asked[before:] if a[0] == "evaluate"]


def test_paired_text__is_students_interval(commands: Commands) -> None:
    from family_tables import paired_text

    # Of scipy 1.17: ttest_1samp([0.01, 0.03, 0.026], 0).confidence_interval(0.95).
    assert paired_text([0.01, 0.03, 0.026]) == "+0.0220 (-0.0043 to +0.0483; 3 seeds)"
    assert paired_text([0.5]) == "+0.5000 (one seed)"


def test_recipes__take_what_the_benchmark_sets(commands: Commands) -> None:
    from family import TOKENIZER, available

    from mimray.trainers.config.recipes import load_recipe

    for member in (*available().values(), TOKENIZER):
        words = member.arguments(Path("pictures"), Path("needed"))
        sets = [value for key, value in zip(words, words[1:], strict=False) if key == "--set"]
        recipe = load_recipe(member.recipe, sets)
        assert recipe.data.image_size == (64, 64)
        if not member.own_encoder:
            assert (recipe.encoder.out_width, recipe.encoder.num_layers) == (192, 6)
