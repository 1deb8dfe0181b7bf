"""Batches, padding and caches: every way of running the model gives the same answer.

The activation grid of a row depends on that row alone, so a batch is exact in principle. What differs is the order of
floating-point sums (a matrix product of another height), and a last bit that differs next to a rounding boundary moves
a code by one. Strict tests therefore run in float64 on a recipe without rotations, where everything before a rounding
is the same arithmetic on every row: logits then agree to float32's precision. With rotations (a float32 product) a
code may flip, and only closeness is asked for.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import SIZES
from transformers import AutoModelForCausalLM

from duquant.calibration.text import calibration_windows
from duquant.config import KVCacheConfig, Recipe, TransformConfig
from duquant.inference import load
from duquant.inference.attention import IMPLEMENTATION
from duquant.inference.cache import DuQuantCache
from duquant.inference.hf import sliding_windows
from duquant.kernels import dispatch
from duquant.kernels.settings import BACKENDS

PROMPTS = ["The quick brown fox", "counts", "to 9 and jumps,"]
STRICT = 1e-5
"""float32 roundings (6e-8) of what is rounded, through a dozen operations."""
GRID_MOVED = 1e-4
"""As STRICT, where the kernels that differ (one new token, or many) may move a cached float16 grid by its last bit."""


@pytest.fixture
def plain(recipe: Recipe) -> Recipe:
    """W4A4KV4 without rotations."""
    return replace(recipe, transform=TransformConfig(smooth_alpha=0.5), kv_cache=KVCacheConfig(clip_ratio=0.95))


@pytest.fixture
def strict(tiny_artifact: Callable[..., Any], plain: Recipe) -> Callable[..., Any]:
    """Factory of (model, tokenizer) in float64, without rotations."""

    def make(model: Path | None = None, *, sinks: int = 0, smooth_keys: bool = False) -> Any:
        kv_cache = replace(plain.kv_cache, sink_tokens=sinks, smooth_keys=smooth_keys)
        recipe = replace(plain, kv_cache=kv_cache)
        loaded, tokenizer = load(tiny_artifact(model, recipe).artifact)
        return loaded.double(), tokenizer

    return make


def batch_of(tokenizer: Any, prompts: list[str], side: str) -> dict[str, torch.Tensor]:
    tokenizer.padding_side = side
    inputs = dict(tokenizer(prompts, return_tensors="pt", padding=True))
    mask = inputs["attention_mask"]
    return {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


@torch.no_grad()
def rows_of(model: Any, tokenizer: Any, side: str, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(logits in the batch, logits alone) of every row's real tokens."""
    inputs = batch_of(tokenizer, PROMPTS[:count], side)
    together = model(**inputs).logits
    pairs = []
    for row in range(count):
        real = inputs["attention_mask"][row].bool()
        alone = model(inputs["input_ids"][row, real][None]).logits[0]
        pairs.append((together[row, real], alone))
    return pairs


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_a_padded_batch_are_as_alone(
    tiny_model: Callable[..., Path], strict: Callable[..., Any], model_type: str, side: str, count: int
) -> None:
    model, tokenizer = strict(tiny_model(model_type))
    for together, alone in rows_of(model, tokenizer, side, count):
        torch.testing.assert_close(together, alone, rtol=STRICT, atol=STRICT * float(alone.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_close_with_rotations(tiny_artifact: Callable[..., Any], side: str) -> None:
    model, tokenizer = load(tiny_artifact().artifact)
    for together, alone in rows_of(model.double(), tokenizer, side, 3):
        # A flipped code is one step of 15 in one of 64 channels: under one per cent of the row, here a few of them.
        assert float((together - alone).norm() / alone.norm()) < 0.03


@torch.no_grad()
@pytest.mark.parametrize("smooth_keys", [False, True])
@pytest.mark.parametrize(("model_type", "prompt"), [("llama", 1), *((name, 15) for name in SIZES)])
def test_tokens_one_by_one_give_the_logits_of_all_at_once(
    tiny_model: Callable[..., Path], strict: Callable[..., Any], model_type: str, prompt: int, smooth_keys: bool
) -> None:
    """Over more tokens than a sliding window has."""
    model, tokenizer = strict(tiny_model(model_type), smooth_keys=smooth_keys)
    ids = tokenizer(PROMPTS[0] + PROMPTS[2], return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 2 * 12
    whole = model(ids).logits
    cache = model.duquant_new_cache()
    steps = [model(ids[:, :prompt], past_key_values=cache).logits]
    steps += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    atol = GRID_MOVED * float(whole.abs().max())
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=GRID_MOVED, atol=atol)
    assert cache.get_seq_length() == ids.shape[1]
    windows = sliding_windows(model.config)
    assert [len(layer._keys) for layer in cache.layers] == [window or ids.shape[1] for window in windows]


def test_cached_pass_sees_quantized_keys_and_values(strict: Callable[..., Any]) -> None:
    model, tokenizer = strict()
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        cached, uncached = model(ids, use_cache=True), model(ids, use_cache=False)
    assert isinstance(cached.past_key_values, DuQuantCache)
    assert not torch.allclose(cached.logits, uncached.logits, rtol=1e-3)


@pytest.mark.parametrize("model_type", SIZES)
@torch.no_grad()
def test_generate_equals_greedy_decoding_by_hand(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], model_type: str
) -> None:
    model, tokenizer = load(tiny_artifact(tiny_model(model_type)).artifact)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    ids = inputs["input_ids"]
    cache = model.duquant_new_cache()
    step, tokens = ids, []
    for _ in range(8):
        step = model(step, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(step))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output[0, ids.shape[1] :].tolist() == tokens


def test_generate_of_a_left_padded_batch_is_as_alone(strict: Callable[..., Any]) -> None:
    model, tokenizer = strict()
    tokenizer.padding_side = "left"
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for row, prompt in enumerate(PROMPTS):
        inputs = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert together[row, : len(alone)].tolist() == alone.tolist()


def test_generate_fills_the_packed_cache_and_makes_a_fresh_one_each_time(tiny_artifact: Callable[..., Any]) -> None:
    model, tokenizer = load(tiny_artifact().artifact)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first, second = (model.generate(**inputs, **options) for _ in range(2))
    assert isinstance(first.past_key_values, DuQuantCache)
    assert first.past_key_values is not second.past_key_values
    assert torch.equal(first.sequences, second.sequences)
    assert first.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + 3


def test_cache_of_the_caller_is_used(tiny_artifact: Callable[..., Any]) -> None:
    model, tokenizer = load(tiny_artifact().artifact)
    cache = model.duquant_new_cache()
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 1


def test_generate_without_a_cache_runs(tiny_artifact: Callable[..., Any]) -> None:
    model, tokenizer = load(tiny_artifact().artifact)
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 2


@pytest.mark.parametrize("batch", [1, 2])
def test_beam_search_finds_nothing_less_likely_than_greedy(strict: Callable[..., Any], batch: int) -> None:
    model, tokenizer = strict()
    tokenizer.padding_side = "left"
    inputs = tokenizer(PROMPTS[:batch], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=2, **options)
    greedy = model.generate(**inputs, **options)
    prompt = inputs["input_ids"].shape[1]

    def score(sequences: torch.Tensor, row: int) -> float:
        """Log-likelihood of the new tokens, in one pass over the unpadded sequence."""
        real = sequences[inputs["attention_mask"][row].argmax() :][None]
        with torch.no_grad():
            log_p = model(real).logits[0, :-1].log_softmax(-1)
        return float(log_p.gather(1, real[0, 1:, None])[-4:].sum())

    assert beams.shape == (2 * batch, prompt + 4)
    for row in range(batch):
        scores = [score(beams[2 * row + beam], row) for beam in range(2)]
        assert scores[0] >= scores[1] - 1e-4
        assert scores[0] >= score(greedy[row], row) - 1e-4


@pytest.mark.parametrize("smooth_keys", [False, True])
@pytest.mark.parametrize("sinks", [0, 2])
@torch.no_grad()
@pytest.mark.parametrize("model_type", SIZES)
def test_attention_from_codes_is_attention_to_dequantized_states(
    tiny_model: Callable[..., Path], strict: Callable[..., Any], model_type: str, sinks: int, smooth_keys: bool
) -> None:
    """One new token for each row of a padded batch, by both attention implementations."""
    model, tokenizer = strict(tiny_model(model_type), sinks=sinks, smooth_keys=smooth_keys)
    inputs = batch_of(tokenizer, PROMPTS, "left")
    results = []
    for implementation in (IMPLEMENTATION, "sdpa"):
        model.config._attn_implementation = implementation
        cache = model.duquant_new_cache()
        model(**inputs, past_key_values=cache)
        mask = torch.cat((inputs["attention_mask"], torch.ones(len(PROMPTS), 1, dtype=torch.int64)), dim=1)
        position = mask.sum(1, keepdim=True) - 1
        token = torch.full((len(PROMPTS), 1), 7)
        results.append(model(token, attention_mask=mask, position_ids=position, past_key_values=cache).logits)
    torch.testing.assert_close(results[0], results[1], rtol=STRICT, atol=STRICT * float(results[1].abs().max()))


@torch.no_grad()
def test_caches_smooth_keys_by_the_calibration_text(
    tiny_model: Callable[..., Path], tiny_artifact: Callable[..., Any], recipe: Recipe
) -> None:
    """Those that the model makes, and those of a copy of it; by the windows of all shards."""
    path, kv_cache = tiny_model(), replace(recipe.kv_cache, smooth_keys=True, sink_tokens=3)
    calibration = recipe.calibration
    assert calibration.shards == 2
    model, _ = load(tiny_artifact(path, replace(recipe, kv_cache=kv_cache)).artifact)
    windows = calibration_windows(path, calibration, seed=recipe.seed)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    keys = [layer.keys[:, :, 3:].float() for layer in plain(windows, use_cache=True).past_key_values.layers]
    for each in (model, copy.deepcopy(model)):
        caches = [each.duquant_new_cache(), each(windows[:1], use_cache=True).past_key_values]
        for cache in caches:
            for index, layer in enumerate(cache.layers):
                stored = each.model.layers[index].self_attn.key_smoothing
                assert layer._keys.smoothing.center is stored.center
                assert layer._keys.smoothing.smooth_scale is stored.smooth_scale
                assert layer._values.smoothing is None
                assert stored.center.dtype == torch.float32
                expected = keys[index].mean((0, 2))
                # Of layers behind the first, keys of two runs differ by roundings of bfloat16.
                torch.testing.assert_close(stored.center, expected, rtol=0.0, atol=0.01 * float(expected.abs().max()))


@torch.no_grad()
def test_head_reads_the_last_tokens_of_a_batch_as_one_matrix(tiny_artifact: Callable[..., Any]) -> None:
    """A product for each row would copy the head's weight for each."""
    model, _ = load(tiny_artifact().artifact)
    hidden = torch.randn(3, 5, model.config.hidden_size).bfloat16()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        last = model.lm_head(hidden[:, -1:])
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}
    assert torch.equal(last, hidden[:, -1:] @ model.lm_head.weight.T)


@torch.no_grad()
def test_backends_give_the_same_logits(
    tiny_artifact: Callable[..., Any], plain: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without rotations every bit; a rotation is a float32 sum, in another order."""
    ids = torch.arange(24)[None]
    results = []
    for chosen in ("cpu", "reference"):
        monkeypatch.setenv(BACKENDS, chosen)
        dispatch.forget()
        model, _ = load(tiny_artifact(None, plain).artifact)
        results.append(model(ids).logits)
    dispatch.forget()
    assert torch.equal(results[0], results[1])
