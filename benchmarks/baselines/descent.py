"""AdamW on one edit until it is right, as the plain loops do it; and their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastedit.engine.profiling.timing import PhaseTimer
from fastedit.fitting.solver import FitOutcome, SolverConfig

IGNORED = -100

#: Gives the loss that is stepped, the NLL of the edit itself, and whether every target token is the argmax.
Evaluated = Callable[[], tuple[Tensor, Tensor, Callable[[], bool]]]


def descend(
    parameters: Sequence[nn.Parameter],
    config: SolverConfig,
    timer: PhaseTimer,
    evaluated: Evaluated,
    change_gradients: Callable[[], None] | None = None,
) -> FitOutcome:
    """Step parameters until the edit is right or all steps are taken.

    Args:
        parameters: changed in place. config: of the optimiser.
        timer: gets the phases "forward", "backward" and "optimiser".
        evaluated: one forward pass. change_gradients: called behind every backward pass.
    """
    optimiser = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    status, taken, value, nll = "max_steps", 0, float("nan"), float("nan")
    for _ in range(config.steps):
        with timer.phase("forward"):
            loss, edit_nll, is_right = evaluated()
            value, nll = float(loss.detach()), float(edit_nll.detach())
        if not torch.isfinite(loss.detach()):
            status = "diverged"
            break
        if config.stop_loss is not None and nll < config.stop_loss and is_right():
            status = "converged"
            break
        with timer.phase("backward"):
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            if change_gradients is not None:
                change_gradients()
        with timer.phase("optimiser"):
            if config.clip is not None:
                nn.utils.clip_grad_norm_(parameters, config.clip)
            optimiser.step()
            if config.radius is not None:
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.clamp_(-config.radius, config.radius)
        taken += 1
    return FitOutcome(status, taken, value, nll)


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over labelled positions of the negative log-likelihood, from logits (N, V) at all positions, () float32 up.

    As the stock models compute their loss: cross entropy over every position with the others ignored.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, labels, ignore_index=IGNORED)


def all_right(logits: Tensor, labels: Tensor) -> bool:
    """Whether every labelled position has its label as the largest logit."""
    marked = labels != IGNORED
    return bool((logits[marked].argmax(-1) == labels[marked]).all())
