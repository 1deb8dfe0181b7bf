"""The transform of each site."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from duquant.config.checks import LATER, STRICT_FIELDS, check_choice, check_range
from duquant.errors import ConfigError


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
    alignment: Literal["none", "always", "search"] = field(default="none", metadata=LATER)
    """always: turn the dominant direction of a site's inputs into a value that all channels of a token share, which the
    zero point takes up; search: at the sites where that makes the output error less. Both take rotation=hadamard or
    balanced, permutation=zigzag and asymmetric activations."""
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
        check_choice("transform", "alignment", self.alignment, ("none", "always", "search"))
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
        if self.alignment != "none" and not (
            self.rotation in ("hadamard", "balanced") and self.permutation == "zigzag"
        ):
            # The searches make peaks small, which a reflection behind them would undo.
            raise ConfigError(
                "transform.alignment takes rotation='hadamard' or 'balanced' and permutation='zigzag'",
                field="transform.alignment",
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
