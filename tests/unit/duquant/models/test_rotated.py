"""Rotated models compute what they did, and read their rotations from files that may be broken."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import embedding

from duquant.errors import ScratchError, UnsupportedModelError
from duquant.models.families.gemma import GEMMA3
from duquant.models.rotated import (
    ResidualRotations,
    RotatedCheckpoint,
    require_rotatable,
    rotate_ends,
    rotate_layer,
)
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint

CPU = torch.device("cpu")


def orthogonal(*shape: int) -> torch.Tensor:
    gaussian = torch.randn(*shape, shape[-1], generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"])
def test_every_layer_maps_rotated_inputs_to_rotated_outputs(tiny_model: Callable[..., Path], model_type: str) -> None:
    """Every family: biases, fused linears, experts and their router. In float64, but for transformers' norms."""
    source = SourceCheckpoint(tiny_model(model_type))
    skeleton = Skeleton(source, CPU, dtype=torch.float64)
    R1, R2 = orthogonal(64), orthogonal(skeleton.head_dim)
    X = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer in range(source.layers):
        tensors = skeleton.load(source, layer)
        rotated = rotate_layer(tensors, source.architecture, layer, R1, R2)
        assert set(rotated) == set(tensors)
        with torch.no_grad():
            with skeleton.layer(layer, tensors) as module:
                expected = skeleton.forward(module, X)
            with skeleton.layer(layer, rotated) as module:
                found = skeleton.forward(module, X @ R1)
        bound = 32 * torch.finfo(torch.float32).eps * float(expected.abs().max())
        assert float((found - expected @ R1).abs().max()) < bound


def test_folding_the_gains_alone_changes_no_output(tiny_model: Callable[..., Path]) -> None:
    source = SourceCheckpoint(tiny_model("qwen2"))
    skeleton = Skeleton(source, CPU, dtype=torch.float32)
    tensors = skeleton.load(source, 0)
    folded = rotate_layer(tensors, source.architecture, 0)
    assert torch.equal(folded["input_layernorm.weight"], torch.ones(64))
    X = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), skeleton.layer(0, tensors) as module:
        expected = skeleton.forward(module, X)
    with torch.no_grad(), skeleton.layer(0, folded) as module:
        torch.testing.assert_close(skeleton.forward(module, X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_tied", [False, True])
def test_embeddings_and_head_are_rotated_and_the_final_gain_is_folded(
    tiny_model: Callable[..., Path], is_tied: bool
) -> None:
    source = SourceCheckpoint(tiny_model(tie_word_embeddings=is_tied))
    skeleton = Skeleton(source, CPU, dtype=torch.float64)
    stored = skeleton.load_extra(source)
    R1 = orthogonal(64)
    ends = rotate_ends(stored, source.architecture, R1)
    table, norm, head = (ends[n] for n in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
    tokens = torch.arange(10, 40)
    old_table = stored["model.embed_tokens.weight"].double()
    torch.testing.assert_close(embedding(tokens, table), embedding(tokens, old_table) @ R1)
    X = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old_head = old_table if is_tied else stored["lm_head.weight"].double()
    expected = skeleton.logits(X, stored["model.norm.weight"], old_head)
    torch.testing.assert_close(skeleton.logits(X @ R1, norm, head), expected, rtol=1e-4, atol=1e-5)


def test_a_rotated_checkpoint_reads_rotated_tensors(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tiny_model()
    rotations = ResidualRotations(orthogonal(64), orthogonal(2, 16))
    rotations.save(tmp_path / "rotations.safetensors", {"learning": "{}"})
    loaded, metadata = ResidualRotations.load(tmp_path / "rotations.safetensors")
    assert metadata["learning"] == "{}"
    assert torch.equal(loaded.R1, rotations.R1)
    source, rotated = SourceCheckpoint(path), RotatedCheckpoint(path, loaded, CPU)
    skeleton = Skeleton(source, CPU)
    expected = rotate_layer(skeleton.load(source, 1), source.architecture, 1, rotations.R1, rotations.R2[1])
    found = skeleton.load(rotated, 1)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotated.embedding_table(), source.embedding_table().float() @ rotations.R1.float())


def test_a_broken_file_is_deleted_and_named(tmp_path: Path) -> None:
    path = tmp_path / "rotations.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ScratchError, match="cannot read the rotations"):
        ResidualRotations.load(path)
    assert not path.exists()


def test_norms_on_outputs_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="gemma3_text has norms on what attention and MLP add"):
        require_rotatable(GEMMA3, "gemma3_text")
