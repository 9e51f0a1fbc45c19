from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mimray.service.cli.main import cli
from mimray.service.commands import guide
from mimray.trainers.config.catalogue import METHODS
from mimray.trainers.config.recipes import load_recipe, shipped_recipes
from mimray.trainers.cost.step import shape_of, trace

FAST = ["--set", "engine.micro_batch_size=2", "--set", "optim.batch_size=64"]


def plan(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(70):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_plan__says_what_it_counted() -> None:
    result = CliRunner().invoke(cli, ["plan", "mae-vit-b", "--workers", "8"])
    assert result.exit_code == 0, (result.output, result.exception)
    said = " ".join(result.stdout.split())
    for part in (
        "1,281,167 pictures assumed, as in ImageNet-1k",
        "500,455 steps, 2,049,863,680 pictures (1600 epochs)",
        "global batch 4096 = micro batch 64 x accumulation 8 x workers 8",
        "encoder 50 a picture, 204,800 a step; decoder 197, 806,912 a step",
        "encoder 85.80 M 8.64",
        "forward and backward 58.5",
        "a multiply-add counts as 2",
        "GiB of a GPU: bf16, micro batch 64, 8 workers",
        "with engine.activation_checkpointing",
        "125 40 % 267 h 33 h 2,134",
    ):
        assert part in said
    assert "warning" not in said


def test_plan__takes_length_and_size_from_data(pictures: Path) -> None:
    epochs = ["--set", "optim.epochs=16", "--set", "optim.warmup_epochs=1"]
    found = plan("mae-tiny", "--data", str(pictures), *epochs)
    assert found["data"] == {"uri": str(pictures), "num_samples": 70, "assumed": False}
    assert found["run"]["steps"] == 17  # 16 x 70 / 64
    assert found["run"]["epochs"] == pytest.approx(17 * 64 / 70)
    assert "updates" in found["warnings"][0]


def test_plan__time_is_flops_over_speed() -> None:
    found = plan("mae-tiny", *FAST, "--workers", "4", "--tflops", "2.5", "--steps", "1000")
    (row,) = found["time"]
    seconds = found["training_flops"]["plain"] * 64_000 / 2.5e12
    assert row["device_hours"] == pytest.approx(seconds / 3600)
    assert row["hours"] == pytest.approx(seconds / 3600 / 4)
    assert row["images_per_s_a_device"] == pytest.approx(64_000 / seconds)


def test_plan__of_the_recipe_as_it_is_set() -> None:
    sets = ["engine.zero_stage=3", "engine.activation_checkpointing=true", "engine.precision=fp16"]
    found = plan("mae-tiny", *FAST, *(x for s in sets for x in ("--set", s)))
    chosen = [row for row in found["memory"] if row["chosen"]]
    assert [(row["zero_stage"], row["activation_checkpointing"]) for row in chosen] == [(3, True)]
    assert found["precision"] == "fp16"
    assert any("bf16" in warning for warning in found["warnings"])
    flops = found["training_flops"]["checkpointed"]
    assert found["time"][0]["images_per_s_a_device"] == pytest.approx(31.2e12 / flops)


def test_plan__of_a_cpu_has_no_speed_to_offer_and_no_empty_bucket() -> None:
    gpu, cpu = (plan("mae-tiny", *FAST, "--set", f"resources.device={d}") for d in ("gpu", "cpu"))
    assert cpu["time"] == []
    assert len(gpu["time"]) == 3
    trained = gpu["memory"][0]["gradients"]
    assert [m["memory"][1]["communication"] for m in (gpu, cpu)] == [500_000_000 * 4, trained]
    assert "reduce_bucket_size" in gpu["notes"][0]


def test_plan__counts_the_bucket_as_it_is_set() -> None:
    raw = "engine.deepspeed={zero_optimization: {reduce_bucket_size: 1000, overlap_comm: true}}"
    found = plan("mae-tiny", *FAST, "--set", raw)
    assert found["memory"][1]["communication"] == 1000 * 4
    (note,) = found["notes"]
    assert "zero_optimization.overlap_comm; its effect on memory is not counted" in note


def test_plan__of_a_share_that_is_decoded_says_what_that_saves() -> None:
    found = plan("mae-cross-tiny", *FAST)
    sets = ("decoder=self", "decode_ratio=1.0", "encoder_layers=[]")
    full = plan("mae-cross-tiny", *FAST, *(x for s in sets for x in ("--set", f"method.{s}")))

    costs = [f["training_flops"]["plain"] for f in (full, found)]
    memory = [f["memory"][0]["activations"] for f in (full, found)]
    assert found["notes"][0] == (
        f"{costs[1] / 1e9:.3g} GFLOPs a picture, forward and backward, and "
        f"{memory[1] / 2**20:,.0f} MiB of activations, in place of {costs[0] / 1e9:.3g} and "
        f"{memory[0] / 2**20:,.0f} with {' '.join(f'method.{s}' for s in sets)}: "
        f"{costs[0] / costs[1]:.2f} and {memory[0] / memory[1]:.2f} times as much"
    )
    assert costs[0] > costs[1]
    assert memory[0] > memory[1]
    assert (full["tokens"]["decoder"], found["tokens"]["decoder"]) == (65, 16)
    assert not any("in place of" in note for note in full["notes"])


def test_plan__without_its_tokenizer_says_so() -> None:
    found = plan("beit-tiny", *FAST, "--set", "method.tokenizer=nowhere")
    assert "there is no tokenizer at nowhere yet" in found["notes"][0]
    assert "tokenizer" not in [part["name"] for part in found["parts"]]


def test_plan__refuses_as_pretrain_does(pictures: Path) -> None:
    for arguments, wanted in (
        (["mae-vit-b", "--workers", "3"], "cannot be split over 3 workers"),
        (["mae-vit-b", "--data", str(pictures)], "fewer than one global batch of 4096"),
        (["mae-tiny", "--set", "method.mask_ratio=0.999"], "leaves no visible patch of 64"),
        (["mae-tine"], "unknown recipe 'mae-tine'"),
    ):
        result = CliRunner().invoke(cli, ["plan", *arguments])
        assert result.exit_code == 2, result.output
        assert wanted in result.stderr
        assert result.stdout == ""


def test_plan__says_whose_key_it_is() -> None:
    for arguments, wanted in (
        (["mae-vit-b", "--set", "method.bundle=x"],
         "'method.bundle' is no key of method mae, only of finetune"),
        (["mae-vit-b", "--set", "method.beta=1"],
         "'method.beta' is no key of method mae, only of vae and dvae"),
        (["mae-tiny", "--set", "encoder.window_size=7"],
         "'encoder.window_size' is no key of encoder vit, only of swin, swin_tiny, swin_small"),
        (["mae-vit-b", "--set", "method.mask_ratios=x"], "did you mean 'method.mask_ratio'?"),
        (["mae-vit-b", "--set", "method.bundles=x"], "unknown key 'method.bundles' ("),
        (["mae-vit-b", "--set", "method.patch_size=8"], "did you mean 'encoder.patch_size'?"),
    ):  # fmt: skip
        result = CliRunner().invoke(cli, ["plan", *arguments])
        assert result.exit_code == 2, result.output
        assert wanted in " ".join(result.stderr.split())


@pytest.mark.parametrize("size", [64, 50])
@pytest.mark.parametrize(
    ("recipe", "encoder", "wanted"),
    [
        ("mae-tiny", "swin_tiny", "which the windows of swin_tiny cannot do without"),
        ("simmim-tiny", "conv", "hides tokens, which encoder conv does not have"),
    ],
)
def test_plan__names_the_cause_before_the_size(
    recipe: str, encoder: str, wanted: str, size: int
) -> None:
    widths = ["--set", "encoder.widths=[8, 8]"] if encoder == "conv" else []
    arguments = ["--set", f"encoder.name={encoder}", "--set", f"data.image_size={size}", *widths]

    result = CliRunner().invoke(cli, ["plan", recipe, *arguments])

    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert wanted in said
    assert "window_size" not in said
    assert "divide" not in said


def test_plan__warns_of_a_batch_that_is_too_small_for_the_codebook() -> None:
    found = plan("dvae-tiny", "--set", "method.codebook_size=2048")
    assert any("encodings a code" in warning for warning in found["warnings"])


def test_pretrain__gives_the_same_advice(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt  # before any worker starts

    monkeypatch.setattr("mimray.trainers.launch.finished", stop)
    arguments = ["mae-tiny", "--data", str(pictures), "--storage", str(tmp_path / "runs")]
    result = CliRunner().invoke(cli, ["pretrain", *arguments, "--set", "optim.base_lr=1e-5"])
    assert "global batch 64 = micro batch 64 x accumulation 1 x workers 1" in result.stderr
    assert "warning: the peak learning rate is 2.5e-06" in result.stderr


# The guide


def test_guide__prints_without_a_name() -> None:
    result = CliRunner().invoke(cli, ["plan"])
    assert result.exit_code == 0, (result.output, result.exception)
    for part in ("Detection and segmentation", "simmim-swin-b", "What circulates wrongly", "83.6"):
        assert part in result.stdout


def test_guide__tells_frozen_from_trained_end_to_end() -> None:
    (row,) = (row for row in guide.read_guide()["choices"] if "Detection" in row["need"])
    assert "Trained end to end, both beat supervised pre-training" in row["why"]
    assert "Frozen, they do not" in row["why"]


def test_guide__rows_are_for_machines_too() -> None:
    rows = json.loads(CliRunner().invoke(cli, ["plan", "--json"]).stdout)
    assert rows == guide.read_guide()
    figures = {(row["method"], row["model"]): row for row in rows["figures"]}
    assert figures["mae", "ViT-B"]["linear"] == "68.0"
    assert figures["mae", "ViT-L"]["linear"] == "75.8"
    assert all(row["source"] for row in rows["figures"] + rows["corrections"])


def measured_as(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]]) -> None:
    """Put figures in the place of those that were measured."""
    read, found = guide._read, {"conditions": "ten minutes each", "rows": rows}
    monkeypatch.setattr(guide, "_read", lambda name: found if "measured" in name else read(name))


