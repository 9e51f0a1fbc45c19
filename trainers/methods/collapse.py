"""Collapse of methods that learn from their own teacher: its figures, and the end of the run.

The loss of such a method does not show it: a teacher that says the same of every picture is easily
predicted. It does so in two ways. Either one prototype is assigned to everything, which the entropy
of the mean assignment shows; or everything is assigned to all prototypes alike, which that entropy
does not show, but the spread of the teacher's outputs does.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mimray.trainers.config.method import CollapseGuard
from mimray.trainers.errors import CollapseError
from mimray.trainers.models.codebook import Fp32Buffers


class CollapseWatch(Fp32Buffers):
    """Sums of a teacher's assignments and outputs over a step, and the steps that look collapsed.

    Args:
        config: the method's configuration, with the bounds.
        num_prototypes: number of prototypes K.
        width: width of the outputs D.
        cures: the cures that an error names, in a few words.

    Attributes:
        low_steps: float [2], steps in a row below the bounds of entropy and standard deviation.

    Sources: entropy of the mean assignment: Assran et al. 2022 (MSN), sec. 3, who maximise it;
    standard deviation of normalised outputs: Chen & He 2021 (SimSiam), sec. 4.1.
    """

    assigned: Tensor
    num_assigned: Tensor
    sums: Tensor
    squares: Tensor
    num_outputs: Tensor
    low_steps: Tensor

    def __init__(self, config: CollapseGuard, num_prototypes: int, width: int, cures: str) -> None:
        super().__init__()
        self.config, self.cures = config, cures
        for name, shape in {
            "assigned": (num_prototypes,),
            "num_assigned": (),
            "sums": (width,),
            "squares": (width,),
            "num_outputs": (),
        }.items():
            self.register_buffer(name, torch.zeros(shape), persistent=False)
        self.register_buffer("low_steps", torch.zeros(2))

    @torch.no_grad()
    def add(self, assignments: Float[Tensor, "*B K"], outputs: Float[Tensor, "*C D"]) -> None:
        """Add a micro batch of this rank.

        Args:
            assignments: shares of the prototypes, of any number of vectors; rows sum to one.
            outputs: the teacher's vectors of pictures or views, not yet normalised.
        """
        shares = assignments.float().flatten(0, -2)  # M K
        directions = F.normalize(outputs.float(), dim=-1).flatten(0, -2)  # M D
        self.assigned += shares.sum(dim=0)
        self.num_assigned += len(shares)
        self.sums += directions.sum(dim=0)
        self.squares += directions.square().sum(dim=0)
        self.num_outputs += len(directions)

    @torch.no_grad()
    def settle(self, step: int) -> dict[str, float]:
        """Figures of a step over all ranks and micro batches; collective, the same on every rank.

        Args:
            step: updates made, this one included.

        Returns:
            `assignment_entropy`, that of the mean assignment in nats, and `…_share`, over log K;
            `output_std`, the standard deviation of the normalised outputs, mean over features, and
            `…_share`, over that of random directions.

        Raises:
            CollapseError: a figure has been below its bound for `collapse_steps` updates.
        """
        own = [self.assigned, self.num_assigned, self.sums, self.squares, self.num_outputs]
        totals = torch.cat([total.flatten() for total in own])
        if dist.is_initialized():
            dist.all_reduce(totals)
        parts = torch.split(totals, [total.numel() for total in own])
        assigned, num_assigned, sums, squares, num_outputs = parts
        entropy = float(torch.special.entr(assigned / num_assigned).sum())
        variance = squares / num_outputs - (sums / num_outputs).square()  # D
        std = float(variance.clamp_min(0).sqrt().mean())
        figures = {
            "assignment_entropy": entropy,
            "assignment_entropy_share": entropy / math.log(len(assigned)),
            "output_std": std,
            "output_std_share": std * math.sqrt(len(sums)),
        }
        for total in own:
            total.zero_()
        self._check(step, figures)
        return figures

    def _check(self, step: int, figures: dict[str, float]) -> None:
        config = self.config
        bounds = {
            "assignment_entropy_share": (
                "min_entropy_share",
                "one prototype stands for most",
            ),
            "output_std_share": ("min_std_share", "the teacher's outputs are nearly all alike"),
        }
        for number, (figure, (key, meaning)) in enumerate(bounds.items()):
            bound = getattr(config, key)
            low = figures[figure] < bound
            self.low_steps[number] = self.low_steps[number] + 1 if low else 0
            if self.low_steps[number] >= config.collapse_steps:
                error = CollapseError(
                    f"step {step}: collapsed, as {meaning}: {figure} is {figures[figure]:.3g} and "
                    f"has been below method.{key} {bound:g} for {config.collapse_steps} steps",
                    hint=f"start over with --fresh and {self.cures}",
                )
                error.on_every_rank = True
                raise error
