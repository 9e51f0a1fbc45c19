"""What `mimray evaluate` refuses, and how results are laid side by side. No cluster is started."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mimray.service.cli.main import cli
from mimray.service.commands.compare import (
    comparison_text,
    table,
    with_differences,
    write_comparison,
)
from mimray.service.commands.evaluate import result_text
from mimray.service.commands.tasks import TASKS
from mimray.trainers.errors import ConfigError
from mimray.trainers.evaluation import tasks
from mimray.trainers.evaluation.tasks import checked_options, options_of, task_config
from mimray.trainers.evaluation.uncertainty import of_accuracy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "d"], "no bundle at nowhere"),
        (["a", "b", "--data", "d"], "several BUNDLEs go with --compare"),
        (["a"], "Missing option '--data'"),
        (["--data", "d"], "Missing argument 'BUNDLE…'"),
        (["a", "--data", "d", "--epochs", "3"], "--epochs: knn trains nothing"),
        (["a", "--data", "d", "--set", "temprature=3"], "did you mean 'temperature'?"),
        (["a", "--data", "d", "--set", "k=0"], "'k' is 0: input should be greater than 0"),
        (["a", "--data", "d", "--finetune"], "knn: unknown key 'finetune'"),
        (["a", "--data", "d", "--through", "http://x"], "knn needs the bundle at hand"),
        (
            ["a", "--task", "detection", "--data", "d", "--through", "http://x", "--finetune"],
            "an endpoint's encoder is frozen",
        ),
        (["untrained:vit_tiny", "--data", "d", "--image-size", "9"], "stride 16"),
        (
            [
                "a",
                "--task",
                "detection",
                "--data",
                "d",
                "--through",
                "http://x",
                "--image-size",
                "9",
            ],
            "no encoder is named by its architecture",
        ),
    ],
)
def test_evaluate__refuses_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["evaluate", *arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("task", TASKS)
def test_options__every_task_lists_its_own(task: str) -> None:
    result = CliRunner().invoke(cli, ["evaluate", "--task", task, "--options", "--json"])
    listed = json.loads(result.stdout)
    known = options_of(TASKS[task])
    assert [option["key"] for option in listed] == [option["key"] for option in known]
    assert task_config(TASKS[task], ()) is not None


RESULTS = [
    {"encoder": name, "task": "knn", "data": "d", "metric": "accuracy", "headline": value,
     "metrics": {"accuracy": value, "top5": value / 2, "per_class": {}}, "seconds": 3.0}
    for name, value in (("untrained:a", 0.25), ("a", 0.75))
]  # fmt: skip


def test_comparison__one_table_and_one_chart_best_first(tmp_path: Path) -> None:
    files = write_comparison(RESULTS, str(tmp_path))
    lines = Path(files["md"]).read_text().splitlines()
    assert lines[0] == "| encoder | accuracy | top5 | seconds |"
    assert lines[2:] == ["| a | 0.7500 | 0.3750 | 3 |", "| untrained:a | 0.2500 | 0.1250 | 3 |"]
    assert json.loads(Path(files["json"]).read_text()) == RESULTS
    chart = Image.open(files["png"]).convert("RGB")
    colours = {colour for _, colour in chart.getcolors(1 << 20) or []}
    assert (0x1F, 0x5F, 0xAE) in colours  # trained
    assert (0xA9, 0xB4, 0xC0) in colours  # untrained
    assert table(RESULTS).splitlines() == [
        "encoder      accuracy    top5  seconds",
        "a              0.7500  0.3750        3",
        "untrained:a    0.2500  0.1250        3",
    ]


def test_comparison__25_right_of_120_against_29_untrained_is_not_told_apart(
    tmp_path: Path,
) -> None:
    places = np.arange(120)
    results = []
    for name, right in (("a", places < 25), ("untrained:a", (places >= 15) & (places < 44))):
        evidence = of_accuracy(right, "v", places)
        results.append(
            {
                "encoder": name, "task": "knn", "data": "d", "metric": "accuracy",
                "headline": float(right.mean()), "standard_error": evidence.standard_error,
                "evidence": evidence.as_json(), "num_val": 120, "metrics": {}, "seconds": 3.0,
            }
        )  # fmt: skip
    files = write_comparison(with_differences(results), str(tmp_path))
    lines = Path(files["md"]).read_text().splitlines()
    said = "-0.0333 ± 0.0485, not told apart"
    assert (
        lines[0] == "| encoder | accuracy | pictures | less the best | less untrained | seconds |"
    )
    assert lines[2:] == [
        "| untrained:a | 0.2417 ± 0.0391 | 120 |  |  | 3 |",
        f"| a | 0.2083 ± 0.0371 | 120 | {said} | {said} | 3 |",
    ]
    found = json.loads(Path(files["json"]).read_text())
    assert found[0]["against_untrained"]["told_apart"] is False
    assert found[0]["against_untrained"]["paired"] is True
    assert found[1]["against_untrained"] is None
    other = {**results[0], "encoder": "b"}
    assert with_differences([*results, other])[2]["against_untrained"] is None  # not its own twin
    with_bars = Path(files["png"]).read_bytes()
    bare = [{**r, "standard_error": None} for r in results]
    assert Path(write_comparison(bare, str(tmp_path))["png"]).read_bytes() != with_bars


def test_checked_options__a_tree_is_as_good_as_a_command_line() -> None:
    assert checked_options(TASKS["knn"], {"k": 5}) == task_config(TASKS["knn"], ["k=5"])
    assert checked_options(TASKS["knn"], {}) == task_config(TASKS["knn"], ())
    with pytest.raises(ConfigError, match=r"unknown key 'neighbors'.*--task knn --options"):
        checked_options(TASKS["knn"], {"neighbors": 5})


def test_tasks__those_below_and_fine_tuning() -> None:
    assert set(TASKS) - set(tasks.TASKS) == {"finetune"}
    assert all(name == task.name for name, task in TASKS.items())


def test_texts__end_with_what_was_passed_over() -> None:
    told = "polygons of fewer than three points passed over: 2"
    results = [
        {**result, "num_val": 7, "folder": "out", "pictures": [], "notes": [told, f"of {place}"]}
        for place, result in enumerate(RESULTS)
    ]
    assert result_text(results[0]).splitlines()[-2:] == [f"note: {told}", "note: of 0"]
    text = comparison_text({"results": results, "files": {"png": "chart.png"}})
    assert text.splitlines()[-len(results) - 1 :] == [
        f"note: {told}",
        *(f"note: of {place}" for place in range(len(results))),
    ]
