"""Quality gates: what an artifact must be worth before its job may succeed, checked against what was measured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from duquant.config import QualityGate
from workers.measure import task_part

_ACCURACIES = ("acc", "exact_match", "acc_norm")
"""Scores that are a share of right answers, the first that a task has counts."""


@dataclass(frozen=True)
class Check:
    """One limit of a gate, and what was measured."""

    check: str
    limit: str
    value: float | None
    """None where a task has no accuracy: it cannot have enough of it."""
    passed: bool
    words: str
    """What is said where it is missed."""

    def to_dict(self) -> dict[str, Any]:
        """Return what the job's result and the manifest say of it."""
        return {name: value for name, value in asdict(self).items() if name != "words"}


def check(
    gate: QualityGate,
    metrics: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    baseline: Mapping[str, Any] | None,
) -> list[Check]:
    """Compare what was measured with every limit of a gate.

    Args:
        gate: The limits.
        metrics: Of the artifact.
        parts: How its parts went, with the names that the scores of a task have in `metrics`.
        baseline: Metrics of the unquantized model, where the gate compares perplexities.
    """
    checks = []
    if gate.max_perplexity_increase is not None:
        assert baseline is not None
        checks.append(_perplexity(gate.max_perplexity_increase, metrics["perplexity"], baseline["perplexity"]))
    for task, least in gate.least_accuracies.items():
        checks.append(_accuracy(task, least, metrics["tasks"], parts[task_part(task)].get("names", ())))
    return checks


def _perplexity(limit: float, measured: float, baseline: float) -> Check:
    increase = measured / baseline - 1
    return Check(
        check="perplexity increase",
        limit=f"at most {limit:.1%}",
        value=increase,
        passed=increase <= limit,
        words=f"perplexity rose by {increase:.1%}, from {baseline:.4f} to {measured:.4f}; the most is {limit:.1%}",
    )


def _accuracy(task: str, least: float, tasks: Mapping[str, Mapping[str, Any]], names: Any) -> Check:
    # A task of a file has the name that the file gives it; a group has its members beside it.
    name = task if task in tasks else next(iter(names), task)
    scores = tasks.get(name, {})
    score = next((score for score in _ACCURACIES if score in scores), None)
    value = None if score is None else float(scores[score])
    missed = None if value is None else f"{score} of {task} is {value:.1%}; the least is {least:.1%}"
    return Check(
        check=f"{score or 'accuracy'} of {task}",
        limit=f"at least {least:.1%}",
        value=value,
        passed=value is not None and value >= least,
        words=missed or f"{task} has no accuracy",
    )
