"""Recipes: validated, hashable descriptions of how to quantize a model. No torch here.

The same classes are the REST schema, the manifest entry and the command line's input. Every field is keyword-only,
every unknown field is an error, and equal recipes have equal digests on every machine.
"""

from duquant.config.calibration import (
    BUILTIN_TEXTS,
    CalibrationConfig,
    DistillationConfig,
    LearningConfig,
    TextSource,
    even_ranges,
)
from duquant.config.checks import LATER, STRICT_FIELDS, check_choice, check_range
from duquant.config.gate import QualityGate
from duquant.config.plain import from_plain
from duquant.config.presets import DEFAULT_PRESET, PRESETS, preset
from duquant.config.recipe import ALGORITHM_VERSION, Recipe, with_calibration
from duquant.config.rounding import ActivationConfig, KVCacheConfig, WeightConfig
from duquant.config.transform import TransformConfig

__all__ = [
    "ALGORITHM_VERSION",
    "BUILTIN_TEXTS",
    "DEFAULT_PRESET",
    "LATER",
    "PRESETS",
    "STRICT_FIELDS",
    "ActivationConfig",
    "CalibrationConfig",
    "DistillationConfig",
    "KVCacheConfig",
    "LearningConfig",
    "QualityGate",
    "Recipe",
    "TextSource",
    "TransformConfig",
    "WeightConfig",
    "check_choice",
    "check_range",
    "even_ranges",
    "from_plain",
    "preset",
    "with_calibration",
]
