"""Recipes: ranges, strictness, round trips and digests."""

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from duquant.config import (
    PRESETS,
    ActivationConfig,
    CalibrationConfig,
    KVCacheConfig,
    LearningConfig,
    QualityGate,
    Recipe,
    TextSource,
    TransformConfig,
    WeightConfig,
    preset,
    with_calibration,
)
from duquant.errors import ConfigError, DuQuantError


@pytest.mark.parametrize("name", list(PRESETS))
def test_preset_survives_json(name: str) -> None:
    recipe = preset(name)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_every_field_survives_json() -> None:
    recipe = Recipe(
        name="all",
        transform=TransformConfig(
            smooth_alpha=0.25,
            smooth_statistic="rms",
            rotation="balanced",
            permutation="zigzag",
            block_size=64,
            shared_rotation=False,
            greedy_steps=3,
            balance_alpha=0.25,
            balance_damp=0.5,
        ),
        weight=WeightConfig(bits=8, symmetric=True, group_size=64, clip="fixed", clip_ratio=0.75),
        activation=ActivationConfig(bits=8, symmetric=True, clip_ratio=0.5),
        kv_cache=KVCacheConfig(bits=8, rotate=True, clip_ratio=0.9, sink_tokens=2),
        calibration=CalibrationConfig(
            source=TextSource(kind="hub", name="x/y", part="evaluation", config="c", split="s", text_field="t"),
            samples=3,
            seq_len=64,
            shards=2,
            micro_batch=1,
            search_tokens=99,
        ),
        learning=LearningConfig(samples=3, seq_len=99, epochs=2, patience=1, clip_rate=0.5, smooth_rate=0.25),
        skip_linears=("mlp.down_proj",),
        seed=11,
    )
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"weigth": {}}, "weigth"),
        ({"weight": {"bit": 4}}, "weight.bit"),
        ({"calibration": {"source": {"nam": "x"}}}, "calibration.source.nam"),
    ],
)
def test_unknown_field_is_named(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown recipe field {field};") as caught:
        Recipe.from_dict(values)
    assert caught.value.facts["field"] == field


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"weight": {"bits": 3}}, "weight.bits"),
        ({"weight": {"bits": "4"}}, "weight.bits"),
        ({"weight": {"bits": 4.0}}, "weight.bits"),
        ({"weight": {"bits": True}}, "weight.bits"),
        ({"weight": {"symmetric": 1}}, "weight.symmetric"),
        ({"weight": {"group_size": 4}}, "weight.group_size"),
        ({"weight": {"clip": "best"}}, "weight.clip"),
        ({"weight": {"clip_ratio": 0.5}}, "weight.clip_ratio"),
        ({"weight": {"clip": "fixed", "clip_ratio": 0.0}}, "weight.clip_ratio"),
        ({"weight": []}, "weight"),
        ({"weight": None}, "weight"),
        ({"activation": {"bits": 1}}, "activation.bits"),
        ({"activation": {"bits": 9}}, "activation.bits"),
        ({"activation": {"clip_ratio": float("nan")}}, "activation.clip_ratio"),
        ({"activation": {"clip_ratio": 10**400}}, "activation.clip_ratio"),
        ({"activation": {"clip_ratio": "1"}}, "activation.clip_ratio"),
        ({"kv_cache": {"bits": 3}}, "kv_cache.bits"),
        ({"kv_cache": {"clip_ratio": 1.01}}, "kv_cache.clip_ratio"),
        ({"kv_cache": {"bits": 16, "smooth_keys": True}}, "kv_cache.bits"),
        ({"kv_cache": {"smooth_keys": True, "sink_tokens": 64}, "calibration": {"seq_len": 64}}, "calibration.seq_len"),
        (
            {
                "kv_cache": {"smooth_keys": True},
                "transform": {
                    "rotation": "hadamard",
                    "permutation": "transpose",
                    "fold_gains": True,
                    "residual_rotation": "learned",
                },
            },
            "kv_cache.smooth_keys",
        ),
        ({"transform": {"smooth_alpha": -0.1}}, "transform.smooth_alpha"),
        ({"transform": {"rotation": "random"}}, "transform.rotation"),
        ({"transform": {"permutation": "zigzag"}}, "transform.permutation"),
        ({"transform": {"block_size": 1}}, "transform.block_size"),
        ({"transform": {"greedy_steps": 0}}, "transform.greedy_steps"),
        ({"weight": {"clip": "output", "solver": "gptq"}}, "weight.clip"),
        ({"weight": {"descent_passes": 2}}, "weight.descent_passes"),
        ({"weight": {"solver": "gptq", "descent_passes": -1}}, "weight.descent_passes"),
        ({"weight": {"clip": "output", "group_size": 64}}, "weight.clip"),
        ({"transform": {"smooth_statistic": "p99"}}, "transform.smooth_statistic"),
        ({"transform": {"smooth_strength": "best"}}, "transform.smooth_strength"),
        ({"transform": {"smooth_strength": "search", "smooth_alpha": 0.5}}, "transform.smooth_alpha"),
        ({"transform": {"smooth_consumers": "none"}}, "transform.smooth_consumers"),
        ({"transform": {"fold_gains": True, "smooth_alpha": 0.5}}, "transform.fold_gains"),
        ({"transform": {"rotation": "greedy", "permutation": "transpose"}}, "transform.permutation"),
        ({"transform": {"rotation": "reference", "shared_rotation": False}}, "transform.shared_rotation"),
        ({"transform": {"smooth_learned": True, "rotation": "hadamard"}}, "transform.smooth_learned"),
        ({"transform": {"smooth_learned": True}}, "transform.smooth_learned"),
        ({"weight": {"clip": "learned", "solver": "gptq"}}, "weight.clip"),
        ({"weight": {"clip": "learned", "symmetric": True}}, "weight.clip"),
        ({"transform": {"residual_rotation": "learned"}}, "transform.residual_rotation"),
        (
            {
                "transform": {
                    "residual_rotation": "learned",
                    "fold_gains": True,
                    "rotation": "hadamard",
                    "permutation": "transpose",
                },
                "activation": {"bits": 16},
                "kv_cache": {"bits": 16},
            },
            "transform.residual_rotation",
        ),
        ({"transform": {"alignment": "always"}}, "transform.alignment"),
        ({"transform": {"alignment": "best"}}, "transform.alignment"),
        ({"transform": {"alignment": "search"}}, "transform.alignment"),
        ({"transform": {"alignment": "search", "rotation": "hadamard"}}, "transform.alignment"),
        (
            {"transform": {"alignment": "search", "rotation": "greedy", "permutation": "zigzag"}},
            "transform.alignment",
        ),
        (
            {
                "transform": {"alignment": "search", "rotation": "hadamard", "permutation": "zigzag"},
                "activation": {"symmetric": True},
            },
            "transform.alignment",
        ),
        ({"transform": {"residual_rotation": "greedy"}}, "transform.residual_rotation"),
        ({"learning": {"rotation_rate": 0.0}}, "learning.rotation_rate"),
        ({"learning": {"epochs": 0}}, "learning.epochs"),
        ({"distillation": {"steps": -1}}, "distillation.steps"),
        ({"distillation": {"rate": 0.0}}, "distillation.rate"),
        ({"distillation": {"steps": 1, "seq_len": 4096}}, "distillation.seq_len"),
        (
            {"distillation": {"steps": 1}, "calibration": {"samples": 1, "shards": 1, "seq_len": 256}},
            "distillation.seq_len",
        ),
        ({"distillation": {"steps": 1}, "outlier_channels": 8}, "distillation.steps"),
        (
            {
                "distillation": {"steps": 1},
                "transform": {
                    "rotation": "hadamard",
                    "permutation": "transpose",
                    "fold_gains": True,
                    "residual_rotation": "hadamard",
                },
            },
            "distillation.steps",
        ),
        ({"learning": {"clip_rate": 2.0}}, "learning.clip_rate"),
        ({"transform": {"rotation": "balanced"}}, "transform.shared_rotation"),
        ({"transform": {"balance_alpha": 1.5}}, "transform.balance_alpha"),
        ({"transform": {"balance_damp": 0.0}}, "transform.balance_damp"),
        ({"transform": {"rotation": "hadamard", "rotation_dtype": "float16"}}, "transform.rotation_dtype"),
        ({"kv_cache": {"sink_tokens": -1}}, "kv_cache.sink_tokens"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"calibration": {"seq_len": 4}}, "calibration.seq_len"),
        ({"calibration": {"shards": 0}}, "calibration.shards"),
        ({"calibration": {"micro_batch": -1}}, "calibration.micro_batch"),
        ({"calibration": {"search_tokens": 2}}, "calibration.search_tokens"),
        ({"calibration": {"source": {"kind": "url"}}}, "source.kind"),
        ({"calibration": {"source": {"kind": "file", "name": ""}}}, "source.name"),
        ({"calibration": {"source": {"name": "shakespeare"}}}, "source.name"),
        ({"skip_linears": "mlp.down_proj"}, "skip_linears"),
        ({"skip_linears": [1]}, "skip_linears"),
        ({"seed": -1}, "recipe.seed"),
        ({"seed": 10**400}, "recipe.seed"),
        ({"name": ""}, "name"),
        ({"name": "n" * 101}, "name"),
        ({"input_mode": "int4"}, "input_mode"),
        ({"input_mode": "staged"}, "input_mode"),
        ({"input_mode": "staged:0"}, "input_mode"),
        ({"input_mode": "staged:-1"}, "input_mode"),
        ({"input_mode": "staged:2.5"}, "input_mode"),
        ({"input_mode": "staged:02"}, "input_mode"),
        ({"input_mode": "staged:10000"}, "input_mode"),
        ({"input_mode": 2}, "input_mode"),
        ({"refine_passes": -1}, "refine_passes"),
        ({"refine_passes": 9}, "refine_passes"),
        ({"refine_passes": 1, "input_mode": "quantized"}, "refine_passes"),
        ({"refine_passes": 1, "input_mode": "staged:1"}, "refine_passes"),
    ],
)
def test_bad_value_is_an_error_that_names_the_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict(values)
    assert field in str(caught.value)
    assert str(caught.value.facts["field"]).endswith(field.split(".")[-1])


