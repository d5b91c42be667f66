"""What both stages of training share: optimisers, checkpoints, a progress bar, a log."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

log = logging.getLogger(__name__)


class Optimizers:
    """Muon for matrices and convolutions (as matrices), AdamW for the rest, one schedule for both;
    AdamW for all without `matrix_lr`, where the processor has no bf16.

    The learning rate warms up over 2 % of the steps and falls linearly to nothing.
    """

    def __init__(
        self, model: nn.Module, steps: int, *, matrix_lr: float | None, other_lr: float
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters()]
        is_matrix = {
            n: matrix_lr is not None
            and p.ndim >= 2
            and "embedding" not in n
            and min(p.flatten(1).shape) > 8
            for n, p in named
        }
        self.sources = [p for n, p in named if is_matrix[n]]
        self.views = [nn.Parameter(p.detach().view(p.shape[0], -1)) for p in self.sources]
        others = [p for n, p in named if not is_matrix[n]]
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.99), weight_decay=0.0)
        ]
        self.base = [other_lr]
        if matrix_lr is not None:
            muon = torch.optim.Muon(
                self.views, lr=matrix_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
            )
            self.all, self.base = [muon, *self.all], [matrix_lr, *self.base]
        self.steps = steps

    def step(self, index: int) -> None:
        warm = min(1.0, (index + 1) / max(1, self.steps // 50))
        fraction = warm * (1.0 - index / self.steps)
        for source, view in zip(self.sources, self.views, strict=True):
            view.grad = None if source.grad is None else source.grad.view(view.shape)
        for optimizer, lr in zip(self.all, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * fraction
            optimizer.step()
        for parameter in self.sources:
            parameter.grad = None
        self.all[-1].zero_grad()

    def state(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.all]

    def restore(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def save_state(path: Path, model: nn.Module, optimizers: Optimizers, index: int) -> None:
    """Replace the checkpoint at once, never half."""
    partial = path.with_suffix(".partial")
    torch.save(
        {"model": model.state_dict(), "optimizers": optimizers.state(), "index": index}, partial
    )
    partial.replace(path)


def load_state(path: Path, model: nn.Module, optimizers: Optimizers) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.restore(state["optimizers"])
    log.info("going on from step %d", state["index"])
    return state["index"]


def progress(start: int, steps: int) -> Iterator[int]:
    from tqdm import tqdm

    yield from tqdm(range(start, steps), initial=start, total=steps, mininterval=5)


def record(path: Path, **values: float) -> None:
    """Append one JSON line to the stage's log."""
    line = json.dumps({k: round(v, 4) for k, v in values.items()})
    log.info(line)
    with path.open("a") as file:
        file.write(line + "\n")
