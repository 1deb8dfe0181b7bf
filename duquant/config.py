"""Recipes: validated, hashable descriptions of how to quantize a model. No torch here.

The same classes are the REST schema, the manifest entry and the command line's input. Every field is keyword-only,
every unknown field is an error, and equal recipes have equal digests on every machine.
"""

import functools
import hashlib
import json
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from duquant.errors import ConfigError

_T = TypeVar("_T")

STRICT_FIELDS: dict[str, Any] = {"extra": "forbid", "use_attribute_docstrings": True}
"""For pydantic, which reads these dataclasses where they are part of a request."""

ALGORITHM_VERSION = 2
"""Part of every fingerprint. Raise it when the same recipe would give other bytes than before."""


LATER: Mapping[str, bool] = {"later": True}
"""Marks a field that older recipes did not have: while it has its default, it does not count in a recipe's digest, so
that artifacts made before are still found."""


def check_range(owner: str, name: str, value: int | float, low: int | float, high: int | float) -> None:
    """Refuse a value outside [low, high].

    Raises:
        ConfigError: it is outside, or NaN; the message names field `owner.name`.
    """
    if not low <= value <= high:  # NaN is not, either
        raise ConfigError(f"{owner}.{name} is {value}; it must be between {low} and {high}", field=f"{owner}.{name}")


