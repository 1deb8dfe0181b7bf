"""What an artifact must be worth."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from duquant.config.calibration import TextSource
from duquant.config.checks import STRICT_FIELDS, check_range
from duquant.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityGate:
    """What an artifact must be worth: a job of the service measures it before it may succeed, and fails otherwise.

    It decides whether there is an artifact and nothing about its bytes, so it is not part of the recipe's digest.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    max_perplexity_increase: float | None = None
    """Most that perplexity may rise: the artifact's divided by that of the unquantized model on the same text, minus
    one; 0.5 is 50 percent."""
    # A mapping has no hash; equal gates still have equal ones.
    min_accuracy: float | dict[str, float] | None = field(default=None, hash=False)
    """Least accuracy, 0 to 1: of every task, or of each task by its name."""
    text: TextSource = field(default_factory=lambda: TextSource(part="evaluation"))
    """The text that perplexity is measured on; left out, the held-out half of the built-in one."""
    seq_len: int = 2048
    """Tokens in a window."""
    windows: int | None = 16
    """Windows to measure on; null takes the whole text."""
    tasks: tuple[str, ...] = ()
    """Tasks that accuracy is measured on: lm-eval's names, or task files."""
    task_limit: int | None = None
    """Only so many questions of each task, from the start; null takes all."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if self.max_perplexity_increase is None and self.min_accuracy is None:
            raise ConfigError(
                "quality_gate checks nothing: give max_perplexity_increase or min_accuracy", field="quality_gate"
            )
        if self.max_perplexity_increase is not None:
            check_range("quality_gate", "max_perplexity_increase", self.max_perplexity_increase, 0.0, 1000.0)
        if self.text.kind in ("random", "self"):
            raise ConfigError(f"a {self.text.kind} source has no text to measure on", field="quality_gate.text.kind")
        check_range("quality_gate", "seq_len", self.seq_len, 8, 131072)
        if self.windows is not None:
            check_range("quality_gate", "windows", self.windows, 1, 1_000_000)
        if self.task_limit is not None:
            check_range("quality_gate", "task_limit", self.task_limit, 1, 10_000_000)
        self._check_tasks()

    def _check_tasks(self) -> None:
        if not all(self.tasks) or len(set(self.tasks)) < len(self.tasks) or len(self.tasks) > 64:
            raise ConfigError("quality_gate.tasks must be at most 64 different names", field="quality_gate.tasks")
        if self.tasks and self.min_accuracy is None:
            raise ConfigError(
                "quality_gate.tasks are measured for min_accuracy, which is not given",
                field="quality_gate.min_accuracy",
            )
        if self.min_accuracy is not None and not self.tasks:
            raise ConfigError(
                "quality_gate.min_accuracy needs quality_gate.tasks to measure", field="quality_gate.min_accuracy"
            )
        for task, least in self.least_accuracies.items():
            if task not in self.tasks:
                measured = ", ".join(self.tasks)
                raise ConfigError(
                    f"quality_gate.min_accuracy names {task!r}, which is not measured; tasks has: {measured}",
                    field="quality_gate.min_accuracy",
                )
            check_range("quality_gate", "min_accuracy", least, 0.0, 1.0)

    @property
    def least_accuracies(self) -> dict[str, float]:
        """The least accuracy by task; tasks that are measured for the record only are left out."""
        if isinstance(self.min_accuracy, Mapping):
            return dict(self.min_accuracy)
        return {} if self.min_accuracy is None else dict.fromkeys(self.tasks, self.min_accuracy)
