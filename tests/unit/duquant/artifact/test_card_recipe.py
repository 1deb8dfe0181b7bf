"""The recipe's part of a model card."""

from dataclasses import replace

import pytest

from duquant.artifact.card_recipe import recipe_rows
from duquant.config import PRESETS, CalibrationConfig, KVCacheConfig, Recipe, TextSource, TransformConfig, preset


def words_of(recipe: Recipe) -> dict[str, str]:
    rows = list(recipe_rows(recipe))
    assert len(dict(rows)) == len(rows)  # no name twice
    return dict(rows)


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_has_words_for_all_that_a_reader_should_know(name: str) -> None:
    words = words_of(preset(name))
    wanted = {
        "smoothing",
        "rotation",
        "weights",
        "activations",
        "KV cache",
        "calibration text",
        "calibrated on",
        "seed",
    }
    assert wanted <= set(words)
    assert all(words.values())


def test_the_default_is_told_in_full() -> None:
    assert words_of(preset("duquant-fast")) == {
        "smoothing": "alpha 0.5, root mean squares",
        "rotation": "hadamard, blocks of up to 128 channels, one for all blocks of a site",
        "permutation": "zigzag",
        "weights": "4 bits, asymmetric, per output channel, to nearest, clip searched by squared error",
        "activations": "4 bits, asymmetric, per token, range times 0.87",
        "KV cache": "4 bits, asymmetric, per token and head, keys smoothed, rotated over the head, no clip, "
        "first 4 tokens in 16 bits",
        "calibration text": "builtin `pydoc-topics`, calibration half, 32 windows of 2048 tokens",
        "calibrated on": "the unquantized model's activations (`fp`)",
        "seed": "0",
    }


def test_passes_of_coordinate_descent_are_counted() -> None:
    recipe = preset("quarot")
    for passes, words in ((1, "GPTQ and a pass of"), (3, "GPTQ and 3 passes of")):
        again = replace(recipe, weight=replace(recipe.weight, descent_passes=passes))
        assert f"{words} coordinate descent" in words_of(again)["weights"]


def test_a_rotation_of_all_channels_has_no_blocks() -> None:
    words = words_of(preset("quarot"))
    assert words["rotation"] == "hadamard, one matrix over all channels of each site's inputs, as a product of two"
    assert "permutation" not in words
    assert words["gains of the norms"] == "folded into the weights"
    assert words["weights"].endswith("per output channel, GPTQ, clip searched by squared error")
    spinquant = words_of(preset("spinquant"))
    assert spinquant["residual stream"] == "rotated: learned"
    assert "all channels of inputs of mlp_out" in spinquant["rotation"]


def test_distillation_is_told() -> None:
    words = words_of(preset("duquant-distilled"))
    assert words["distilled"] == "scales and gains, 60 steps of 8 sequences of 256 tokens"
    assert "distilled" not in words_of(preset("duquant-best"))


def test_a_searched_smoothing_strength_is_not_called_none() -> None:
    assert words_of(preset("awq"))["smoothing"] == "strength searched by site, mean magnitudes of the inputs"
    assert words_of(preset("omniquant"))["smoothing"] == "alpha 0.5, largest magnitudes, then learned"
    assert words_of(Recipe(transform=TransformConfig()))["smoothing"] == "none"


@pytest.mark.parametrize(
    ("mode", "passes", "words"),
    [
        ("quantized", 0, "what the quantized layers before give (`quantized`)"),
        ("staged:4", 0, "what the quantized layers before give, in 4 chains from unquantized starts (`staged:4`)"),
        ("fp", 1, "the unquantized model's activations (`fp`), then 1 pass on what the quantized network gives"),
        ("fp", 2, "the unquantized model's activations (`fp`), then 2 passes on what the quantized network gives"),
    ],
)
def test_the_card_says_whose_activations_the_layers_saw(mode: str, passes: int, words: str) -> None:
    assert words_of(Recipe(input_mode=mode, refine_passes=passes))["calibrated on"] == words


def test_a_calibration_file_is_named_without_its_folder() -> None:
    source = TextSource(kind="file", name="/home/someone/secret/wiki.txt")
    recipe = Recipe(calibration=CalibrationConfig(source=source, samples=4, seq_len=64))
    assert words_of(recipe)["calibration text"] == "file `wiki.txt`, 4 windows of 64 tokens"
    random = Recipe(calibration=CalibrationConfig(source=TextSource(kind="random")))
    assert words_of(random)["calibration text"] == "uniformly random tokens, 32 windows of 2048 tokens"


def test_what_keeps_16_bits_is_said() -> None:
    assert words_of(preset("gptq"))["KV cache"] == words_of(preset("gptq"))["activations"] == "16 bits"
    assert words_of(preset("atom"))["outlier channels"] == "128 of each site, 8 bits"
    left_out = Recipe(skip_linears=("mlp.down_proj",), kv_cache=KVCacheConfig(sink_tokens=4))
    assert words_of(left_out)["left in 16 bits"] == "`mlp.down_proj`"
    assert words_of(left_out)["KV cache"].endswith("first 4 tokens in 16 bits")