def check_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ConfigError: it is not; the message names field `owner.name`.
    """
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices)
        raise ConfigError(f"{owner}.{name} is {value!r}; it must be one of: {allowed}", field=f"{owner}.{name}")


def even_ranges(count: int, parts: int) -> list[range]:
    """Cut range(count) into parts, at most `count` of them; the first get one more when there is a remainder.

    >>> even_ranges(5, 2)
    [range(0, 3), range(3, 5)]
    """
    parts = min(parts, count)
    base, extra = divmod(count, parts)
    edges = [index * base + min(index, extra) for index in range(parts + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where calibration or evaluation text comes from."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    kind: Literal["builtin", "file", "object", "hub", "random", "self"] = "builtin"
    """builtin: text that ships with Python; file: a text or JSONL file; object: a key in the object store;
    hub: a Hugging Face data set; random: uniformly random tokens; self: sampled from the model itself."""
    name: str = "pydoc-topics"
    """The built-in text's name, the file's path, the object's key, or the data set's name; unused for the rest."""
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
        if self.kind == "builtin" and self.name != "pydoc-topics":
            raise ConfigError(f"source.name is {self.name!r}; the built-in text is pydoc-topics", field="source.name")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformConfig:
    """The transform of each site: T(X) = ((X / smooth_scale) R1)[:, perm] R2."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    smooth_alpha: float | None = None
    """Migration strength of the smoothing scale, |X|^alpha / |W|^(1 - alpha) per channel; null leaves smoothing out."""
    smooth_strength: Literal["fixed", "search"] = field(default="fixed", metadata=LATER)
    """fixed: smooth_alpha everywhere; search: each site's strength of least output error, no smoothing included."""
    smooth_statistic: Literal["absmax", "rms", "mean"] = "absmax"
    """What the smoothing scale compares: largest magnitudes, or root mean squares, the better before a rotation. mean:
    mean magnitudes of the inputs, |X|^alpha, whatever the weights are (AWQ)."""
    smooth_consumers: Literal["all", "reference"] = field(default="all", metadata=LATER)
    """Which of a site's weights the scale looks at. reference: q_proj and up_proj alone, as DuQuant's authors' code."""
    smooth_learned: bool = field(default=False, metadata=LATER)
    """Learn the smoothing scales, from where the above puts them, on each layer's output, but those of mlp_out
    (OmniQuant); see learning."""
    fold_gains: bool = field(default=False, metadata=LATER)
    """Move the norms' gains into the weights that follow, so that rotations see inputs without them (QuaRot)."""
    residual_rotation: Literal["none", "hadamard", "learned"] = field(default="none", metadata=LATER)
    """Rotate the residual stream, and the values inside each head, by matrices that are folded into the weights; only
    mlp_out is then rotated online (SpinQuant). hadamard: random-sign Hadamard matrices; learned: from there by Cayley
    SGD on the network's loss; see learning."""
    rotation: Literal["none", "greedy", "hadamard", "balanced", "reference"] = "none"
    """greedy: the paper's search on the outlier channel; hadamard: random-sign Hadamard blocks, no search; balanced:
    invertible blocks of least expected output error, computed from the second moments of inputs and weights; reference:
    the search of DuQuant's authors' code, its differences from the paper included."""
    permutation: Literal["none", "zigzag", "transpose"] = "none"
    """zigzag: deal channels, largest first, back and forth over the blocks between R1 and R2. transpose: channel j of
    block i becomes channel i of block j; with rotation=hadamard R1 and R2 then are one Hadamard matrix over all
    channels, whose factors' sides are chosen by the width."""
    block_size: int = 128
    """Largest side of a rotation block. A width it does not divide takes its largest divisor below. Not used with
    permutation=transpose."""
    shared_rotation: bool = True
    """One rotation for all blocks of a site (the authors' code), or one for each block (the paper)."""
    greedy_steps: int = 256
    """Most steps of the greedy search; the best prefix is kept."""
    balance_alpha: float = 0.5
    """As smooth_alpha, for balanced blocks: more makes activations easier to round, less weights."""
    balance_damp: float = 0.01
    """Share of the mean diagonal that is added to the moments of balanced blocks."""
    rotation_dtype: Literal["float32", "float16"] = field(default="float32", metadata=LATER)
    """How the blocks are stored. Nothing is lost in half the room where weights take the inverse of what is stored, so
    float16 takes rotation='balanced'."""

    def __post_init__(self) -> None:
        if self.smooth_alpha is not None:
            check_range("transform", "smooth_alpha", self.smooth_alpha, 0.0, 1.0)
        check_choice("transform", "smooth_strength", self.smooth_strength, ("fixed", "search"))
        check_choice("transform", "smooth_statistic", self.smooth_statistic, ("absmax", "rms", "mean"))
        check_choice("transform", "smooth_consumers", self.smooth_consumers, ("all", "reference"))
        check_choice("transform", "residual_rotation", self.residual_rotation, ("none", "hadamard", "learned"))
        check_choice("transform", "rotation", self.rotation, ("none", "greedy", "hadamard", "balanced", "reference"))
        check_choice("transform", "permutation", self.permutation, ("none", "zigzag", "transpose"))
        check_range("transform", "block_size", self.block_size, 2, 32768)
        check_range("transform", "greedy_steps", self.greedy_steps, 1, 4096)
        check_range("transform", "balance_alpha", self.balance_alpha, 0.0, 1.0)
        check_range("transform", "balance_damp", self.balance_damp, 1e-6, 1.0)
        check_choice("transform", "rotation_dtype", self.rotation_dtype, ("float32", "float16"))
        if self.rotation_dtype == "float16" and self.rotation != "balanced":
            raise ConfigError(
                "transform.rotation_dtype 'float16' takes rotation='balanced': others are no longer orthogonal then",
                field="transform.rotation_dtype",
            )
        if self.rotation == "balanced" and self.shared_rotation:
            raise ConfigError(
                "transform.shared_rotation is true, but transform.rotation 'balanced' gives each block its own",
                field="transform.shared_rotation",
            )
        if self.rotation == "reference" and not self.shared_rotation:
            raise ConfigError(
                "transform.shared_rotation is false, but transform.rotation 'reference' gives all blocks one",
                field="transform.shared_rotation",
            )
        if self.permutation != "none" and self.rotation == "none":
            raise ConfigError(
                f"transform.permutation is {self.permutation!r} without a rotation; alone it changes nothing",
                field="transform.permutation",
            )
        if self.permutation == "transpose" and (self.rotation != "hadamard" or not self.shared_rotation):
            raise ConfigError(
                "transform.permutation 'transpose' takes rotation='hadamard' and a shared_rotation",
                field="transform.permutation",
            )
        if self.rotates_residual and not (self.fold_gains and self.permutation == "transpose"):
            raise ConfigError(
                "transform.residual_rotation takes fold_gains, rotation='hadamard' and permutation='transpose'",
                field="transform.residual_rotation",
            )
        self._check_smoothing()

    def _check_smoothing(self) -> None:
        if self.smooth_strength == "search" and self.smooth_alpha is not None:
            raise ConfigError(
                "transform.smooth_alpha is only used with transform.smooth_strength='fixed'",
                field="transform.smooth_alpha",
            )
        if self.fold_gains and (self.is_smoothed or self.smooth_learned):
            raise ConfigError("transform.fold_gains takes no smoothing", field="transform.fold_gains")
        if self.smooth_learned and self.rotation != "none":
            raise ConfigError(
                "transform.smooth_learned takes rotation='none': rotated weights are computed once, before learning",
                field="transform.smooth_learned",
            )

    @property
    def rotates_residual(self) -> bool:
        """Whether the residual stream is rotated, by matrices that are folded into the weights."""
        return self.residual_rotation != "none"

    def online_at(self, site: str) -> "TransformConfig":
        """Return what a site does online: this, or no rotation where the site's is folded into the weights."""
        if self.rotates_residual and site != "mlp_out":
            return replace(self, residual_rotation="none", rotation="none", permutation="none")
        return self

    @property
    def is_smoothed(self) -> bool:
        """Whether smoothing scales are computed at all."""
        return self.smooth_alpha is not None or self.smooth_strength == "search"

    @property
    def is_balanced(self) -> bool:
        """Whether the blocks are computed from second moments."""
        return self.rotation == "balanced"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightConfig:
    """How the linears' weights are rounded."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    bits: int = 4
    """Bits of a weight code: 4 or 8."""
    symmetric: bool = False
    """Symmetric grids have no zero point."""
    group_size: int | None = None
    """Input channels that share one scale; null is one scale per output channel. A width it does not divide takes its
    largest divisor below."""
    clip: Literal["none", "fixed", "search", "output", "learned"] = "none"
    """none: the full range; fixed: clip_ratio times it; search: the ratios of least squared error, row by row, channels
    weighed by their inputs; output: the ratios of least output error, row by row, by the inputs' second moment;
    learned: two ratios for each row, by gradients of the layer's output error; see learning."""
    clip_ratio: float = 1.0
    """The ratio of clip=fixed."""
    solver: Literal["rtn", "gptq"] = "rtn"
    """rtn: each weight to the nearest code; gptq: column by column, later columns make up for the errors of earlier."""
    damp: float = 0.01
    """Share of the second moment's mean diagonal that gptq adds to it."""

    def __post_init__(self) -> None:
        check_choice("weight", "bits", self.bits, (4, 8))
        check_choice("weight", "clip", self.clip, ("none", "fixed", "search", "output", "learned"))
        check_choice("weight", "solver", self.solver, ("rtn", "gptq"))
        check_range("weight", "clip_ratio", self.clip_ratio, 0.1, 1.0)
        check_range("weight", "damp", self.damp, 1e-6, 1.0)
        if self.group_size is not None:
            check_range("weight", "group_size", self.group_size, 8, 32768)
        if self.clip != "fixed" and self.clip_ratio != 1.0:
            raise ConfigError("weight.clip_ratio is only used with weight.clip='fixed'", field="weight.clip_ratio")
        if self.clip == "output" and (self.solver != "rtn" or self.group_size is not None):
            # gptq makes up for errors after the clip is chosen, and the errors of a row's groups are not independent.
            raise ConfigError("weight.clip='output' takes solver='rtn' and no group_size", field="weight.clip")
        if self.clip == "learned" and (self.solver != "rtn" or self.symmetric):
            raise ConfigError("weight.clip='learned' takes solver='rtn' and asymmetric grids", field="weight.clip")