def test_guide__speaks_from_measured_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"method": "mae", "linear": "35.2", "knn": "23.0", "fine_tuned": "-"},
        {"method": "ibot", "linear": "9.5", "knn": "24.0", "fine_tuned": "-"},
    ]
    measured_as(monkeypatch, rows)
    found = {choice["need"]: choice for choice in guide.read_guide()["choices"]}
    (frozen,) = (choice for need, choice in found.items() if need.startswith("A frozen encoder"))
    assert frozen["measured"] == "knn: ibot 24.0, mae 23.0; linear: mae 35.2, ibot 9.5"
    assert "measured" not in found["Fine-tune the whole encoder on labels"]
    shown = CliRunner().invoke(cli, ["plan"]).stdout
    assert "ten minutes each" in shown
    assert "knn: ibot 24.0, mae 23.0" in shown


def test_guide__says_nothing_of_figures_that_there_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, [])
    assert "easured with" not in CliRunner().invoke(cli, ["plan"]).stdout
    assert all("measured" not in choice for choice in guide.read_guide()["choices"])


def test_guide__starts_from_recipes_that_exist_and_knows_every_method() -> None:
    shipped = shipped_recipes()
    for choice in guide.read_guide()["choices"]:
        for name in choice["start"].split(", "):
            assert name in shipped
    named = {name for row in guide.read_guide()["profiles"] for name in row["method"].split(", ")}
    assert named == set(METHODS) - {"finetune"}  # which pre-trains nothing


def test_guide__quotes_flops_that_still_hold() -> None:
    (choice,) = (row for row in guide.read_guide()["choices"] if "compute" in row["need"])
    for quoted, name, overrides in (
        ("58 GFLOPs", "mae-vit-b", ()),
        ("maskfeat cost 106", "maskfeat-vit-b", ()),
        ("ViT-L 124", "mae-vit-l", ()),
        ("their 371", "maskfeat-vit-b", ("encoder.name=vit_large",)),
    ):
        method = shape_of(load_recipe(name, overrides), torch.bfloat16, {})
        step = trace(method, 2, checkpointing=False, on_gpu=True)
        number = float(next(word for word in quoted.split() if word.isdigit()))
        assert quoted in choice["why"]
        assert step.training_flops / 1e9 == pytest.approx(number, abs=1)
