"""Calibration and learning: which text, how much of it, and how it is cut for the work."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

from duquant.config.checks import LATER, STRICT_FIELDS, check_choice, check_range
from duquant.errors import ConfigError


def even_ranges(count: int, parts: int) -> list[range]:
    """Cut range(count) into parts, at most `count` of them; the first get one more when there is a remainder.

    >>> even_ranges(5, 2)
    [range(0, 3), range(3, 5)]
    """
    parts = min(parts, count)
    base, extra = divmod(count, parts)
    edges = [index * base + min(index, extra) for index in range(parts + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


BUILTIN_TEXTS = ("pydoc-topics", "conversations")
"""The help pages that ship with Python, and the questions and answers that ship with duquant."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where calibration or evaluation text comes from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    kind: Literal["builtin", "file", "object", "hub", "random", "self"] = "builtin"
    """builtin: text that ships with Python or with duquant; file: a text or JSONL file; object: a key in the object
    store; hub: a Hugging Face data set; random: uniformly random tokens; self: written by the model itself."""
    name: str = "pydoc-topics"
    """The built-in text's name (pydoc-topics or conversations), the file's path, the object's key, or the data set's
    name; unused for the rest."""
    part: Literal["all", "calibration", "evaluation"] = "all"
    """The whole text, or one of its two disjoint halves (cut at a line end)."""
    config: str | None = None
    """The hub data set's configuration, for example wikitext-2-raw-v1."""
    split: str = "train"
    """The hub data set's split."""
    text_field: str = "text"
    """The field that holds the text in JSONL files and hub data sets."""

    def __post_init__(self) -> None:
        kinds = get_args(TextSource.__dataclass_fields__["kind"].type)
        check_choice("source", "kind", self.kind, kinds)
        check_choice("source", "part", self.part, ("all", "calibration", "evaluation"))
        if self.kind in ("builtin", "file", "object", "hub") and not self.name:
            raise ConfigError(f"source.name is empty; a {self.kind} source needs one", field="source.name")
        if self.kind == "builtin":
            check_choice("source", "name", self.name, BUILTIN_TEXTS)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationConfig:
    """The text that the statistics come from, and how it is cut for the work.

    Floating-point sums depend on how they are split, so `shards` and `micro_batch` are part of the recipe: any number
    of workers then gives the same bytes.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    source: TextSource = field(default_factory=lambda: TextSource(part="calibration"))
    """The calibration text."""
    samples: int = 32
    """Windows of seq_len tokens."""
    seq_len: int = 2048
    """Tokens in a window."""
    shards: int = 4
    """Independent groups of windows, which layers are run over in parallel."""
    micro_batch: int = 1
    """Windows in one forward pass."""
    search_tokens: int = 1024
    """Tokens per site, evenly spread, that rotation and permutation are searched on."""
    moment_tokens: int = 16384
    """Tokens per site, evenly spread, that second moments are summed over, where the recipe needs them."""
    builtin_share: float = field(default=0.0, metadata=LATER)
    """Part of the windows that is of the calibration half of the text that ships with Python, not of the source: what
    is fitted to two kinds of text does better on a third."""
    conversation_share: float = field(default=0.0, metadata=LATER)
    """Part of the windows that is of builtin:conversations, questions and answers on everyday subjects, for the same
    end."""
    self_share: float = field(default=0.0, metadata=LATER)
    """Part of the windows that the model writes itself, for the same end; the whole model is loaded for it."""

    def __post_init__(self) -> None:
        check_range("calibration", "samples", self.samples, 1, 65536)
        check_range("calibration", "seq_len", self.seq_len, 8, 131072)
        check_range("calibration", "shards", self.shards, 1, 1024)
        check_range("calibration", "micro_batch", self.micro_batch, 1, 1024)
        check_range("calibration", "search_tokens", self.search_tokens, 16, 1048576)
        check_range("calibration", "moment_tokens", self.moment_tokens, 16, 16777216)
        check_range("calibration", "builtin_share", self.builtin_share, 0.0, 1.0)
        check_range("calibration", "conversation_share", self.conversation_share, 0.0, 1.0)
        check_range("calibration", "self_share", self.self_share, 0.0, 1.0)
        shares = (self.builtin_share, self.conversation_share, self.self_share)
        if sum(shares) > 1.0 + 1e-9:
            raise ConfigError(
                "calibration.builtin_share, conversation_share and self_share are "
                f"{', '.join(f'{share:g}' for share in shares)}; together they must be at most 1",
                field="calibration.self_share",
            )

    @property
    def windows(self) -> tuple[tuple[TextSource, int], ...]:
        """The sources that windows are of, and how many of each; `source` has what the shares leave."""
        shares = {
            TextSource(part="calibration"): self.builtin_share,
            TextSource(name="conversations"): self.conversation_share,
            TextSource(kind="self"): self.self_share,
        }
        shared = {source: int(self.samples * share) for source, share in shares.items()}
        counts = {self.source: self.samples - sum(shared.values())}
        for source, count in shared.items():
            # The source may be one of these itself: all of its windows are then cut from it at once.
            counts[source] = counts.get(source, 0) + count
        return tuple((source, count) for source, count in counts.items() if count)


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningConfig:
    """The budget of what is learned by gradients.

    weight.clip=learned and transform.smooth_learned: by AdamW, layer by layer; the loss is the squared distance between
    the outputs of the quantized layer and of the unquantized one. transform.residual_rotation=learned: by Cayley SGD;
    the loss is the cross-entropy of the next token, activations and KV cache rounded, weights in 16 bits.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    samples: int = 16
    """Calibration windows that are learned on, evenly spread; each is one step of an epoch."""
    seq_len: int = 512
    """Tokens of each, its first ones."""
    epochs: int = 6
    """Most times that the samples are gone through."""
    patience: int = 2
    """Epochs without a smaller loss after which learning stops early. The best epoch's values are kept."""
    clip_rate: float = 0.1
    """Learning rate of the clips."""
    smooth_rate: float = 0.005
    """Learning rate of the smoothing scales' logarithms."""
    rotation_rate: float = field(default=0.2, metadata=LATER)
    """Learning rate of the rotations; it falls to zero linearly. SpinQuant's authors take 1.5 with steps of
    16,384 tokens; with steps of 512 this was the best of those tried."""

    def __post_init__(self) -> None:
        check_range("learning", "samples", self.samples, 1, 65536)
        check_range("learning", "seq_len", self.seq_len, 8, 131072)
        check_range("learning", "epochs", self.epochs, 1, 1000)
        check_range("learning", "patience", self.patience, 1, 1000)
        check_range("learning", "clip_rate", self.clip_rate, 1e-6, 1.0)
        check_range("learning", "smooth_rate", self.smooth_rate, 1e-6, 1.0)
        check_range("learning", "rotation_rate", self.rotation_rate, 1e-6, 1000.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistillationConfig:
    """Learning on the whole network, after all layers are quantized: the weights' scales and the norms' gains, by Adam.

    The loss is the Kullback-Leibler divergence of the quantized network's next-token distribution from the unquantized
    one's, with activations, keys and values rounded as they are at run time. It learns on the calibration's windows.
    Codes stay, so the quantized network has to be in memory, packed, and nothing of its size beside it.

    Reference: distillation for quantization is LLM-QAT's, arXiv 2305.17888v1, section 2.2; learning the step sizes of
    the whole network alone is EfficientQAT's E2E-QP, arXiv 2407.11062v3, section 3.3.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    steps: int = 0
    """Gradient steps; 0 learns nothing."""
    batch: int = 8
    """Sequences in a step."""
    seq_len: int = 256
    """Tokens of a sequence: calibration windows are cut into such pieces."""
    rate: float = 0.003
    """Learning rate of the logarithms of scales and gains; it rises over the first steps, then falls as a cosine."""

    def __post_init__(self) -> None:
        check_range("distillation", "steps", self.steps, 0, 100000)
        check_range("distillation", "batch", self.batch, 1, 4096)
        check_range("distillation", "seq_len", self.seq_len, 8, 131072)
        check_range("distillation", "rate", self.rate, 1e-6, 1.0)
