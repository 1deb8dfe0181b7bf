"""How weights, activations and the KV cache are rounded."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from duquant.config.checks import LATER, STRICT_FIELDS, check_choice, check_range
from duquant.errors import ConfigError


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
    """Share of the second moment's mean diagonal that gptq adds to it: more fits the calibration text less closely, and
    other text better."""
    descent_passes: int = field(default=0, metadata=LATER)
    """How often gptq then takes each column again, to the code of least output error with all the others as they are.
    It ends early where nothing changes."""

    def __post_init__(self) -> None:
        check_choice("weight", "bits", self.bits, (4, 8))
        check_choice("weight", "clip", self.clip, ("none", "fixed", "search", "output", "learned"))
        check_choice("weight", "solver", self.solver, ("rtn", "gptq"))
        check_range("weight", "clip_ratio", self.clip_ratio, 0.1, 1.0)
        check_range("weight", "damp", self.damp, 1e-6, 1.0)
        check_range("weight", "descent_passes", self.descent_passes, 0, 100)
        if self.group_size is not None:
            check_range("weight", "group_size", self.group_size, 8, 32768)
        if self.clip != "fixed" and self.clip_ratio != 1.0:
            raise ConfigError("weight.clip_ratio is only used with weight.clip='fixed'", field="weight.clip_ratio")
        if self.descent_passes and self.solver != "gptq":
            raise ConfigError("weight.descent_passes takes solver='gptq'", field="weight.descent_passes")
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
    smooth_keys: bool = field(default=False, metadata=LATER)
    """Before rounding take off what the keys of a head have in common, and scale each of its channels, both by the
    calibration text. What attention gives stays what it is."""

    def __post_init__(self) -> None:
        check_choice("kv_cache", "bits", self.bits, (2, 4, 8, 16))
        check_range("kv_cache", "sink_tokens", self.sink_tokens, 0, 1024)
        check_range("kv_cache", "clip_ratio", self.clip_ratio, 0.1, 1.0)
        if self.smooth_keys and self.bits == 16:
            raise ConfigError("kv_cache.smooth_keys needs a rounded cache; kv_cache.bits is 16", field="kv_cache.bits")
