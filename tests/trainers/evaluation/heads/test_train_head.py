from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mimray.trainers.config.evaluation.head import HeadConfig
from mimray.trainers.errors import NonFiniteLossError
from mimray.trainers.evaluation.heads.train_head import train_head

CONFIG = HeadConfig(epochs=4, batch_size=4, lr=0.05, warmup_epochs=1)
X = torch.randn(14, 5, generator=torch.Generator().manual_seed(1))
Y = X @ torch.arange(5.0)


def _head() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def _run(folder: Path, head: nn.Module, **changes: Any) -> list[dict[str, float]]:
    def losses_of(batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        error = head(x)[:, 0] - y
        return {"squared": error.square().mean(), "small": 0.1 * error.abs().mean()}

    given: dict[str, Any] = {
        "num_examples": len(X),
        "make_batch": lambda epoch, indices: (X[indices], Y[indices]),
        "losses_of": losses_of,
        "config": CONFIG,
        "seed": 0,
        "folder": folder,
        "identity": "one",
        "progress": lambda phase, done, total: None,
    }
    return train_head(head, None, **(given | changes))


def _stop_at(step: int) -> Callable[[str, int, int], None]:
    def progress(phase: str, done: int, total: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("step", [2, 7, 12])
def test_train_head__interrupted_repeats_an_undisturbed_run_bit_for_bit(
    tmp_path: Path, step: int
) -> None:
    whole, broken = _head(), _head()
    rows = _run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "broken", broken, progress=_stop_at(step))
    torch.rand(3)  # the global generator is elsewhere by then
    continued = _head()
    seen: list[int] = []
    again = _run(
        tmp_path / "broken", continued, progress=lambda phase, done, total: seen.append(done)
    )
    assert again == rows
    assert len(rows) == 4
    assert seen[0] == (step - 1) // 3 * 3 + 1, "goes on from the last whole epoch"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, continued.state_dict()[name]), name


def test_train_head__learns_and_leaves_the_head_ready(tmp_path: Path) -> None:
    head = _head()
    rows = _run(tmp_path, head, config=CONFIG.model_copy(update={"epochs": 30}))
    assert rows[-1]["squared"] < 0.2 * rows[0]["squared"]
    assert not head.training
    assert [row["epoch"] for row in rows] == list(range(1, 31))
    assert rows[0]["lr"] == pytest.approx(0.05), "the warm-up's last step"
    # 3 steps an epoch, 90 in all, 3 of warm-up: the rate of the last step.
    assert rows[-1]["lr"] == pytest.approx(0.05 * 0.5 * (1 + np.cos(np.pi * (89 - 3) / 87)))


def test_train_head__a_state_of_something_else_is_not_continued(tmp_path: Path) -> None:
    fresh = _run(tmp_path / "fresh", _head(), seed=1)
    _run(tmp_path / "used", _head(), identity="other")
    assert _run(tmp_path / "used", _head(), seed=1) == fresh


def test_train_head__the_seed_alone_decides(tmp_path: Path) -> None:
    torch.manual_seed(5)
    one = _run(tmp_path / "a", _head())
    torch.manual_seed(6)
    assert _run(tmp_path / "b", _head()) == one
    assert _run(tmp_path / "c", _head(), seed=2) != one


def test_train_head__many_threads_add_up_alike_each_time(tmp_path: Path) -> None:
    """The backward pass of indexing adds to one row from several threads."""
    rows = torch.randint(8, (8192,), generator=torch.Generator().manual_seed(0))

    def train(place: int) -> Tensor:
        table = nn.Embedding.from_pretrained(torch.ones(8, 64), freeze=False)
        weights = torch.randn(8192, 64, generator=torch.Generator().manual_seed(1))
        _run(
            tmp_path / str(place),
            table,
            losses_of=lambda _: {"loss": (table.weight[rows] * weights).sum().square()},
        )
        return table.weight.detach()

    first, *others = [train(place) for place in range(8)]
    assert all(torch.equal(first, other) for other in others)
    assert not torch.are_deterministic_algorithms_enabled()


def test_train_head__the_encoder_learns_at_its_own_rate_and_biases_do_not_decay(
    tmp_path: Path,
) -> None:
    """With gradients of zero AdamW moves weights by -lr x decay x weight alone."""
    head, encoder = nn.Linear(5, 1), nn.Linear(5, 5)
    before = [p.detach().clone() for p in (*head.parameters(), *encoder.parameters())]
    config = CONFIG.model_copy(
        update={"epochs": 1, "warmup_epochs": 0, "batch_size": 14, "weight_decay": 0.5}
    )
    train_head(
        head,
        encoder,
        num_examples=14,
        make_batch=lambda epoch, indices: X[indices],
        losses_of=lambda x: {"loss": 0 * head(encoder(x)).sum()},
        config=config,
        seed=0,
        folder=tmp_path,
        identity="",
        progress=lambda phase, done, total: None,
    )
    after = [p.detach() for p in (*head.parameters(), *encoder.parameters())]
    decayed = [1 - 0.05 * 0.5, 1.0, 1 - 0.05 * config.encoder_lr_scale * 0.5, 1.0]
    for old, new, factor in zip(before, after, decayed, strict=True):
        torch.testing.assert_close(new, old * factor)


def test_train_head__a_loss_that_is_not_finite_ends_it_and_changes_nothing(tmp_path: Path) -> None:
    head = _head()
    before = {name: value.clone() for name, value in head.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="step 1: .*'a': nan"):
        _run(tmp_path, head, losses_of=lambda batch: {"a": head(batch[0]).sum() * float("nan")})
    for name, value in head.named_parameters():
        assert torch.equal(value, before[name])
