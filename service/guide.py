"""When to choose which method, and what was published of each; what `mimray plan` alone prints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Choice:
    """What to take for a need.

    Attributes:
        recipe: the one to start from.
    """

    need: str
    method: str
    recipe: str
    why: str


@dataclass(frozen=True)
class Published:
    """Figures of a paper: ImageNet-1k top-1 in percent, unless said otherwise.

    Attributes:
        linear: a linear probe on frozen features.
        finetune: the whole encoder trained on.
        dense: ADE20K mIoU with UPerNet, COCO box AP.
    """

    method: str
    encoder: str
    finetune: str
    linear: str
    dense: str
    source: str


@dataclass(frozen=True)
class Correction:
    """A figure or recipe that circulates, and what the source says."""

    circulates: str
    right: str
    source: str


CHOICES = (
    Choice(
        "fine-tune the whole encoder",
        "mae",
        "mae-vit-b",
        "best after fine-tuning, one stage, and the cheapest step: the encoder sees a quarter",
    ),
    Choice(
        "detection or segmentation",
        "mae, or simmim with Swin",
        "mae-vit-b, simmim-swin-b",
        "both beat supervised starts; Swin has maps at strides 4 to 32 where a pyramid is wanted",
    ),
    Choice(
        "frozen features, a linear probe only",
        "maskfeat, then mae",
        "maskfeat-vit-b",
        "gradients as targets carry less colour and noise than pixels; still, methods that compare "
        "pictures (DINO about 80, MoCo v3 about 76) are ahead of all masked ones here",
    ),
    Choice(
        "a Swin backbone",
        "simmim",
        "simmim-swin-b",
        "windows need every token, so mask tokens go through the encoder; mae cannot",
    ),
    Choice(
        "the least compute",
        "mae",
        "mae-vit-b",
        "visible tokens only; a decoder of one block saves more (method.decoder_depth=1)",
    ),
    Choice(
        "the least to understand",
        "simmim",
        "simmim-vit-b",
        "mask tokens and one linear layer; every step costs the full sequence",
    ),
    Choice(
        "discrete tokens, for research or generation",
        "dvae, then beit",
        "dvae-vq-8192, beit-vit-b",
        "two stages, and the second is no better than the tokenizer; mae mostly replaces it",
    ),
    Choice(
        "compression, or a baseline",
        "ae, vae",
        "ae-conv-224, vae-conv-224",
        "whole pictures through a bottleneck; reconstruct well and classify poorly",
    ),
)

PUBLISHED = (
    Published(
        "mae", "ViT-B", "83.6", "68.0", "mIoU 48.1, box AP 50.3", "He et al. 2022, Tables 3 to 5"
    ),
    Published(
        "mae", "ViT-L", "85.9", "75.8", "mIoU 53.6, box AP 53.3", "He et al. 2022, Tables 3 to 5"
    ),
    Published("mae", "ViT-H", "86.9 (87.8 at 448)", "76.6", "", "He et al. 2022, Table 3"),
    Published(
        "mae", "ViT-B, 300 epochs", "83.1", "60.8", "", "reproduction in mmpretrain, configs/mae"
    ),
    Published("beit", "ViT-B", "83.2", "56.7", "", "Bao et al. 2022; linear as often quoted"),
    Published("beit", "ViT-L", "85.2", "", "", "Bao et al. 2022"),
    Published("simmim", "Swin-B", "84.0 (800 epochs)", "", "", "Xie et al. 2022; official repo"),
    Published("simmim", "Swin-L", "85.4", "", "", "Xie et al. 2022"),
    Published("simmim", "ViT-B", "83.8", "56.7", "", "Xie et al. 2022; linear as often quoted"),
    Published("maskfeat", "ViT-B", "84.0", "", "", "Wei et al. 2022"),
    Published("maskfeat", "ViT-L", "85.7", "", "", "Wei et al. 2022"),
    Published("ae, vae", "CNN", "", "50 to 65", "", "a range often quoted, of no single source"),
)

CORRECTIONS = (
    Correction(
        "MAE ViT-L: linear probe 68.0",
        "68.0 is ViT-B; ViT-L reaches 75.8 (85.9 after fine-tuning is ViT-L and right)",
        "He et al. 2022, Table 3",
    ),
    Correction(
        "MAE ViT-H: fine-tuning 87.8",
        "86.9 at 224 pixels; 87.8 at 448",
        "He et al. 2022, Table 3",
    ),
    Correction(
        "SimMIM hides 50 % of single patches and takes the squared error",
        "60 % in units of 32 pixels, absolute error; the other is simmim-vit-b-random50",
        "Xie et al. 2022, sec. 3 and 4.1",
    ),
    Correction(
        "MaskFeat is MAE with HOG targets: visible tokens, 75 %, a decoder of 8 blocks",
        "mask tokens through the encoder, block-wise 40 %, a linear head; the other is "
        "maskfeat-vit-b-mae",
        "Wei et al. 2022; SlowFast configs/masked_ssl",
    ),
    Correction(
        "BEiT hides 40 %",
        "at most 75 of 196 patches in blocks, 38.3 %; fewer where blocks do not fit",
        "Bao et al. 2022; unilm beit/run_beit_pretraining.py",
    ),
    Correction(
        "visible tokens at 15, 50, 75 and 90 % make the encoder 1, 2, 4 and 10 times faster",
        "an upper bound by token count of 1.2, 2, 4 and 10; measured in docs/methods.md",
        "benchmarks/mask_ratio.py",
    ),
)


def as_tree() -> dict[str, list[dict[str, Any]]]:
    """The guide for machines."""
    return {
        "choices": [asdict(choice) for choice in CHOICES],
        "published": [asdict(figure) for figure in PUBLISHED],
        "corrections": [asdict(correction) for correction in CORRECTIONS],
    }


def render() -> str:
    """The guide as text."""
    lines = ["Which method? By what you want to do with the encoder:", ""]
    for choice in CHOICES:
        lines += [
            f"  {choice.need}",
            f"    {choice.method}: {choice.why}",
            f"    start from {choice.recipe}",
        ]
    lines += ["", "Published, ImageNet-1k top-1 %:", ""]
    head = Published("method", "encoder", "fine-tuned", "linear", "dense", "source")
    rows = [tuple(asdict(row).values()) for row in (head, *PUBLISHED)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  " + "  ".join(cells).rstrip())
    lines += ["", "Circulating, and wrong:", ""]
    for correction in CORRECTIONS:
        lines += [
            f"  {correction.circulates}",
            f"    {correction.right} ({correction.source})",
        ]
    lines += ["", "`mimray plan RECIPE` says what one costs; `mimray recipes` lists them."]
    return "\n".join(lines)
