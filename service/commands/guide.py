"""When to choose which method: by need, what was published, and what circulates wrongly.

The rows are for `mimray plan` and for the documentation alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

HE = "He et al. 2022 (MAE)"
XIE = "Xie et al. 2022 (SimMIM)"
WEI = "Wei et al. 2022 (MaskFeat)"
BAO = "Bao et al. 2022 (BEiT)"
MAE_CODE = "github.com/facebookresearch/mae"
SIMMIM_CODE = "github.com/microsoft/SimMIM"


class Choice(NamedTuple):
    """A need, and what serves it.

    Attributes:
        need: what the encoder is for.
        method: what to choose.
        why: in a sentence or two.
        start: the recipe to start from.
    """

    need: str
    method: str
    why: str
    start: str


class Profile(NamedTuple):
    """What a method is, as in its paper's recipe.

    Attributes:
        sees: which tokens the encoder computes; of all, the hidden ones are mask tokens.
    """

    method: str
    predicts: str
    hides: str
    sees: str
    predictor: str
    encoders: str


class Figure(NamedTuple):
    """Published results of one model; ImageNet-1k top-1 in percent.

    Attributes:
        dense: COCO box AP with Mask R-CNN, ADE20K mIoU with UPerNet.
        source: where the figures are from; `recalled` where they were not read again.
    """

    method: str
    model: str
    fine_tuned: str
    linear: str
    dense: str
    source: str


class Correction(NamedTuple):
    """A figure that circulates, and the right one."""

    said: str
    right: str
    source: str


CHOICES = (
    Choice(
        "Fine-tune the whole encoder on labels",
        "mae",
        "The best scores from ViT-L upwards, from one stage of training and the least compute "
        "an epoch; it wants long training (800 to 1600 epochs). At ViT-B maskfeat and simmim "
        "score a little higher for twice the FLOPs a picture.",
        "mae-vit-b",
    ),
    Choice(
        "Detection and segmentation",
        "mae, or simmim with a Swin",
        "Rebuilding what is hidden keeps local detail, and both beat supervised pre-training. "
        "A Swin gives feature maps at four strides without more ado; a ViT gives one.",
        "mae-vit-b, simmim-swin-b",
    ),
    Choice(
        "A frozen encoder: linear probe, kNN, search",
        "mae, as large as can be",
        "Masked modelling is weak here: 68 % by linear probe for a ViT-B, where self-distillation "
        "(DINO) has 78 %, which mimray does not train. Size helps (mae ViT-H 76.6 %), and any "
        "fine-tuning more.",
        "mae-vit-l",
    ),
    Choice(
        "A Swin, or another encoder with windows",
        "simmim",
        "Windows need every token, so mae cannot leave the hidden ones out; simmim puts a mask "
        "token in their place. maskfeat and beit do so too.",
        "simmim-swin-b",
    ),
    Choice(
        "The least compute and memory",
        "mae",
        "The encoder sees a quarter of the tokens. With the decoder, a ViT-B costs 58 GFLOPs a "
        "picture to train where simmim and maskfeat cost 106, a ViT-L 124 to their 371.",
        "mae-vit-b, mae-tiny",
    ),
    Choice(
        "The least machinery, to read or to change",
        "simmim",
        "One linear layer behind the encoder, pixels as targets, no decoder, no tokenizer.",
        "simmim-vit-b",
    ),
    Choice(
        "Discrete codes: research, or a vocabulary for later",
        "dvae, then beit",
        "Two stages: a tokenizer, then an encoder that predicts its codes. For accuracy alone "
        "mae does as well in one.",
        "dvae-vq-8192, beit-vit-b",
    ),
    Choice(
        "A baseline, compression, or samples",
        "ae, vae",
        "Nothing is hidden, so pixels can be copied and the features stay low-level; good for "
        "showing what masking adds.",
        "ae-conv-224, vae-conv-224",
    ),
)

PROFILES = (
    Profile("ae, vae", "pixels", "nothing", "all", "convolutions", "any"),
    Profile("dvae", "pixels", "nothing", "all", "convolutions", "any"),
    Profile("beit", "codes (dvae)", "38 % in blocks", "all", "linear", "vit, swin"),
    Profile("mae", "pixels", "75 % at random", "visible", "8 blocks", "vit"),
    Profile("simmim", "pixels", "60 % in 32 px", "all", "linear", "vit, swin"),
    Profile("maskfeat", "HOG", "40 % in blocks", "all", "linear", "vit, swin"),
)

FIGURES = (
    Figure("beit", "ViT-B", "83.2", "56.7", "49.8 AP, 47.1 mIoU",
           f"{BAO}, Tables 1 and 9; dense: {HE}, Tables 4 and 5 (linear and dense recalled)"),
    Figure("beit", "ViT-L", "85.2", "-", "53.3 AP, 53.3 mIoU",
           f"{BAO}, Table 1; dense: {HE}, Tables 4 and 5 (recalled)"),
    Figure("mae", "ViT-B", "83.6", "68.0", "50.3 AP, 48.1 mIoU",
           f"{HE}; released weights 67.8 linear ({MAE_CODE})"),
    Figure("mae", "ViT-L", "85.9", "75.8", "53.3 AP, 53.6 mIoU",
           f"{HE}; released weights 76.0 linear ({MAE_CODE})"),
    Figure("mae", "ViT-H", "86.9", "76.6", "-",
           f"{HE}; 87.8 at 448 px; released weights 77.2 linear ({MAE_CODE})"),
    Figure("simmim", "ViT-B", "83.8", "56.7", "-",
           f"{SIMMIM_CODE}; linear: {XIE}, Table 6 (recalled)"),
    Figure("simmim", "Swin-B", "84.0", "-", "50.4 AP",
           f"{SIMMIM_CODE}; AP after 36 epochs: github.com/Alpha-VL/FastConvMAE"),
    Figure("simmim", "Swin-L", "85.4", "-", "-", SIMMIM_CODE),
    Figure("maskfeat", "ViT-B", "84.0", "68.5", "-",
           f"{WEI}; linear: github.com/mx-mark/DMJD"),
    Figure("maskfeat", "ViT-L", "85.7", "-", "-", WEI),
)  # fmt: skip

CORRECTIONS = (
    Correction(
        "MAE ViT-L reaches 68.0 % by linear probe, ViT-H 75.0 %",
        "68.0 is ViT-B; ViT-L 75.8, ViT-H 76.6",
        HE,
    ),
    Correction("MAE ViT-H reaches 87.8 %", "at 448 px; 86.9 at 224", f"{HE}, Table 3"),
    Correction(
        "MAE beats BEiT by 2.7 points (85.9 to 83.2)",
        "that is ViT-L against ViT-B; 0.4 at ViT-B, 0.7 at ViT-L",
        f"{HE}, Table 3",
    ),
    Correction(
        "SimMIM hides half of all single patches, squared error",
        "60 % of 32 px units, absolute error; the other is simmim-vit-b-random50",
        f"{XIE}, sec. 4; {SIMMIM_CODE}",
    ),
    Correction(
        "SimMIM Swin-B: 83.8 % fine-tuned, 56.7 % linear",
        "those are ViT-B; Swin-B 84.0 fine-tuned",
        SIMMIM_CODE,
    ),
    Correction(
        "MaskFeat has MAE's encoder and decoder and hides 75 %",
        "40 % in blocks, mask tokens through the encoder, one linear layer; the other is "
        "maskfeat-vit-b-mae",
        f"{WEI}; github.com/facebookresearch/SlowFast",
    ),
    Correction(
        "MaskFeat reaches 71.4 % by linear probe",
        "no source found; 68.5 for ViT-B after 1600 epochs",
        "github.com/mx-mark/DMJD",
    ),
    Correction(
        "15, 50, 75, 90 % hidden: 48, 62, 68, 52 % linear, 82, 84, 86, 83 % fine-tuned",
        "no source found; at 75 % 73.5 linear and 84.9 fine-tuned (ViT-L, 800 epochs), the "
        "latter nearly flat from 40 to 80 %",
        f"{HE}, Table 1 and Figure 5",
    ),
    Correction(
        "15, 50, 75, 90 % hidden: the encoder is 1, 2, 4, 10 times as fast",
        "tokens allow 1.2, 2.0, 3.9 and 9.9 over the full sequence (ViT-B at 224); the decoder, "
        "which sees all, takes its share of that",
        "token counts; benchmarks/mask_ratio.py measures it",
    ),
    Correction(
        "ViT-L: COCO 51.3 to 53.3 AP, ADE20K 47.4 to 48.1 mIoU over supervised",
        "49.3 to 53.3 AP and 49.9 to 53.6 mIoU; 47.4 and 48.1 are ViT-B",
        f"{HE}, Tables 4 and 5",
    ),
)


def as_rows() -> dict[str, list[dict[str, Any]]]:
    """The whole guide as plain rows, by section."""
    return {
        "choices": [row._asdict() for row in CHOICES],
        "profiles": [row._asdict() for row in PROFILES],
        "figures": [row._asdict() for row in FIGURES],
        "corrections": [row._asdict() for row in CORRECTIONS],
    }


def render() -> RenderableType:
    """The guide for people."""
    return Group(
        "Which method for what. `mimray plan RECIPE` counts what one costs.\n",
        *(_listed(choice) for choice in CHOICES),
        _table("Side by side", PROFILES, Profile._fields),
        _table(
            "Published: ImageNet-1k top-1 %, COCO box AP, ADE20K mIoU",
            [figure[:-1] for figure in FIGURES],
            Figure._fields[:-1],
        ),
        _grid([(f"{f.method} {f.model}", f.source) for f in FIGURES]),
        "\nWhat circulates wrongly\n",
        *(_listed(correction) for correction in CORRECTIONS),
    )


def _listed(row: Choice | Correction) -> Table:
    """A row as lines, a field each, and an empty one."""
    return _grid([*row._asdict().items(), ("", "")])


def _grid(pairs: Sequence[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for name, text in pairs:
        grid.add_row(name, text)
    return grid


def _table(title: str, rows: Sequence[tuple[str, ...]], fields: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for field in fields:
        table.add_column(field.replace("_", " "))
    for row in rows:
        table.add_row(*row)
    return table
