"""What a recipe did to a model, in the words of a model card."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import PurePath

from duquant.artifact.card_measures import text_words
from duquant.config import ActivationConfig, KVCacheConfig, Recipe, TextSource, TransformConfig, WeightConfig

_SIZES = {"absmax": "largest magnitudes", "rms": "root mean squares", "mean": "mean magnitudes of the inputs"}


def recipe_rows(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (name, words) for everything of a recipe that a reader of the card should know."""
    transform = recipe.transform
    yield "smoothing", _smoothing(transform)
    if transform.fold_gains:
        yield "gains of the norms", "folded into the weights"
    if transform.rotates_residual:
        yield "residual stream", f"rotated: {transform.residual_rotation}"
    yield "rotation", _rotation(transform)
    if transform.permutation != "transpose":
        yield "permutation", transform.permutation
    if transform.alignment != "none":
        where = "" if transform.alignment == "always" else ", at the sites where that helps"
        yield "alignment", f"the dominant direction onto the zero points{where}"
    yield "weights", _weights(recipe.weight)
    yield "activations", _activations(recipe.activation)
    if recipe.outlier_channels:
        yield "outlier channels", f"{recipe.outlier_channels} of each site, 8 bits"
    yield "KV cache", _kv_cache(recipe.kv_cache)
    if recipe.skip_linears:
        yield "left in 16 bits", ", ".join(f"`{name}`" for name in recipe.skip_linears)
    yield "calibration text", _calibration_text(recipe)
    yield "calibrated on", _inputs(recipe)
    if recipe.distills:
        config = recipe.distillation
        sizes = f"{config.steps:,} steps of {config.batch} sequences of {config.seq_len:,} tokens"
        yield "distilled", f"scales and gains, {sizes}"
    yield "seed", str(recipe.seed)


def _smoothing(config: TransformConfig) -> str:
    if config.smooth_strength == "search":
        words = f"strength searched by site, {_SIZES[config.smooth_statistic]}"
    elif config.smooth_alpha is not None:
        words = f"alpha {config.smooth_alpha:g}, {_SIZES[config.smooth_statistic]}"
    else:
        return "learned" if config.smooth_learned else "none"
    return f"{words}, then learned" if config.smooth_learned else words


def _rotation(config: TransformConfig) -> str:
    if config.rotation == "none":
        return "none"
    if config.permutation == "transpose":
        where = "inputs of mlp_out" if config.rotates_residual else "each site's inputs"
        return f"{config.rotation}, one matrix over all channels of {where}, as a product of two"
    shared = "one for all blocks of a site" if config.shared_rotation else "each block its own"
    stored = "" if config.rotation_dtype == "float32" else f", stored in {config.rotation_dtype}"
    return f"{config.rotation}, blocks of up to {config.block_size} channels, {shared}{stored}"


def _weights(config: WeightConfig) -> str:
    solver = "GPTQ" if config.solver == "gptq" else "to nearest"
    if config.descent_passes:
        passes = "a pass" if config.descent_passes == 1 else f"{config.descent_passes} passes"
        solver += f" and {passes} of coordinate descent"
    clip = {
        "none": "no clip",
        "fixed": f"range times {config.clip_ratio:g}",
        "search": "clip searched by squared error",
        "output": "clip solved by output error",
        "learned": "clip learned by output error",
    }[config.clip]
    return f"{_grid(config, 'per output channel')}, {solver}, {clip}"


def _activations(config: ActivationConfig) -> str:
    if config.bits == 16:
        return "16 bits"
    clip = "clip searched by site" if config.clip == "search" else _times(config.clip_ratio)
    return f"{_grid(config, 'per token')}, {clip}"


def _kv_cache(config: KVCacheConfig) -> str:
    if config.bits == 16:
        return "16 bits"
    parts = [f"{config.bits} bits, asymmetric, per token and head", _times(config.clip_ratio)]
    if config.rotate:
        parts.insert(1, "rotated over the head")
    if config.smooth_keys:
        parts.insert(1, "keys smoothed")
    if config.sink_tokens:
        parts.append(f"first {config.sink_tokens} tokens in 16 bits")
    return ", ".join(parts)


def _grid(config: WeightConfig | ActivationConfig, granularity: str) -> str:
    where = granularity if config.group_size is None else f"groups of {config.group_size}"
    return f"{config.bits} bits, {'symmetric' if config.symmetric else 'asymmetric'}, {where}"


def _times(ratio: float) -> str:
    return "no clip" if ratio == 1.0 else f"range times {ratio:g}"


def _calibration_text(recipe: Recipe) -> str:
    config = recipe.calibration
    if len(config.windows) == 1:
        return f"{_source(config.windows[0][0])}, {config.samples} windows of {config.seq_len} tokens"
    parts = ", ".join(f"{count} of {_source(source)}" for source, count in config.windows)
    return f"{config.samples} windows of {config.seq_len} tokens: {parts}"


def _source(source: TextSource) -> str:
    if source.kind == "random":
        return "uniformly random tokens"
    if source.kind == "self":
        return "text that the model itself wrote"
    # Where a file lay on the machine that quantized says nothing to a reader of the card.
    name = PurePath(source.name).name if source.kind == "file" else source.name
    return text_words({**asdict(source), "name": name})


def _inputs(recipe: Recipe) -> str:
    """Say whose activations the layers saw."""
    if recipe.input_mode == "fp":
        words = "the unquantized model's activations"
    elif recipe.input_mode == "quantized":
        words = "what the quantized layers before give"
    else:
        chains = recipe.input_mode.removeprefix("staged:")
        words = f"what the quantized layers before give, in {chains} chains from unquantized starts"
    if not recipe.refine_passes:
        return f"{words} (`{recipe.input_mode}`)"
    passes = "pass" if recipe.refine_passes == 1 else "passes"
    return f"{words} (`{recipe.input_mode}`), then {recipe.refine_passes} {passes} on what the quantized network gives"