@dataclass(frozen=True, kw_only=True, slots=True)
class ActivationConfig:
    """How the linears' inputs are rounded, per token, while the model runs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    bits: int = 4
    """Bits of an activation code, 2 to 8; 16 leaves activations alone."""
    symmetric: bool = False
    """Symmetric grids have no zero point."""
    clip: Literal["fixed", "search"] = "fixed"
    """fixed: clip_ratio everywhere; search: for each site the two ratios (low end, high end) of least output error."""
    clip_ratio: float = 1.0
    """The token's range is multiplied by this before rounding, with clip=fixed."""
    group_size: int | None = field(default=None, metadata=LATER)
    """Input channels that share one scale of a token, as many as in weight.group_size; null is one scale a token."""

    def __post_init__(self) -> None:
        check_choice("activation", "bits", self.bits, (2, 3, 4, 5, 6, 7, 8, 16))
        check_choice("activation", "clip", self.clip, ("fixed", "search"))
        check_range("activation", "clip_ratio", self.clip_ratio, 0.1, 1.0)
        if self.group_size is not None:
            check_range("activation", "group_size", self.group_size, 8, 32768)
        if self.clip != "fixed" and self.clip_ratio != 1.0:
            raise ConfigError(
                "activation.clip_ratio is only used with activation.clip='fixed'", field="activation.clip_ratio"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheConfig:
    """How keys and values are stored in the cache, per token and head. Queries keep 16 bits."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    bits: int = 4
    """Bits of a cache code: 2, 4 or 8; 16 leaves the cache alone."""
    rotate: bool = False
    """Rotate keys and values over the head dimension with a fixed Hadamard before rounding."""
    clip_ratio: float = 1.0
    """The range is multiplied by this before rounding."""
    sink_tokens: int = 0
    """The first tokens of a sequence, which all others attend to, stay in 16 bits: so many of them."""

    def __post_init__(self) -> None:
        check_choice("kv_cache", "bits", self.bits, (2, 4, 8, 16))
        check_range("kv_cache", "sink_tokens", self.sink_tokens, 0, 1024)
        check_range("kv_cache", "clip_ratio", self.clip_ratio, 0.1, 1.0)


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

    def __post_init__(self) -> None:
        check_range("calibration", "samples", self.samples, 1, 65536)
        check_range("calibration", "seq_len", self.seq_len, 8, 131072)
        check_range("calibration", "shards", self.shards, 1, 1024)
        check_range("calibration", "micro_batch", self.micro_batch, 1, 1024)
        check_range("calibration", "search_tokens", self.search_tokens, 16, 1048576)
        check_range("calibration", "moment_tokens", self.moment_tokens, 16, 16777216)


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
    rotation_rate: float = field(default=1.5, metadata=LATER)
    """Learning rate of the rotations; it falls to zero linearly."""

    def __post_init__(self) -> None:
        check_range("learning", "samples", self.samples, 1, 65536)
        check_range("learning", "seq_len", self.seq_len, 8, 131072)
        check_range("learning", "epochs", self.epochs, 1, 1000)
        check_range("learning", "patience", self.patience, 1, 1000)
        check_range("learning", "clip_rate", self.clip_rate, 1e-6, 1.0)
        check_range("learning", "smooth_rate", self.smooth_rate, 1e-6, 1.0)
        check_range("learning", "rotation_rate", self.rotation_rate, 1e-6, 1000.0)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides the bytes of an artifact, given the model; and what it must be worth."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT_FIELDS

    name: str = "custom"
    """A name for people; it is not part of the digest."""
    transform: TransformConfig = field(default_factory=TransformConfig)
    """Smoothing, rotations and permutation of each site."""
    weight: WeightConfig = field(default_factory=WeightConfig)
    """Weight rounding."""
    activation: ActivationConfig = field(default_factory=ActivationConfig)
    """Activation rounding."""
    kv_cache: KVCacheConfig = field(default_factory=KVCacheConfig)
    """Key and value rounding."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Calibration data."""
    learning: LearningConfig = field(default_factory=LearningConfig, metadata=LATER)
    """What may be spent on learning; not used by recipes that learn nothing."""
    outlier_channels: int = field(default=0, metadata=LATER)
    """So many input channels of each site, those of largest mean square, keep 8 bits in weights and activations, on
    symmetric grids of their own (Atom). The site's channels are ordered by mean square."""
    skip_linears: tuple[str, ...] = ()
    """Linears left in 16 bits, by name inside the layer (mlp.down_proj). A whole site must be left out at once."""
    input_mode: str = "fp"
    """What a layer is calibrated on. fp: the unquantized model's activations, so that all layers are independent;
    quantized: what the quantized layers before it give, one after the other; staged:S: S such chains side by side, each
    from an unquantized start."""
    refine_passes: int = field(default=0, metadata=LATER)
    """How often all layers are quantized once more, in parallel, on what the last pass's quantized network gives."""
    seed: int = 0
    """Seed of every random choice; each layer and site derives its own from it."""
    quality_gate: QualityGate | None = None
    """What the artifact must be worth; not part of the digest."""

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 100:
            raise ConfigError("name must have 1 to 100 characters", field="name")
        self._check_passes()
        check_range("recipe", "seed", self.seed, 0, 2**31 - 1)
        # Callers may give a list; a tuple keeps the recipe hashable.
        object.__setattr__(self, "skip_linears", tuple(self.skip_linears))
        if self.transform.smooth_learned and self.weight.clip != "learned":
            raise ConfigError(
                "transform.smooth_learned is learned together with the clips: it takes weight.clip='learned'",
                field="transform.smooth_learned",
            )

        if self.activation.group_size not in (None, self.weight.group_size):
            raise ConfigError(
                f"activation.group_size is {self.activation.group_size}; it must be weight.group_size, "
                f"{self.weight.group_size}, or null",
                field="activation.group_size",
            )
        self._check_outliers()

    def _check_outliers(self) -> None:
        check_range("recipe", "outlier_channels", self.outlier_channels, 0, 32768)
        if self.outlier_channels == 0:
            return
        transform = self.transform
        if transform.rotation != "none" or transform.is_smoothed or self.learns:
            raise ConfigError(
                "outlier_channels take a transform without rotation and smoothing, and no learned clips",
                field="outlier_channels",
            )
        if self.activation.bits == 16 or self.activation.clip != "fixed" or self.weight.clip == "output":
            raise ConfigError(
                "outlier_channels take rounded activations of activation.clip='fixed', and weight.clip other than "
                "'output'",
                field="outlier_channels",
            )

    def _check_passes(self) -> None:
        if self.input_mode not in ("fp", "quantized") and not re.fullmatch(r"staged:[1-9][0-9]{0,3}", self.input_mode):
            raise ConfigError(
                f"input_mode is {self.input_mode!r}; it must be fp, quantized, or staged:S with S chains, 1 to 9999",
                field="input_mode",
            )
        check_range("recipe", "refine_passes", self.refine_passes, 0, 8)
        if self.refine_passes and self.input_mode in ("quantized", "staged:1"):
            raise ConfigError(
                f"refine_passes changes nothing with input_mode={self.input_mode!r}: each layer's inputs are those of "
                "the finished network already",
                field="refine_passes",
            )

    def stages(self, layers: int, pass_index: int = 0) -> list[range]:
        """Return the chains of a pass: runs of layers, the first of which sees unquantized inputs.

        Each pass ends one layer before the next: nothing sees what its last layer would give.

        >>> Recipe(input_mode="staged:2").stages(5), Recipe(input_mode="quantized").stages(3)
        ([range(0, 3), range(3, 5)], [range(0, 3)])
        >>> [Recipe(refine_passes=1).stages(3, index) for index in (0, 1)]
        [[range(0, 1), range(1, 2)], [range(0, 3)]]
        """
        chains = {"fp": layers, "quantized": 1}.get(self.input_mode) or int(self.input_mode.removeprefix("staged:"))
        end = layers - (self.refine_passes - pass_index)
        stages = even_ranges(layers, 1 if pass_index else chains)
        return [range(stage.start, min(stage.stop, end)) for stage in stages if stage.start < end]

    @property
    def learns(self) -> bool:
        """Whether calibration has to keep inputs of the layers to learn on."""
        return self.weight.clip == "learned"

    @property
    def needs_second_moments(self) -> bool:
        """Whether calibration has to keep the second moments of the sites' inputs."""
        return self.weight.solver == "gptq" or self.weight.clip == "output" or self.transform.is_balanced

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; `from_dict` takes them back."""
        plain = asdict(self)
        plain["skip_linears"] = list(self.skip_linears)
        if self.quality_gate is not None:
            plain["quality_gate"]["tasks"] = list(self.quality_gate.tasks)
        return plain

    @classmethod
    def from_dict(cls, values: object) -> "Recipe":
        """Build a recipe from JSON types.

        Raises:
            ConfigError: a field is unknown, has the wrong type or is out of range; the message names it.
        """
        return from_plain(cls, values, what="recipe")

    def digest(self) -> str:
        """Return the sha256, in hex, of everything that decides bytes: all but the name and the quality gate."""
        # Through from_dict: 1 and 1.0 make equal recipes and must not differ in JSON.
        plain = _counted(Recipe.from_dict(self.to_dict()))
        del plain["name"], plain["quality_gate"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def from_plain(cls: type[_T], values: object, *, what: str) -> _T:
    """Build a dataclass from JSON types; `what` is its name in messages.

    Raises:
        ConfigError: a field is unknown, has the wrong type or is out of range; the message names it.
    """
    built = _build(cls, values, "", what)
    assert isinstance(built, cls)
    return built


def _build(cls: type, values: object, path: str, what: str) -> object:
    """Build dataclass `cls` from a mapping, checking names and JSON types strictly."""
    if not isinstance(values, Mapping):
        name = path.removesuffix(".") or what
        raise ConfigError(f"{name} must be an object, not {type(values).__name__}", field=name)
    known = _types_of(cls)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown {what} field {path}{name}; fields here: {', '.join(sorted(known))}", field=f"{path}{name}"
            )
    for each in fields(cls):
        if each.name not in values and each.default is MISSING and each.default_factory is MISSING:
            raise ConfigError(f"{what} field {path}{each.name} is missing", field=f"{path}{each.name}")
    return cls(**{name: _coerce(known[name], value, f"{path}{name}", what) for name, value in values.items()})


def _counted(config: Any) -> dict[str, Any]:
    """Return the fields that count in a digest, in plain JSON types: all but LATER ones that have their default."""
    plain: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.metadata.get("later") and value == default:
            continue
        plain[each.name] = _counted(value) if is_dataclass(value) else value  # a tuple is a list in JSON
    return plain


@functools.cache
def _types_of(cls: type) -> dict[str, Any]:
    # Asking for them costs more than all of the rest, and a service asks on every request.
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _coerce(hint: Any, value: Any, path: str, what: str) -> Any:
    """Check `value` against `hint`; turn lists into tuples and mappings into dataclasses."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        # A mapping where there may be one, else whatever comes first.
        wanted = [a for a in arguments if a is not type(None)]
        mappings = [a for a in wanted if get_origin(a) is dict]
        return _coerce(mappings[0] if mappings and isinstance(value, Mapping) else wanted[0], value, path, what)
    if is_dataclass(hint):
        return _build(hint, value, f"{path}.", what)  # type: ignore[arg-type]  # is_dataclass also admits instances
    if origin is Literal:
        check_choice(what, path, value, arguments)
        return value
    if origin is dict:
        return {str(name): _coerce(arguments[1], item, f"{path}.{name}", what) for name, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path} must be a list", field=path)
        return tuple(_coerce(arguments[0], item, path, what) for item in value)
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path} is {value!r}; it must be {hint.__name__}", field=path)
    try:
        return float(value) if hint is float else value
    except OverflowError as err:
        raise ConfigError(f"{path} is too large for a number with a fraction", field=path) from err


