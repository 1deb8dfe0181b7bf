"""SourceCheckpoint on good and bad directories."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.skeleton import Skeleton, load_config
from duquant.models.source import SourceCheckpoint, read_json
from duquant.models.tensor_files import hash_tensors

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
CPU = torch.device("cpu")


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_single_file_and_sharded_checkpoints_hold_the_same_tensors(tiny_model: Callable[..., Path]) -> None:
    single, sharded = tiny_model(), tiny_model(shard_size="20KB")
    assert not (single / "model.safetensors.index.json").exists()
    assert len(list(sharded.glob("*.safetensors"))) > 3
    first, second = SourceCheckpoint(single), SourceCheckpoint(sharded)
    assert first.tensor_names() == second.tensor_names()
    names = first.tensor_names()
    assert hash_tensors(first.tensors(names)) == hash_tensors(second.tensors(names))


def test_layer_tensors_are_those_of_the_layer(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model()
    stored = load_file(model / "model.safetensors")
    found = SourceCheckpoint(model).layer_tensors(1, ["mlp.up_proj.weight", "input_layernorm.weight"])
    assert torch.equal(found["mlp.up_proj.weight"], stored["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(found["input_layernorm.weight"], stored["model.layers.1.input_layernorm.weight"])


@pytest.mark.parametrize("tied", [True, False])
def test_tied_heads_are_not_stored(tiny_model: Callable[..., Path], tied: bool) -> None:
    source = SourceCheckpoint(tiny_model(tie_word_embeddings=tied))
    assert ("lm_head.weight" in source.tensor_names()) is not tied
    assert source.layers == 2


def test_path_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    for path in (file, tmp_path / "absent"):
        with pytest.raises(SourceError, match=f"{path} is not a directory"):
            SourceCheckpoint(path)


def test_empty_directory_lacks_its_config(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json is missing"):
        SourceCheckpoint(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", "\xff", '{"a": NaN'])
def test_broken_config_is_named(own_model: Callable[..., Path], content: str) -> None:
    model = own_model()
    (model / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(SourceError, match=r"config\.json"):
        SourceCheckpoint(model)


def test_missing_weights_are_named(own_model: Callable[..., Path]) -> None:
    model = own_model()
    (model / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
        SourceCheckpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt", "x.pkl", "y.pth"])
def test_pickled_weights_are_refused_and_named(own_model: Callable[..., Path], name: str) -> None:
    model = own_model()
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(SourceError, match=f"only pickled weights \\({name}\\)"):
        SourceCheckpoint(model)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights_are_refused_and_named(own_model: Callable[..., Path], keep: int) -> None:
    file = own_model() / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:keep])
    with pytest.raises(SourceError, match=r"model\.safetensors is truncated or not a safetensors file"):
        SourceCheckpoint(file.parent)


def test_missing_shard_is_named(own_model: Callable[..., Path]) -> None:
    model = own_model(shard_size="20KB")
    shard = sorted(model.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(SourceError, match=f"{shard.name} is missing although the index names it"):
        SourceCheckpoint(model)


def test_truncated_shard_is_named(own_model: Callable[..., Path]) -> None:
    model = own_model(shard_size="20KB")
    shard = sorted(model.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(SourceError, match=f"{shard.name} is truncated"):
        SourceCheckpoint(model)


@pytest.mark.parametrize(
    "file",
    ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "pytorch_model.bin", "..", "", 3, None, ["x"]],
)
def test_index_that_points_elsewhere_is_refused(own_model: Callable[..., Path], file: object) -> None:
    model = own_model(shard_size="20KB")
    index = model / "model.safetensors.index.json"
    shutil.copy(next(iter(model.glob("*.safetensors"))), model.parent / "secret.safetensors")
    edit_json(index, lambda values: values["weight_map"].update({Q_PROJ: file}))
    with pytest.raises(SourceError, match=r"index\.json names .*, which is not a safetensors file beside it"):
        SourceCheckpoint(model)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_broken_index_is_named(own_model: Callable[..., Path], content: str) -> None:
    model = own_model(shard_size="20KB")
    (model / "model.safetensors.index.json").write_text(content)
    with pytest.raises(SourceError, match=r"model\.safetensors\.index\.json"):
        SourceCheckpoint(model)


def test_missing_tensor_is_named(own_model: Callable[..., Path]) -> None:
    model = own_model()
    edit_weights(model, lambda tensors: tensors.pop(Q_PROJ))
    source = SourceCheckpoint(model)
    with pytest.raises(SourceError, match=f"tensor {Q_PROJ} is missing"):
        Skeleton(source, CPU).load(source, 0)


@pytest.mark.parametrize("shape", [(64, 65), (63, 64), (64,), (64 * 64,)])
def test_wrong_shape_is_named(own_model: Callable[..., Path], shape: tuple[int, ...]) -> None:
    model = own_model()
    edit_weights(model, lambda tensors: tensors.update({Q_PROJ: torch.ones(shape)}))
    source = SourceCheckpoint(model)
    with pytest.raises(SourceError, match=r"layer 0 self_attn\.q_proj\.weight has shape .*asks for \(64, 64\)"):
        Skeleton(source, CPU).load(source, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_non_finite_weights_are_named(own_model: Callable[..., Path], bad: float, dtype: torch.dtype) -> None:
    model = own_model()

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
        tensors[Q_PROJ][5, 3] = bad

    edit_weights(model, damage)
    with pytest.raises(SourceError, match=f"model\\.safetensors: {Q_PROJ} holds NaN or Inf"):
        SourceCheckpoint(model).tensors([Q_PROJ])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_already_codes_are_refused(own_model: Callable[..., Path], dtype: torch.dtype) -> None:
    model = own_model()
    edit_weights(model, lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 64).to(dtype)}))
    with pytest.raises(SourceError, match=f"{Q_PROJ} has dtype .*already quantized"):
        SourceCheckpoint(model).tensors([Q_PROJ])


@pytest.mark.parametrize("model_type", ["gpt2", "mamba", None, 3, "Llama"])
def test_other_architectures_are_unsupported_and_named(own_model: Callable[..., Path], model_type: object) -> None:
    model = own_model()
    edit_json(model / "config.json", lambda values: values.update(model_type=model_type))
    with pytest.raises(UnsupportedModelError, match=f"model_type {model_type!r} is not supported; supported: .*llama"):
        SourceCheckpoint(model)


def test_remote_code_is_refused(own_model: Callable[..., Path]) -> None:
    model = own_model()
    edit_json(model / "config.json", lambda values: values.update(auto_map={"AutoModel": "evil.Model"}))
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        SourceCheckpoint(model)


def test_quantized_source_is_refused(own_model: Callable[..., Path]) -> None:
    model = own_model()
    edit_json(model / "config.json", lambda values: values.update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        load_config(SourceCheckpoint(model))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", "2"),
        ("hidden_size", -64),
        ("hidden_size", 64.0),
        ("hidden_size", 10**9),
        ("intermediate_size", None),
        ("intermediate_size", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", []),
        ("vocab_size", 10**12),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 8),
        ("num_key_value_heads", "2"),
        ("head_dim", 0),
        ("head_dim", -16),
        ("head_dim", 15),
        ("head_dim", 10**7),
        ("head_dim", "16"),
    ],
)
def test_silly_sizes_are_named(own_model: Callable[..., Path], field: str, value: object) -> None:
    model = own_model()
    edit_json(model / "config.json", lambda values: values.update({field: value}))
    with pytest.raises(SourceError, match=f"config\\.json: {field} is "):
        SourceCheckpoint(model)


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_missing_sizes_are_named(own_model: Callable[..., Path], field: str) -> None:
    model = own_model()
    edit_json(model / "config.json", lambda values: values.pop(field))
    with pytest.raises(SourceError, match=f"config\\.json: {field} is None"):
        SourceCheckpoint(model)


def test_heads_that_do_not_divide_the_hidden_size_need_a_head_dim(own_model: Callable[..., Path]) -> None:
    model = own_model()

    def change(values: dict[str, Any]) -> None:
        values.update(hidden_size=66)
        values.pop("head_dim", None)

    edit_json(model / "config.json", change)
    with pytest.raises(SourceError, match=r"config\.json: head_dim"):
        SourceCheckpoint(model)


@pytest.mark.parametrize("change", [{"rope_parameters": 3}, {"hidden_act": "no-such-function"}])
def test_config_that_transformers_refuses_is_our_error(own_model: Callable[..., Path], change: dict[str, Any]) -> None:
    model = own_model()
    edit_json(model / "config.json", lambda values: values.update(change))
    source = SourceCheckpoint(model)
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        Skeleton(source, CPU)


def test_directory_in_place_of_a_json_file_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(SourceError, match=r"config\.json is not readable JSON"):
        read_json(tmp_path / "config.json")


def test_untied_head_that_is_not_there_is_named(own_model: Callable[..., Path]) -> None:
    model = own_model()
    edit_weights(model, lambda tensors: tensors.pop("lm_head.weight"))
    source = SourceCheckpoint(model)
    with pytest.raises(SourceError, match=r"tensor lm_head\.weight is missing"):
        Skeleton(source, CPU).load_extra(source)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"])
def test_wrong_shape_outside_the_layers_is_named(own_model: Callable[..., Path], name: str) -> None:
    model = own_model()
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    source = SourceCheckpoint(model)
    with pytest.raises(SourceError, match=f"{name} has shape .*; config.json asks for"):
        Skeleton(source, CPU).load_extra(source)


def test_tied_head_that_is_stored_all_the_same_is_left_out(own_model: Callable[..., Path]) -> None:
    model = own_model(tie_word_embeddings=True)
    edit_weights(model, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    source = SourceCheckpoint(model)
    assert set(Skeleton(source, CPU).load_extra(source)) == {"model.embed_tokens.weight", "model.norm.weight"}