def test_recipe_that_is_no_object_is_an_error() -> None:
    with pytest.raises(ConfigError, match="recipe must be an object"):
        Recipe.from_dict([])


def test_config_error_is_a_value_error_of_ours() -> None:
    assert issubclass(ConfigError, DuQuantError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize("low_high", [(0.0, 1.0)])
def test_ends_of_a_range_are_allowed(low_high: tuple[float, float]) -> None:
    for alpha in low_high:
        assert TransformConfig(smooth_alpha=alpha).smooth_alpha == alpha


def test_digest_ignores_the_name_and_no_field_that_decides_bytes() -> None:
    base = Recipe()
    assert replace(base, name="other").digest() == base.digest()
    changed = [
        replace(base, seed=1),
        replace(base, skip_linears=("mlp.down_proj",)),
        replace(base, weight=WeightConfig(bits=8)),
        replace(base, activation=ActivationConfig(bits=8)),
        replace(base, kv_cache=KVCacheConfig(bits=8)),
        replace(base, transform=TransformConfig(smooth_alpha=0.5)),
        replace(base, calibration=CalibrationConfig(samples=3)),
    ]
    assert len({base.digest(), *(recipe.digest() for recipe in changed)}) == len(changed) + 1


def test_fields_that_came_later_keep_the_digests_of_older_recipes() -> None:
    """The first release's digest of the plainest recipe, from which artifacts are found."""
    assert Recipe().digest() == "72d76200a512e4f68445f396ee7c293c941f90d9632bbca8658a5e534848fed1"
    later = [
        replace(Recipe(), learning=LearningConfig(epochs=7)),
        replace(Recipe(), transform=TransformConfig(fold_gains=True)),
        replace(Recipe(), transform=TransformConfig(smooth_strength="search")),
    ]
    assert len({Recipe().digest(), *(recipe.digest() for recipe in later)}) == 4


def test_rate_and_rounding_of_learned_rotations_count_where_they_are_used() -> None:
    """The rate's default was 1.5 once, and inputs were rounded to bfloat16 twice; artifacts of then are other bytes."""
    spinquant = PRESETS["spinquant"][1]
    assert spinquant.digest() == "f1db8b0b4afa9bb93c6c931467b06309d617718a4580d268c2580b3ec2dfe335"
    faster = replace(spinquant, learning=replace(spinquant.learning, rotation_rate=1.5))
    assert faster.digest() != spinquant.digest()
    # By its default budget, too, which counts as a whole nowhere else.
    plain = replace(spinquant, learning=LearningConfig())
    assert len({replace(plain, learning=LearningConfig(rotation_rate=rate)).digest() for rate in (0.2, 1.5)}) == 2


def test_digest_survives_json() -> None:
    for _, recipe in PRESETS.values():
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))).digest() == recipe.digest()


