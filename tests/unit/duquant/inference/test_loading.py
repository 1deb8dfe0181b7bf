"""Loading, saving, and refusing what was changed."""

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import SIZES
from transformers import AutoModelForCausalLM

from duquant.artifact import verify
from duquant.artifact.shards import sha256_file
from duquant.config import ActivationConfig, KVCacheConfig, Recipe, TransformConfig, WeightConfig
from duquant.errors import ArtifactError
from duquant.inference import DuQuantConfig, generate_text, load, save
from duquant.inference.cache import DuQuantCache
from duquant.kernels import rms_norm
from duquant.models.families.llama import LLAMA

SHARD = "model-layer-0001.safetensors"
IDS = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biases": ("qwen2", {}, {}),
    "all biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "q and k norms": ("qwen3", {"tie_word_embeddings": True}, {}),
    "sliding window": ("mistral", {}, {}),
    "norms of 1 + weight": ("gemma3_text", {}, {}),
    "fused linears": ("phi3", {}, {}),
    "experts": ("mixtral", {}, {}),
    "experts and a dense layer": ("qwen3_moe", {"mlp_only_layers": [1]}, {}),
    "experts left out": ("qwen3_moe", {}, {"skip_linears": ("mlp.experts.*.*_proj",)}),
    "experts' 16-bit activations": ("mixtral", {}, {"activation": ActivationConfig(bits=16)}),
    "groups": ("llama", {}, {"weight": WeightConfig(group_size=16)}),
    "8 bits": ("llama", {}, {"weight": WeightConfig(bits=8), "activation": ActivationConfig(bits=8)}),
    "16-bit activations": ("llama", {}, {"activation": ActivationConfig(bits=16), "kv_cache": KVCacheConfig(bits=16)}),
    "no transform": ("llama", {}, {"transform": TransformConfig()}),
    "two factors": (
        "llama",
        {},
        {"transform": TransformConfig(rotation="hadamard", permutation="transpose", fold_gains=True)},
    ),
    "groups that do not divide": ("llama", {}, {"weight": WeightConfig(group_size=40)}),
    "no permutation": ("llama", {}, {"transform": TransformConfig(rotation="hadamard", block_size=16)}),
    "own rotations": (
        "llama",
        {},
        {"transform": TransformConfig(rotation="hadamard", permutation="zigzag", block_size=16, shared_rotation=False)},
    ),
    "float16 blocks": (
        "llama",
        {},
        {
            "transform": TransformConfig(
                rotation="balanced", permutation="zigzag", shared_rotation=False, rotation_dtype="float16"
            )
        },
    ),
    "left out": ("llama", {}, {"skip_linears": ("mlp.down_proj",)}),
    "all left out": ("llama", {}, {"skip_linears": LLAMA.linears_of(0)}),
}


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def variant(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tiny_artifact: Callable[..., Any],
    recipe: Recipe,
) -> Path:
    """An artifact of each kind."""
    model_type, sizes, changes = request.param
    path: Path = tiny_artifact(tiny_model(model_type, **sizes), replace(recipe, **changes)).artifact
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


def test_saved_again_every_shard_and_the_index_are_byte_equal(variant: Path, tmp_path: Path) -> None:
    model, _ = load(variant)
    save(model, tmp_path)
    names = {path.name for path in variant.iterdir() if "safetensors" in path.name}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        assert (tmp_path / name).read_bytes() == (variant / name).read_bytes(), name


def test_save_pretrained_and_reload_give_the_same_logits(variant: Path, tmp_path: Path) -> None:
    model, _ = load(variant)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(again))


def test_every_variant_gives_finite_logits_and_text(variant: Path) -> None:
    model, _ = load(variant)
    assert bool(torch.isfinite(logits(model)).all())
    output = model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert output.shape == (2, 23)


@pytest.mark.parametrize("model_type", SIZES)
def test_little_rounding_leaves_the_logits_close_to_the_source_s(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], fine_recipe: Recipe, model_type: str
) -> None:
    source = tiny_model(model_type)
    model, _ = load(tiny_artifact(source, fine_recipe).artifact)
    expected, bfloat16 = (
        logits(AutoModelForCausalLM.from_pretrained(source, dtype=dtype)).float()
        for dtype in (torch.float32, torch.bfloat16)
    )

    def error(found: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    # An 8-bit row of normal weights errs by 6 sigma / 255 / sqrt(12), 0.7 % of it: 2 % after eight linears in a row,
    # and no more than twice that where they amplify one another. The rest is what bfloat16 costs the source itself.
    assert error(logits(model).float()) < error(bfloat16) + 0.04


def test_fewer_bits_err_more(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], recipe: Recipe, fine_recipe: Recipe
) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32))
    errors = [
        float((logits(load(tiny_artifact(with_recipe=r).artifact)[0]).float() - expected).norm())
        for r in (fine_recipe, recipe)
    ]
    assert errors[0] < errors[1]


def test_model_carries_its_manifest_and_tokenizer(tiny_artifact: Callable[..., Any]) -> None:
    summary = tiny_artifact()
    model, tokenizer = load(summary.artifact)
    assert model.duquant_manifest.fingerprint == summary.fingerprint
    assert tokenizer.decode(tokenizer("héllo")["input_ids"]) == "héllo"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("damage", ["change", "remove", "extra", "schema"])
