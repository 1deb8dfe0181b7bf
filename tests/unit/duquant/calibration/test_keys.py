"""Statistics of keys and queries: those that attention really sees, whatever the family, micro-batch and shard."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_models import SIZES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from duquant.calibration.keys import KeyRecorder, KeyStatistics
from duquant.errors import CalibrationError
from duquant.models.attention import OBSERVABLE, observed
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint

CPU = torch.device("cpu")


def recorded(
    model: Path, X: Tensor, *, layer: int = 0, batches: int = 1, first_token: int = 1, stride: int = 1
) -> KeyStatistics:
    source = SourceCheckpoint(model)
    skeleton = Skeleton(source, CPU, dtype=torch.float32)
    recorder = KeyRecorder(first_token=first_token, stride=stride)
    with skeleton.layer(layer, skeleton.load(source, layer)) as module, recorder.attached(module), torch.no_grad():
        for part in X.chunk(batches):
            skeleton.forward(module, part)
    return recorder.finish()


def inputs(model: Path, batch: int = 2, tokens: int = 9) -> Tensor:
    hidden = int(SourceCheckpoint(model).config["hidden_size"])
    return torch.randn(batch, tokens, hidden, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("model_type", SIZES)
def test_they_are_of_the_keys_that_transformers_caches(tiny_model: Callable[..., Path], model_type: str) -> None:
    path = tiny_model(model_type)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(18).view(2, 9)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        keys = model(ids, use_cache=True).past_key_values.layers[0].keys
    found = recorded(path, seen[0])
    assert int(found.tokens) == 2 * 8
    torch.testing.assert_close(found.key_sum.float(), keys[:, :, 1:].sum((0, 2)))
    torch.testing.assert_close(found.key_square_sum.float(), keys[:, :, 1:].square().sum((0, 2)))


def test_queries_are_those_of_the_heads_that_share_a_key_head(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    X, seen = inputs(path), []
    source = SourceCheckpoint(path)
    skeleton = Skeleton(source, CPU, dtype=torch.float32)
    with skeleton.layer(0, skeleton.load(source, 0)) as module, torch.no_grad():
        with observed(module, lambda queries, _keys: seen.append(queries)):
            skeleton.forward(module, X)
        skeleton.forward(module, X)
    assert len(seen) == 1, "nobody looks after the block"
    squares = seen[0][:, :, 1:].square().sum((0, 2))
    found = recorded(path, X).query_square_sum
    group = squares.shape[0] // found.shape[0]
    assert group > 1
    for head in range(found.shape[0]):
        torch.testing.assert_close(found[head].float(), squares[head * group : (head + 1) * group].sum(0))


def test_micro_batches_and_shards_only_add_up(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    X = inputs(path, batch=4)
    whole = recorded(path, X)
    for other in (recorded(path, X, batches=4), KeyStatistics.merge([recorded(path, part) for part in X.chunk(2)])):
        for name, tensor in whole.tensors().items():
            torch.testing.assert_close(other.tensors()[name], tensor)


def test_one_of_so_many_tokens_counts_drawn_anew_for_every_window() -> None:
    seen: list[Tensor] = []

    class Watched(KeyRecorder):
        def _draw(self, tokens: int) -> Tensor:
            seen.append(super()._draw(tokens))
            return seen[-1]

    def counted(batches: list[int]) -> KeyStatistics:
        recorder = Watched(first_token=4, stride=10)
        for batch in batches:
            positions = torch.arange(97.0).view(1, 1, 97, 1).expand(batch, 1, 97, 1)
            recorder.add(positions, positions)
        return recorder.finish()

    found = counted([3])
    assert int(found.tokens) == 3 * 10
    assert float(found.key_sum) == float(torch.cat(seen).sum())
    for drawn in seen:
        assert ((drawn - 4) // 10).tolist() == list(range(10))
        assert int(drawn.max()) < 97
    assert len({tuple(drawn.tolist()) for drawn in seen}) == 3
    assert float(counted([2, 1]).key_sum) == float(found.key_sum)


def test_attention_is_what_it_was(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    source = SourceCheckpoint(path)
    skeleton = Skeleton(source, CPU)
    assert skeleton.config._attn_implementation == OBSERVABLE
    X = inputs(path).bfloat16()
    with skeleton.layer(0, skeleton.load(source, 0)) as module, torch.no_grad():
        ours = skeleton.forward(module, X)
        skeleton.config._attn_implementation = "sdpa"
        assert torch.equal(ours, skeleton.forward(module, X))


def test_windows_that_are_too_short_are_refused(tiny_model: Callable[..., Path]) -> None:
    path = tiny_model("llama")
    with pytest.raises(CalibrationError, match="no keys reached the statistics"):
        recorded(path, inputs(path), first_token=9)


def test_keys_that_are_not_finite_are_refused() -> None:
    recorder = KeyRecorder(first_token=0, stride=1)
    layer = nn.Module()
    layer.self_attn = nn.Module()
    with recorder.attached(layer):
        recorder.add(torch.ones(1, 2, 3, 4), torch.full((1, 2, 3, 4), float("inf")))
    with pytest.raises(CalibrationError, match="keys or queries are NaN or Inf"):
        recorder.finish()
