"""Named recipes."""

from dataclasses import replace

from duquant.config.calibration import CalibrationConfig, DistillationConfig, LearningConfig
from duquant.config.recipe import Recipe
from duquant.config.rounding import ActivationConfig, KVCacheConfig, WeightConfig
from duquant.config.transform import TransformConfig
from duquant.errors import ConfigError

_ROTATED_KV = KVCacheConfig(bits=4, rotate=True, clip_ratio=0.95)
_SMOOTHED_KV = KVCacheConfig(bits=4, rotate=True, smooth_keys=True, sink_tokens=4)
# 0.01 of GPTQ's paper fits one kind of text: docs/explanation/quantization.md.
_DAMP = 0.3


_QUAROT = Recipe(
    name="quarot",
    transform=TransformConfig(rotation="hadamard", permutation="transpose", fold_gains=True),
    weight=WeightConfig(symmetric=True, clip="search", solver="gptq"),
    activation=ActivationConfig(symmetric=True, clip_ratio=0.9),
    kv_cache=_ROTATED_KV,
)


_BEST = Recipe(
    name="duquant-best",
    transform=TransformConfig(
        smooth_alpha=0.5,
        smooth_statistic="rms",
        rotation="balanced",
        balance_damp=0.1,
        permutation="zigzag",
        block_size=256,
        shared_rotation=False,
        rotation_dtype="float16",
        alignment="always",
    ),
    weight=WeightConfig(clip="search", solver="gptq", damp=_DAMP),
    activation=ActivationConfig(clip="search"),
    kv_cache=_SMOOTHED_KV,
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
        "OmniQuant (arXiv 2308.13137v3): smoothing scales and weight clips learned by AdamW. A quarter of an hour.",
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
            learning=LearningConfig(samples=32, seq_len=512, epochs=3, patience=3),
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
        "DuQuant with learnable weight clipping as in the paper: AdamW on each layer's output. A quarter of an hour.",
        Recipe(
            name="duquant-lwc-adamw",
            transform=TransformConfig(smooth_alpha=0.5, rotation="greedy", permutation="zigzag"),
            weight=WeightConfig(clip="learned"),
            activation=ActivationConfig(clip_ratio=0.9),
            kv_cache=_ROTATED_KV,
        ),
    ),
    "duquant-fast": (
        "Our default: smoothing, random-sign Hadamard, zigzag, Hadamard, weight clips searched per row. Two minutes.",
        Recipe(
            name="duquant-fast",
            transform=TransformConfig(
                smooth_alpha=0.5, smooth_statistic="rms", rotation="hadamard", permutation="zigzag"
            ),
            weight=WeightConfig(clip="search"),
            activation=ActivationConfig(clip_ratio=0.87),
            kv_cache=_SMOOTHED_KV,
        ),
    ),
    "duquant-gptq": (
        "Between duquant-fast and duquant-best, no larger than the first: duquant-fast with zero points aligned, GPTQ, "
        "activation clips searched by site. Minutes.",
        Recipe(
            name="duquant-gptq",
            transform=TransformConfig(
                smooth_alpha=0.5, smooth_statistic="rms", rotation="hadamard", permutation="zigzag", alignment="always"
            ),
            weight=WeightConfig(clip="search", solver="gptq", damp=_DAMP),
            activation=ActivationConfig(clip="search"),
            kv_cache=_SMOOTHED_KV,
        ),
    ),
    "duquant-best": (
        "Layers quantized best: balanced, aligned blocks around the zigzag, GPTQ, activation clips by site. Minutes. "
        "With its blocks 10.6 bits a weight on a 135M model, about 5 at a width of 4096.",
        _BEST,
    ),
    "duquant-distilled": (
        "duquant-best with coordinate descent, whose scales and gains then learn the unquantized network's "
        "distribution; half of the text it is calibrated on is Python's help. Half an hour. As large as "
        "duquant-best.",
        replace(
            _BEST,
            name="duquant-distilled",
            weight=replace(_BEST.weight, descent_passes=4),
            calibration=CalibrationConfig(builtin_share=0.5),
            distillation=DistillationConfig(steps=60),
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
