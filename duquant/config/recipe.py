"""The recipe: everything that decides the bytes of an artifact, given the model."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from duquant.config.calibration import CalibrationConfig, DistillationConfig, LearningConfig, even_ranges
from duquant.config.checks import LATER, STRICT_FIELDS, check_range
from duquant.config.gate import QualityGate
from duquant.config.plain import counted, from_plain
from duquant.config.rounding import ActivationConfig, KVCacheConfig, WeightConfig
from duquant.config.transform import TransformConfig
from duquant.errors import ConfigError

ALGORITHM_VERSION = 2
"""Part of every fingerprint. Raise it when the same recipe would give other bytes than before."""


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
    distillation: DistillationConfig = field(default_factory=DistillationConfig, metadata=LATER)
    """Learning on the whole network when its layers are quantized; off with 0 steps."""
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
        if self.transform.residual_rotation == "learned" and self.activation.bits == 16 and self.kv_cache.bits == 16:
            raise ConfigError(
                "transform.residual_rotation 'learned' learns from rounded activations or a rounded KV cache; both "
                "have 16 bits",
                field="transform.residual_rotation",
            )
        if self.kv_cache.smooth_keys and self.transform.residual_rotation == "learned":
            raise ConfigError(
                "kv_cache.smooth_keys is not among what transform.residual_rotation='learned' learns behind",
                field="kv_cache.smooth_keys",
            )
        if self.kv_cache.smooth_keys and self.calibration.seq_len <= self.first_smoothed_key:
            raise ConfigError(
                f"calibration.seq_len is {self.calibration.seq_len}; kv_cache.smooth_keys needs more than the "
                f"{self.first_smoothed_key} first tokens of a window, which it leaves out",
                field="calibration.seq_len",
            )
        if self.transform.alignment != "none" and (self.activation.symmetric or self.activation.bits == 16):
            raise ConfigError(
                "transform.alignment takes rounded activations on asymmetric grids: a zero point is what it is for",
                field="transform.alignment",
            )
        self._check_outliers()
        self._check_distillation()

    def _check_distillation(self) -> None:
        if not self.distills:
            return
        if self.distillation.seq_len > self.calibration.seq_len:
            raise ConfigError(
                f"distillation.seq_len is {self.distillation.seq_len}; windows of calibration.seq_len "
                f"{self.calibration.seq_len} have no pieces of that length",
                field="distillation.seq_len",
            )
        if self.calibration.samples * (self.calibration.seq_len // self.distillation.seq_len) < 2:
            # Now, and not when all layers are quantized.
            raise ConfigError(
                f"distillation needs two pieces of distillation.seq_len {self.distillation.seq_len} tokens at least, "
                f"and calibration.samples {self.calibration.samples} of calibration.seq_len {self.calibration.seq_len} "
                "give one",
                field="distillation.seq_len",
            )
        if self.transform.rotates_residual or self.outlier_channels:
            what = "outlier_channels" if self.outlier_channels else "transform.residual_rotation"
            raise ConfigError(
                f"distillation.steps is {self.distillation.steps}; distillation is not for recipes with {what}",
                field="distillation.steps",
            )

    def _check_outliers(self) -> None:
        check_range("recipe", "outlier_channels", self.outlier_channels, 0, 32768)
        if self.outlier_channels == 0:
            return
        transform = self.transform
        if transform.rotation != "none" or transform.is_smoothed or self.learns_by_layer:
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
    def learns_by_layer(self) -> bool:
        """Whether layers learn on their outputs, so that calibration has to keep inputs of each.

        Rotations of the residual stream are learned before, on the network's loss, and need no such inputs.
        """
        return self.weight.clip == "learned"

    @property
    def distills(self) -> bool:
        """Whether the whole network is learned on when its layers are quantized."""
        return self.distillation.steps > 0

    @property
    def first_smoothed_key(self) -> int:
        """How many first keys of a window smoothing is not made for: the sinks, and in any case the first.

        It is unlike the others, however few sinks there are.
        """
        return max(1, self.kv_cache.sink_tokens)

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
        plain = counted(Recipe.from_dict(self.to_dict()))
        del plain["name"], plain["quality_gate"]
        if self.transform.residual_rotation == "learned":
            # Its default was another once: where it is used it counts always, or an artifact of then would be found.
            plain.setdefault("learning", {})["rotation_rate"] = self.learning.rotation_rate
            # Since then they see rounded inputs that are rounded to bfloat16 once, not twice.
            plain["learning"]["rounds_once"] = True
        return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def with_calibration(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with some calibration fields replaced; None leaves a field as it is."""
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(recipe, calibration=replace(recipe.calibration, **given)) if given else recipe
