"""The packed KV cache as transformers uses caches."""

import pytest
import torch

from duquant.config import KVCacheConfig
from duquant.inference.cache import DuQuantCache, DuQuantCacheLayer
from duquant.quantizers.keys import KeySmoothing
from duquant.quantizers.kv import KVQuantizer

HEAD_DIM = 16


def states(tokens: int, *, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def filled(tokens: int = 5) -> tuple[DuQuantCacheLayer, torch.Tensor, torch.Tensor]:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(rotate=True), HEAD_DIM))
    keys, values = layer.update(states(tokens), states(tokens, seed=1))
    return layer, keys, values


def contents(layer: DuQuantCacheLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """All that is cached, dequantized."""
    return layer._keys.read(torch.float32), layer._values.read(torch.float32)


def test_tokens_one_by_one_equal_tokens_at_once() -> None:
    layer, keys, values = filled()
    stepwise = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(rotate=True), HEAD_DIM))
    for token in range(5):
        result = stepwise.update(states(5)[:, :, token : token + 1], states(5, seed=1)[:, :, token : token + 1])
    # The codes are equal; rotating back is one matrix product of another height.
    torch.testing.assert_close(result[0], keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result[1], values, rtol=1e-5, atol=1e-5)
    assert stepwise._keys.packed is not None
    assert layer._keys.packed is not None
    assert all(torch.equal(a, b) for a, b in zip(stepwise._keys.packed, layer._keys.packed, strict=True))


def test_new_tokens_leave_the_old_ones_alone() -> None:
    layer, keys, values = filled()
    more = layer.update(states(2, seed=2), states(2, seed=3))
    assert more[0].shape[2] == layer.get_seq_length() == 7
    torch.testing.assert_close(more[0][:, :, :5], keys, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(more[1][:, :, :5], values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_states_come_back_in_their_dtype(dtype: torch.dtype) -> None:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(), HEAD_DIM))
    keys, values = layer.update(states(3).to(dtype), states(3).to(dtype))
    assert keys.dtype == values.dtype == layer.dtype == dtype


def test_sizes_are_those_that_masks_are_made_of() -> None:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(), HEAD_DIM))
    assert (layer.get_seq_length(), layer.get_mask_sizes(4)) == (0, (4, 0))
    layer.update(states(5), states(5))
    assert (layer.get_seq_length(), layer.get_mask_sizes(1)) == (5, (6, 0))
    assert layer.get_max_cache_shape() == layer.get_max_length() == -1


def test_crop_drops_the_last_tokens() -> None:
    layer, keys, values = filled()
    layer.crop(-2)
    assert layer.get_seq_length() == 3
    left = contents(layer)
    torch.testing.assert_close(left[0], keys[:, :, :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left[1], values[:, :, :3], rtol=1e-5, atol=1e-5)
    layer.crop(0)
    assert layer.get_seq_length() == 3


def test_positive_crop_is_refused_as_by_transformers() -> None:
    layer, _, _ = filled()
    with pytest.raises(ValueError, match="minus the number of tokens"):
        layer.crop(2)


@pytest.mark.parametrize("order", [[2, 0, 1], [0, 0, 2], [1, 1, 1]])
def test_beams_are_reordered(order: list[int]) -> None:
    layer, keys, values = filled()
    layer.reorder_cache(torch.tensor(order))
    left = contents(layer)
    torch.testing.assert_close(left[0], keys[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left[1], values[order], rtol=1e-5, atol=1e-5)


def test_rows_are_repeated_and_selected() -> None:
    layer, keys, _ = filled()
    layer.batch_repeat_interleave(2)
    torch.testing.assert_close(contents(layer)[0], keys.repeat_interleave(2, dim=0), rtol=1e-5, atol=1e-5)
    layer.batch_select_indices(torch.tensor([5, 0]))
    torch.testing.assert_close(contents(layer)[0], keys[[2, 0]], rtol=1e-5, atol=1e-5)


def test_operations_on_an_empty_cache_do_nothing() -> None:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(), HEAD_DIM))
    layer.reorder_cache(torch.tensor([0]))
    layer.crop(-1)
    layer.batch_repeat_interleave(2)
    assert layer.size_bytes() == 0


def test_reset_forgets_everything() -> None:
    layer, _, _ = filled()
    layer.reset()
    assert (layer.get_seq_length(), layer.size_bytes(), layer.is_initialized) == (0, 0, False)