def test_changed_artifact_is_refused(own_artifact: Path, damage: str) -> None:
    file = own_artifact / SHARD
    if damage == "change":
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)
    elif damage == "remove":
        file.unlink()
    elif damage == "extra":
        (own_artifact / "modeling.py").write_text("x")
    else:
        manifest = own_artifact / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(ArtifactError):
        load(own_artifact)


def test_directory_that_is_no_artifact_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for path in (tiny_model(), tmp_path, tmp_path / "absent"):
        with pytest.raises(ArtifactError, match="not a finished duquant artifact"):
            load(path)


def rewrite(artifact: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a shard and make index and manifest agree with it, as a broken writer would."""
    tensors = load_file(artifact / SHARD)
    change(tensors)
    save_file(tensors, artifact / SHARD, metadata={"format": "pt"})
    index = json.loads((artifact / "model.safetensors.index.json").read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    index["weight_map"] = kept | dict.fromkeys(tensors, SHARD)
    (artifact / "model.safetensors.index.json").write_text(json.dumps(index))
    manifest = json.loads((artifact / "manifest.json").read_text())
    for entry in manifest["files"]:
        path = artifact / entry["name"]
        entry.update(sha256=sha256_file(path), size_bytes=path.stat().st_size)
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    assert verify(artifact).ok


@pytest.mark.parametrize(
    "name",
    [
        "mlp.down_proj.weight_scale",
        "mlp.down_proj.weight_packed",
        "mlp.down_proj.weight_zero_point",
        "mlp.mlp_out.R1",
        "mlp.mlp_out.perm",
        "mlp.mlp_out.act_clip_ratio",
        "input_layernorm.weight",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_missing_tensor_is_refused_and_named(own_artifact: Path, name: str) -> None:
    rewrite(own_artifact, lambda tensors: tensors.pop(f"model.layers.1.{name}"))
    with pytest.raises(ArtifactError, match=f"missing keys while loading: model.layers.1.{name}"):
        load(own_artifact)


@pytest.mark.filterwarnings("ignore")
def test_surplus_tensor_is_refused_and_named(own_artifact: Path) -> None:
    rewrite(own_artifact, lambda tensors: tensors.update({"model.layers.1.mlp.surplus": torch.ones(2)}))
    with pytest.raises(ArtifactError, match=r"unexpected keys while loading: model\.layers\.1\.mlp\.surplus"):
        load(own_artifact)


@pytest.mark.parametrize("name", ["mlp.down_proj.weight_packed", "mlp.mlp_out.R1", "input_layernorm.weight"])
@pytest.mark.filterwarnings("ignore")
def test_tensor_of_another_shape_is_refused(own_artifact: Path, name: str) -> None:
    full = f"model.layers.1.{name}"
    rewrite(own_artifact, lambda tensors: tensors.update({full: tensors[full][:-1].clone()}))
    with pytest.raises(ArtifactError, match=name):
        load(own_artifact)


def test_other_schema_version_in_the_config_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ArtifactError, match="schema version 2"):
        DuQuantConfig(recipe=recipe.to_dict(), schema_version=2)


def test_text_is_generated_and_the_same_for_the_same_seed(tiny_artifact: Callable[..., Any]) -> None:
    artifact = tiny_artifact().artifact
    greedy = [generate_text(artifact, "The quick", max_new_tokens=5) for _ in range(2)]
    sampled = [generate_text(artifact, "The quick", max_new_tokens=20, seed=seed) for seed in (1, 1, 2)]
    assert greedy[0] == greedy[1]
    assert sampled[0] == sampled[1] != sampled[2]


def test_recipe_with_a_16_bit_cache_leaves_the_model_s_own_cache(
    tiny_artifact: Callable[..., Any], fine_recipe: Recipe
) -> None:
    model, _ = load(tiny_artifact(with_recipe=fine_recipe).artifact)
    assert not isinstance(model(IDS).past_key_values, DuQuantCache)


def test_threads_that_load_at_once_leave_the_default_dtype_alone(tiny_artifact) -> None:
    path = tiny_artifact().artifact
    with ThreadPoolExecutor(4) as pool:
        for loaded in [pool.submit(load, path) for _ in range(8)]:
            assert loaded.result()[0] is not None
    assert torch.get_default_dtype() == torch.float32


def test_a_model_runs_while_another_thread_has_set_the_default_dtype(tiny_artifact) -> None:
    model, tokenizer = load(tiny_artifact().artifact)
    ids = tokenizer("hello world", return_tensors="pt")
    expected = model(**ids).logits
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
    try:
        assert torch.equal(model(**ids).logits, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_norms_of_a_loaded_model_take_one_pass_where_there_is_a_kernel(
    tiny_model: Callable[..., Path],
    tiny_artifact: Callable[..., Any],
    recipe: Recipe,
    model_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = load(tiny_artifact(tiny_model(model_type), recipe).artifact)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    calls = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return rms_norm(*args)

    monkeypatch.setattr("duquant.inference.norms.rms_norm", counted)
    logits(model)
    assert len(calls) == (0 if model_type == "gemma3_text" else len(norms))
    calls.clear()
    logits(copy.deepcopy(model))
    assert len(calls) == (0 if model_type == "gemma3_text" else len(norms))
