"""Layers lent to the skeleton compute what the whole model computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint

CPU = torch.device("cpu")
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 1}),
    ("qwen3", {}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 0}),
    ("gemma3_text", {}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"], "attention_bias": True}),
    ("phi3", {}),
    ("phi3", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 10}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"mlp_only_layers": [0]}),
]


@pytest.mark.parametrize(("model_type", "changes"), MODELS, ids=str)
@pytest.mark.parametrize("seq_len", [1, 7, 40])
@torch.no_grad()
def test_layer_by_layer_equals_the_whole_model(
    tiny_model: Callable[..., Path], model_type: str, changes: dict[str, Any], seq_len: int
) -> None:
    path = tiny_model(model_type, **changes)
    source = SourceCheckpoint(path)
    skeleton = Skeleton(source, CPU)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 259, (2, seq_len), generator=torch.Generator().manual_seed(0))
    # The last of the hidden states has gone through the final norm, so that one is not compared.
    expected = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    X = skeleton.embed(ids, skeleton.load_extra(source)[source.architecture.embeddings])
    for index in range(source.layers):
        torch.testing.assert_close(X, expected[index], rtol=0, atol=0)
        with skeleton.layer(index, skeleton.load(source, index)) as layer:
            X = skeleton.forward(layer, X)
    torch.testing.assert_close(model.model.norm(X), expected[-1], rtol=0, atol=0)


@torch.no_grad()
def test_sliding_window_is_felt(tiny_model: Callable[..., Path]) -> None:
    """Guards the test above: with a window shorter than the sequence the result is another one."""
    outputs = []
    for window in (12, None):
        source = SourceCheckpoint(tiny_model("mistral", sliding_window=window))
        skeleton = Skeleton(source, CPU)
        with skeleton.layer(0, skeleton.load(source, 0)) as layer:
            X = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
            outputs.append(skeleton.forward(layer, X))
    assert torch.equal(outputs[0][:, :12], outputs[1][:, :12])
    assert not torch.equal(outputs[0][:, 12:], outputs[1][:, 12:])


def test_layer_keeps_nothing_after_the_loan(tiny_model: Callable[..., Path]) -> None:
    source = SourceCheckpoint(tiny_model())
    skeleton = Skeleton(source, CPU)
    with skeleton.layer(0, skeleton.load(source, 0)) as layer:
        assert all(p.device.type == "cpu" for p in layer.parameters())
    assert all(p.device.type == "meta" for p in layer.parameters())
    with pytest.raises(RuntimeError, match="on purpose"), skeleton.layer(0, skeleton.load(source, 0)) as layer:
        raise RuntimeError("on purpose")
    assert all(p.device.type == "meta" for p in layer.parameters())


def test_skeleton_leaves_the_global_generator_alone(tiny_model: Callable[..., Path]) -> None:
    before = torch.get_rng_state()
    Skeleton(SourceCheckpoint(tiny_model()), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_stored_float32_weights_are_read_as_they_are(own_model: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    path = own_model()
    tensors = {name: t.float() for name, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    source = SourceCheckpoint(path)
    assert all(t.dtype == torch.float32 for t in Skeleton(source, CPU).load(source, 0).values())