@pytest.mark.parametrize(("bits", "code_bytes"), [(2, 4), (4, 8), (8, 16)])
def test_cache_holds_packed_codes(bits: int, code_bytes: int) -> None:
    cache = DuQuantCache(KVCacheConfig(bits=bits), windows=[None, None], head_dim=HEAD_DIM)
    for index in range(2):
        cache.update(states(5), states(5), index)
    rows = 3 * 2 * 5
    assert cache.size_bytes() == 2 * 2 * rows * (code_bytes + 2 + 2)  # layers, K and V, float16 scale and low end
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("steps", [[6], [1, 1, 1, 1, 1, 1], [2, 3, 1], [4, 2]])
def test_sinks_keep_their_bits_however_the_tokens_come(steps: list[int]) -> None:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(sink_tokens=3), HEAD_DIM))
    plain = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(), HEAD_DIM))
    sent, first = states(6), 0
    for step in steps:
        keys, values = layer.update(sent[:, :, first : first + step], sent[:, :, first : first + step])
        rounded, _ = plain.update(sent[:, :, first : first + step], sent[:, :, first : first + step])
        first += step
    assert torch.equal(keys[:, :, :3], sent[:, :, :3])
    assert torch.equal(keys, values)
    assert torch.equal(keys[:, :, 3:], rounded[:, :, 3:])
    assert layer.get_seq_length() == 6
    assert layer.size_bytes() == 2 * 3 * 2 * (3 * HEAD_DIM * 4 + 3 * (HEAD_DIM // 2 + 4))


def test_sinks_are_cropped_last_and_filled_again() -> None:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(sink_tokens=3), HEAD_DIM))
    sent = states(6)
    layer.update(sent, sent)
    layer.crop(-4)
    assert layer.get_seq_length() == 2
    keys, _ = layer.update(sent[:, :, 2:5], sent[:, :, 2:5])
    assert torch.equal(keys[:, :, :3], sent[:, :, :3])
    assert not torch.equal(keys[:, :, 3:], sent[:, :, 3:5])
    layer.crop(-9)
    assert layer.get_seq_length() == 0
    layer.reorder_cache(torch.tensor([0]))


def test_sinks_follow_their_rows() -> None:
    layer = DuQuantCacheLayer(KVQuantizer(KVCacheConfig(sink_tokens=2), HEAD_DIM))
    sent = states(4)
    layer.update(sent, sent)
    layer.reorder_cache(torch.tensor([2, 0, 1]))
    assert torch.equal(contents(layer)[0][:, :, :2], sent[[2, 0, 1], :, :2])


def sliding(window: int = 4, sinks: int = 0) -> DuQuantCacheLayer:
    return DuQuantCacheLayer(KVQuantizer(KVCacheConfig(sink_tokens=sinks), HEAD_DIM), window=window)


@pytest.mark.parametrize("sinks", [0, 2, 6])
@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 1, 10], [3, 3, 3, 3, 8], [20]], ids=str)
def test_sliding_layer_returns_what_its_window_sees(cuts: list[int], sinks: int) -> None:
    layer, whole = sliding(sinks=sinks), DuQuantCacheLayer(KVQuantizer(KVCacheConfig(sink_tokens=sinks), HEAD_DIM))
    first = 0
    for new in cuts:
        part = states(20)[:, :, first : first + new]
        length, offset = layer.get_mask_sizes(new)
        found, expected = layer.update(part, part)[0], whole.update(part, part)[0]
        first += new
        assert (layer.get_seq_length(), offset + length) == (first, first)
        assert length == min(first - new, 3) + new
        assert torch.equal(found, expected[:, :, offset:])


def test_sliding_layer_holds_no_more_than_its_window() -> None:
    layer = sliding()
    sizes = []
    for token in range(300):
        part = states(300)[:, :, token : token + 1]
        layer.update(part, part)
        sizes.append(layer.size_bytes())
    assert set(sizes[3:]) == {sizes[3]}
    assert layer._keys._buffers is not None
    assert layer._keys._buffers.packed.shape[2] < 64


def test_sliding_layer_is_cropped_as_long_as_it_remembers() -> None:
    layer, other = sliding(), sliding()
    parts = states(12)
    layer.update(parts[:, :, :8], parts[:, :, :8])
    other.update(parts[:, :, :6], parts[:, :, :6])
    layer.crop(-2)
    for each in (layer, other):
        assert each.get_mask_sizes(1) == (4, 3)
    last = [each.update(parts[:, :, 8:9], parts[:, :, 8:9])[0] for each in (layer, other)]
    assert torch.equal(last[0], last[1])
    with pytest.raises(ValueError, match="forgotten what came before the last 4 tokens"):
        layer.crop(-2)
    layer.reset()
    assert (layer.get_seq_length(), layer.get_mask_sizes(2)) == (0, (2, 0))


@pytest.mark.parametrize("sinks", [0, 2])
def test_smoothed_keys_come_back_as_they_were_and_values_are_left_alone(sinks: int) -> None:
    """A large mean takes most of a grid's range, until it is taken off."""
    quantizer = KVQuantizer(KVCacheConfig(rotate=True, smooth_keys=True, sink_tokens=sinks), HEAD_DIM)
    center = 20 * states(1, batch=1)[0, :, 0]
    keys, values = states(7) + center[:, None], states(7, seed=1)
    smoothing = {1: KeySmoothing(center, torch.full((2, HEAD_DIM), 3.0))}
    cache = DuQuantCache(quantizer.config, windows=[None, None], head_dim=HEAD_DIM, smoothing=smoothing)
    (plain, plain_values), (smooth, smooth_values) = (cache.update(keys, values, layer) for layer in (0, 1))
    assert torch.equal(smooth_values, plain_values)
    assert float((smooth - keys).square().sum()) < 0.01 * float((plain - keys).square().sum())
    torch.testing.assert_close(smooth[:, :, :sinks], keys[:, :, :sinks])
    more = cache.update(keys[:, :, :1], values[:, :, :1], 1)[0]
    torch.testing.assert_close(more[:, :, :7], smooth)
    cache.layers[1].reset()
    torch.testing.assert_close(cache.update(keys, values, 1)[0], smooth)