def test_digest_is_the_same_for_whole_numbers_written_either_way() -> None:
    whole = Recipe.from_dict({"transform": {"smooth_alpha": 1}, "activation": {"clip_ratio": 1}})
    assert whole.digest() == Recipe(transform=TransformConfig(smooth_alpha=1.0)).digest()


def test_digest_is_the_same_in_another_process() -> None:
    # Without the shape checks of the test run, which refuse a whole number where a float is declared.
    code = "from duquant.config import *; print(Recipe(transform=TransformConfig(smooth_alpha=1)).digest())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == Recipe(transform=TransformConfig(smooth_alpha=1.0)).digest()


def test_recipes_are_frozen_and_hashable() -> None:
    recipe = Recipe()
    with pytest.raises(FrozenInstanceError):
        recipe.seed = 1  # type: ignore[misc]
    assert hash(recipe) == hash(Recipe())


def test_list_of_skipped_linears_becomes_a_tuple() -> None:
    assert Recipe.from_dict({"skip_linears": ["mlp.down_proj"]}).skip_linears == ("mlp.down_proj",)


def test_presets_carry_their_own_names() -> None:
    assert all(recipe.name == name for name, (_, recipe) in PRESETS.items())


def test_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="there is no recipe 'best'; the presets are: rtn, smoothquant"):
        preset("best")


