"""Evaluation plans: what to measure on a model. No torch here.

As recipes: the same classes are the REST schema and the command line's input, every field is keyword-only, and an
unknown field is an error that names it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Literal

from duquant.config import STRICT_FIELDS, TextSource, check_choice, check_range, from_plain
from duquant.errors import ConfigError

TASK_FILE_SUFFIXES = (".yaml", ".yml", ".jsonl")
"""A task's name that ends in one of these is a file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityConfig:
    """Perplexity over consecutive windows from the start of a text."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    text: TextSource = field(default_factory=lambda: TextSource(part="evaluation"))
    """The text; left out, the held-out half of the built-in one."""
    seq_len: int = 2048
    """Tokens in a window."""
    windows: int | None = 16
    """Windows to measure on; null takes the whole text."""

    def __post_init__(self) -> None:
        if self.text.kind in ("random", "self"):
            raise ConfigError(f"a {self.text.kind} source has no text to measure on", field="perplexity.text.kind")
        check_range("perplexity", "seq_len", self.seq_len, 8, 131072)
        if self.windows is not None:
            check_range("perplexity", "windows", self.windows, 1, 1_000_000)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """One zero-shot or few-shot task of lm-eval."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    kind: Literal["hub", "file"] = "hub"
    """hub: a task that comes with lm-eval, whose questions are on the Hugging Face hub; file: a task on disk."""
    name: str
    """The task's name (piqa), or a task file's path: YAML in lm-eval's format, or JSONL with the fields of PIQA."""
    num_fewshot: int | None = None
    """Solved examples before each question; null is what the task says, 0 in most."""
    limit: int | None = None
    """Only so many questions, from the start; null takes all."""

    def __post_init__(self) -> None:
        check_choice("task", "kind", self.kind, ("hub", "file"))
        if not self.name or len(self.name) > 1000:
            raise ConfigError("task.name must have 1 to 1000 characters", field="task.name")
        is_file = self.name.endswith(TASK_FILE_SUFFIXES)
        if self.kind == "file" and not is_file:
            wanted = ", ".join(TASK_FILE_SUFFIXES)
            raise ConfigError(f"task.name is {self.name!r}; a task file ends in one of: {wanted}", field="task.name")
        if self.kind == "hub" and (is_file or "/" in self.name):
            raise ConfigError(f"task.name is {self.name!r}, a file; its task.kind is 'file'", field="task.name")
        if self.num_fewshot is not None:
            check_range("task", "num_fewshot", self.num_fewshot, 0, 100)
        if self.limit is not None:
            check_range("task", "limit", self.limit, 1, 10_000_000)

    @classmethod
    def named(cls, name: str, *, num_fewshot: int | None = None, limit: int | None = None) -> "TaskConfig":
        """Return the task that a name on a command line means: a file where it ends like one, else one of lm-eval's."""
        kind: Literal["hub", "file"] = "file" if name.endswith(TASK_FILE_SUFFIXES) else "hub"
        return cls(kind=kind, name=name, num_fewshot=num_fewshot, limit=limit)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedConfig:
    """The kernel benchmark: a layer and the whole model beside bfloat16, no transform, Hadamard and DuQuant."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    prefill_tokens: int = 2048
    """Tokens of the one sequence that is prefilled."""
    decode_batches: tuple[int, ...] = (1, 16, 64)
    """Sequences that are decoded together."""
    context: int = 512
    """Tokens in the KV cache while decoding."""
    seconds: float = 60.0
    """About how long it may take. What does not fit is left out, and the result says so."""

    def __post_init__(self) -> None:
        check_range("speed", "prefill_tokens", self.prefill_tokens, 1, 131072)
        # Callers may give a list; a tuple keeps the plan hashable.
        object.__setattr__(self, "decode_batches", tuple(self.decode_batches))
        if len(self.decode_batches) > 8 or len(set(self.decode_batches)) < len(self.decode_batches):
            raise ConfigError("speed.decode_batches must be at most 8 different numbers", field="speed.decode_batches")
        for batch in self.decode_batches:
            check_range("speed", "decode_batches", batch, 1, 1024)
        check_range("speed", "context", self.context, 1, 131072)
        check_range("speed", "seconds", self.seconds, 1.0, 3600.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlan:
    """What to measure. The parts run in the order of the fields; null, or an empty list, leaves one out."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    perplexity: PerplexityConfig | None = field(default_factory=PerplexityConfig)
    """Perplexity on a text."""
    tasks: tuple[TaskConfig, ...] = ()
    """Zero-shot accuracy, through lm-eval."""
    speed: SpeedConfig | None = None
    """The kernel benchmark on the hardware that the evaluation runs on."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        check_range("plan", "number of tasks", len(self.tasks), 0, 64)
        names = [PurePath(task.name).name for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"tasks names {name!r} twice", field="tasks")
        if self.perplexity is None and not self.tasks and self.speed is None:
            raise ConfigError("the plan measures nothing: give perplexity, tasks or speed", field="perplexity")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` takes them back."""
        plain = asdict(self)
        plain["tasks"] = list(plain["tasks"])
        if plain["speed"] is not None:
            plain["speed"]["decode_batches"] = list(plain["speed"]["decode_batches"])
        return plain

    @classmethod
    def from_dict(cls, values: object) -> "EvaluationPlan":
        """Build a plan from JSON types.

        Raises:
            ConfigError: a field is unknown, has the wrong type or is out of range; the message names it.
        """
        return from_plain(cls, values, what="evaluation plan")
