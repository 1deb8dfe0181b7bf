"""Perplexity against the formula."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from duquant.config import TextSource
from duquant.errors import CalibrationError, ConfigError, DuQuantError, SourceError
from duquant.evaluation import perplexity as perplexity_module
from duquant.evaluation.perplexity import directory_bytes, evaluate, perplexity
from duquant.inference import load


@torch.no_grad()
def by_hand(model: Any, windows: torch.Tensor) -> float:
    total, count = 0.0, 0
    for window in windows:
        logits = model(window[None], use_cache=True).logits[0].double()
        probability = logits.softmax(-1)
        for position in range(len(window) - 1):
            total -= math.log(float(probability[position, window[position + 1]]))
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perplexity_is_the_formula(tiny_model: Callable[..., Path], dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=dtype).eval()
    windows = torch.randint(0, 259, (3, 20), generator=torch.Generator().manual_seed(0))
    # The mean loss is near 6 and sums of float32; bfloat16 logits round the same way in both.
    assert perplexity(model, windows) == pytest.approx(by_hand(model, windows), rel=1e-4)


def test_pieces_of_the_logits_do_not_matter(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    windows = torch.randint(0, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = perplexity(model, windows)
    monkeypatch.setattr(perplexity_module, "_LOGIT_ROWS", 7)
    assert perplexity(model, windows) == pytest.approx(whole, rel=1e-5)


def test_uniform_predictions_have_the_vocabulary_s_perplexity(tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    windows = torch.randint(0, 259, (2, 20))
    assert perplexity(model, windows) == pytest.approx(259, rel=1e-5)


def test_artifact_is_measured_with_its_packed_cache(tiny_artifact: Callable[..., Any], text_file: Path) -> None:
    artifact = tiny_artifact().artifact
    source = TextSource(kind="file", name=str(text_file))
    seen: list[tuple[int, int]] = []
    result = evaluate(
        str(artifact), source, seq_len=32, windows=3, device="cpu", on_progress=lambda *done: seen.append(done)
    )
    model, tokenizer = load(artifact)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"])[:96].view(3, 32)
    assert result.perplexity == pytest.approx(by_hand(model, ids), rel=1e-4)
    assert (result.windows, result.seq_len, result.tokens) == (3, 32, 93)
    assert result.model_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_source_is_measured_in_bfloat16(tiny_model: Callable[..., Path], text_file: Path) -> None:
    path = tiny_model()
    source = TextSource(kind="file", name=str(text_file))
    result = evaluate(str(path), source, seq_len=32, windows=2, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"])[:64].view(2, 32)
    assert result.perplexity == pytest.approx(by_hand(model, ids), rel=1e-4)


@pytest.mark.parametrize(
    ("error", "changes"),
    [
        (CalibrationError, {"seq_len": 100_000}),
        (ConfigError, {"seq_len": 1}),
        (ConfigError, {"windows": 0}),
        (ConfigError, {"device": "tpu"}),
    ],
    ids=str,
)
def test_bad_requests_are_our_errors(
    tiny_model: Callable[..., Path], text_file: Path, error: type[DuQuantError], changes: dict[str, Any]
) -> None:
    options = {"seq_len": 32, "windows": 1, "device": "cpu", **changes}
    with pytest.raises(error):
        evaluate(str(tiny_model()), TextSource(kind="file", name=str(text_file)), **options)


def test_broken_model_is_our_error(own_model: Callable[..., Path], text_file: Path) -> None:
    model = own_model()
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match="truncated"):
        evaluate(str(model), TextSource(kind="file", name=str(text_file)), seq_len=32, device="cpu")


def test_directory_bytes_sum_the_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"4567")
    (tmp_path / "folder").mkdir()
    assert directory_bytes(tmp_path) == 7


def test_windows_start_with_bos_where_the_family_needs_it(tiny_model: Callable[..., Path], text_file: Path) -> None:
    path = tiny_model("gemma3_text")
    result = evaluate(str(path), TextSource(kind="file", name=str(text_file)), seq_len=32, windows=2, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"])[:62].view(2, 31)
    ids = torch.cat((torch.full((2, 1), tokenizer.bos_token_id), text), dim=1)
    assert result.perplexity == pytest.approx(by_hand(model, ids), rel=1e-4)
    assert result.tokens == 62
