"""Going through samples until a budget is spent, and what is kept of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from duquant.config import LearningConfig

_LEAST_GAIN = 1e-4
"""A loss that is smaller by less than this share counts as no smaller."""


@dataclass(frozen=True)
class LearningReport:
    """How learning went. The loss is the mean over all samples, of the recipe's kind (see LearningConfig)."""

    loss_before: float
    loss_after: float
    epochs: int
    """Finished ones."""
    is_restored: bool
    """A loss was NaN or Inf; learning ended there, and the best values before it were kept."""


@runtime_checkable
class Learner(Protocol):
    """What is learned."""

    def values(self) -> list[Tensor]:
        """Return a copy of everything that is learned."""

    def restore(self, values: Sequence[Tensor]) -> None:
        """Take back what `values` returned."""


def keep_best(
    learner: Learner, total: Callable[[], float], epoch: Callable[[], float], config: LearningConfig
) -> LearningReport:
    """Run epochs until the budget is spent, the loss stays, or it is not finite; leave the best values, or the start.

    Args:
        learner: what is learned.
        total: returns the loss over all samples.
        epoch: goes through the samples once; returns the loss over all of them after it, or NaN if one was not finite.
        config: the budget.
    """
    before = best = total()
    kept, finished, stale = learner.values(), 0, 0
    is_finite = math.isfinite(before)
    while is_finite and finished < config.epochs and stale < config.patience:
        loss = epoch()
        is_finite = math.isfinite(loss)
        if not is_finite:
            break
        finished += 1
        if loss < best * (1 - _LEAST_GAIN):
            best, kept, stale = loss, learner.values(), 0
        else:
            stale += 1
    learner.restore(kept)
    return LearningReport(before, best, finished, is_restored=not is_finite)