_ROTATED_KV = KVCacheConfig(bits=4, rotate=True, clip_ratio=0.95)
_QUAROT = Recipe(
    name="quarot",
    transform=TransformConfig(rotation="hadamard", permutation="transpose", fold_gains=True),
    weight=WeightConfig(symmetric=True, clip="search", solver="gptq"),
    activation=ActivationConfig(symmetric=True, clip_ratio=0.9),
    kv_cache=_ROTATED_KV,
)

PRESETS: dict[str, tuple[str, Recipe]] = {
    "rtn": (
        "Round to nearest: W4A4KV4 with nothing done about outliers. The floor that every result is shown beside.",
        Recipe(name="rtn"),
    ),
    "smoothquant": (
        "SmoothQuant (arXiv 2211.10438v7): outliers move from activations to weights, then round to nearest.",
        Recipe(name="smoothquant", transform=TransformConfig(smooth_alpha=0.5)),
    ),
    "gptq": (
        "GPTQ (arXiv 2210.17323v2): weights alone, 4 bits per output channel; activations and KV cache keep 16 bits.",
        Recipe(
            name="gptq",
            weight=WeightConfig(clip="search", solver="gptq"),
            activation=ActivationConfig(bits=16),
            kv_cache=KVCacheConfig(bits=16),
        ),
    ),
    "awq": (
        "AWQ (arXiv 2306.00978v5): weights alone, 4 bits in groups of 128; scales searched by site, by output error.",
        Recipe(
            name="awq",
            transform=TransformConfig(smooth_strength="search", smooth_statistic="mean"),
            weight=WeightConfig(group_size=128, clip="search"),
            activation=ActivationConfig(bits=16),
            kv_cache=KVCacheConfig(bits=16),
        ),
    ),
    "omniquant": (
        "OmniQuant (arXiv 2308.13137v3): smoothing scales and weight clips learned by AdamW. Half an hour.",
        Recipe(
            name="omniquant",
            transform=TransformConfig(smooth_alpha=0.5, smooth_learned=True),
            weight=WeightConfig(clip="learned"),
        ),
    ),
    "quarot": (
        "QuaRot (arXiv 2404.00456v2): a Hadamard matrix over all channels of each site, symmetric grids, GPTQ.",
        _QUAROT,
    ),
    "quarot-rtn": (
        "QuaRot with weights rounded to nearest.",
        replace(_QUAROT, name="quarot-rtn", weight=replace(_QUAROT.weight, solver="rtn")),
    ),
    "spinquant": (
        "SpinQuant (arXiv 2405.16406v4): rotations of the residual stream and of each layer's values, learned on the "
        "network's loss and folded into the weights; GPTQ. Half an hour.",
        Recipe(
            name="spinquant",
            transform=TransformConfig(
                rotation="hadamard", permutation="transpose", fold_gains=True, residual_rotation="learned"
            ),
            weight=WeightConfig(symmetric=True, clip="search", solver="gptq"),
            kv_cache=KVCacheConfig(bits=4, rotate=True),
            learning=LearningConfig(samples=32, seq_len=512, epochs=3, patience=3, rotation_rate=0.2),
        ),
    ),
    "atom": (
        "Atom (arXiv 2310.19102v3): 128 channels of each site in 8 bits, the others in 4 in groups of 128, GPTQ. Runs "
        "on the reference kernels alone, which are slow.",
        Recipe(
            name="atom",
            weight=WeightConfig(symmetric=True, group_size=128, clip="fixed", clip_ratio=0.85, solver="gptq"),
            activation=ActivationConfig(symmetric=True, group_size=128, clip_ratio=0.9),
            kv_cache=KVCacheConfig(bits=4),
            outlier_channels=128,
        ),
    ),
    "duquant": (
        "DuQuant (arXiv 2406.01721v3): smoothing, greedy R1, zigzag permutation, greedy R2, fixed clipping.",
        Recipe(
            name="duquant",
            transform=TransformConfig(smooth_alpha=0.6, rotation="greedy", permutation="zigzag"),
            weight=WeightConfig(clip="fixed", clip_ratio=0.8),
            activation=ActivationConfig(clip_ratio=0.9),
            kv_cache=_ROTATED_KV,
        ),
    ),
    "duquant-compat": (
        "DuQuant as its authors' code has it, where that differs from the paper; queries, keys and values in 16 bits.",
        Recipe(
            name="duquant-compat",
            transform=TransformConfig(
                smooth_alpha=0.6, smooth_consumers="reference", rotation="reference", permutation="zigzag"
            ),
            weight=WeightConfig(clip="fixed", clip_ratio=0.8),
            activation=ActivationConfig(clip_ratio=0.9),
            kv_cache=KVCacheConfig(bits=16),
            calibration=CalibrationConfig(search_tokens=256),
        ),
    ),
    "duquant-lwc": (
        "DuQuant with learnable weight clipping, solved instead of trained: each row's two ratios by its output error.",
        Recipe(
            name="duquant-lwc",
            transform=TransformConfig(smooth_alpha=0.5, rotation="greedy", permutation="zigzag"),
            weight=WeightConfig(clip="output"),
            activation=ActivationConfig(clip_ratio=0.9),
            kv_cache=_ROTATED_KV,
        ),
    ),
    "duquant-lwc-adamw": (
        "DuQuant with learnable weight clipping as in the paper: AdamW on each layer's output. Half an hour.",
        Recipe(
            name="duquant-lwc-adamw",
            transform=TransformConfig(smooth_alpha=0.5, rotation="greedy", permutation="zigzag"),
            weight=WeightConfig(clip="learned"),
            activation=ActivationConfig(clip_ratio=0.9),
            kv_cache=_ROTATED_KV,
        ),
    ),
    "duquant-fast": (
        "Our default: smoothing, random-sign Hadamard, zigzag, Hadamard, weight clipping searched per row. Seconds.",
        Recipe(
            name="duquant-fast",
            transform=TransformConfig(
                smooth_alpha=0.5, smooth_statistic="rms", rotation="hadamard", permutation="zigzag"
            ),
            weight=WeightConfig(clip="search"),
            activation=ActivationConfig(clip_ratio=0.87),
            kv_cache=_ROTATED_KV,
        ),
    ),
    "duquant-best": (
        "Our most accurate: balanced blocks around the zigzag, GPTQ, activation clipping searched by site. Minutes.",
        Recipe(
            name="duquant-best",
            transform=TransformConfig(
                smooth_alpha=0.5,
                smooth_statistic="rms",
                rotation="balanced",
                permutation="zigzag",
                block_size=128,
                shared_rotation=False,
                rotation_dtype="float16",
            ),
            weight=WeightConfig(clip="search", solver="gptq"),
            activation=ActivationConfig(clip="search"),
            kv_cache=replace(_ROTATED_KV, sink_tokens=4),
        ),
    ),
}
"""Named recipes with a line about each."""

DEFAULT_PRESET = "duquant-fast"


def preset(name: str) -> Recipe:
    """Return a named recipe.

    Raises:
        ConfigError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no recipe {name!r}; the presets are: {', '.join(PRESETS)}", field="recipe")
    return PRESETS[name][1]


def with_calibration(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with some calibration fields replaced; None leaves a field as it is."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(recipe, calibration=replace(recipe.calibration, **given)) if given else recipe