def test_calibration_fields_are_replaced_unless_none() -> None:
    recipe = with_calibration(Recipe(), samples=3, seq_len=None)
    assert (recipe.calibration.samples, recipe.calibration.seq_len) == (3, 2048)
    assert with_calibration(Recipe(), samples=None) == Recipe()


def test_importing_the_configuration_loads_no_torch() -> None:
    code = (
        "import sys, duquant, duquant.config, duquant.errors;"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'pydantic'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_quality_gate_is_no_part_of_the_digest_and_survives_json() -> None:
    gated = Recipe.from_dict({"quality_gate": {"min_accuracy": {"piqa": 0.5}, "tasks": ["piqa", "boolq"]}})
    assert gated.digest() == Recipe().digest()
    assert Recipe.from_dict(json.loads(json.dumps(gated.to_dict()))) == gated
    assert hash(gated) == hash(Recipe.from_dict(gated.to_dict()))
    assert gated.quality_gate is not None
    assert gated.quality_gate.least_accuracies == {"piqa": 0.5}
    assert QualityGate(min_accuracy=0.5, tasks=("a", "b")).least_accuracies == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize(
    ("gate", "field", "words"),
    [
        ({}, "quality_gate", "checks nothing"),
        ({"max_perplexity_increase": -0.1}, "quality_gate.max_perplexity_increase", "between"),
        ({"max_perplexity_increase": math.nan}, "quality_gate.max_perplexity_increase", "between"),
        ({"min_accuracy": 60, "tasks": ["piqa"]}, "quality_gate.min_accuracy", "between"),
        ({"min_accuracy": True, "tasks": ["piqa"]}, "quality_gate.min_accuracy", "float"),
        ({"min_accuracy": {"piqa": "x"}, "tasks": ["piqa"]}, "quality_gate.min_accuracy.piqa", "float"),
        ({"min_accuracy": {"boolq": 0.5}, "tasks": ["piqa"]}, "quality_gate.min_accuracy", "'boolq', which is not"),
        ({"min_accuracy": 0.5}, "quality_gate.min_accuracy", "needs quality_gate.tasks"),
        ({"max_perplexity_increase": 1, "tasks": ["piqa"]}, "quality_gate.min_accuracy", "not given"),
        ({"min_accuracy": 0.5, "tasks": ["piqa", "piqa"]}, "quality_gate.tasks", "different"),
        ({"max_perplexity_increase": 1, "text": {"kind": "self"}}, "quality_gate.text.kind", "no text"),
        ({"max_perplexity_increase": 1, "windows": 0}, "quality_gate.windows", "between"),
        ({"max_perplexity_increase": 1, "seqlen": 8}, "quality_gate.seqlen", "unknown"),
    ],
)
def test_a_quality_gate_that_cannot_be_checked_is_refused_by_its_field(gate: dict, field: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        Recipe.from_dict({"quality_gate": gate})
    assert refused.value.facts["field"] == field
