"""Perplexity over consecutive windows, as the literature measures it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.calibration.text import consecutive_windows, first_token, read_text, tokenize
from duquant.config import TextSource
from duquant.errors import CalibrationError
from duquant.evaluation.loading import LoadedModel, load_for_evaluation
from duquant.models.families import architecture_of

_LOGIT_ROWS = 512
"""Rows of logits held at once: a whole window of a large vocabulary would take gigabytes."""
_LARGEST_LOSS = 700.0
"""Nats a token. exp of more is no float; a uniform guess over any vocabulary has less than 20."""


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and what it was measured on."""

    perplexity: float
    tokens: int
    """Predicted tokens: windows * (seq_len - 1)."""
    windows: int
    seq_len: int
    seconds: float
    model_bytes: int
    """Bytes of all parameters in memory."""


def evaluate(
    model: str,
    text: TextSource,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    allow_hub: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Measure perplexity of an artifact's directory or of an unquantized model (bfloat16).

    The text is tokenized once without special tokens and cut into consecutive windows of `seq_len` without the tail;
    each window starts with BOS where the model's family needs that. Artifacts run with their quantized KV cache.

    Raises:
        DuQuantError: the model or the text cannot be used.
    """
    loaded = load_for_evaluation(model, device=device, threads=threads, allow_hub=allow_hub)
    return measure_perplexity(loaded, text, seq_len=seq_len, windows=windows, on_progress=on_progress)


def measure_perplexity(
    loaded: LoadedModel,
    text: TextSource,
    *,
    seq_len: int = 2048,
    windows: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Measure perplexity as `evaluate` does, of a model that is loaded.

    Raises:
        DuQuantError: the text cannot be used, or the model's outputs are no numbers.
    """
    tokens = tokenize(loaded.tokenizer, read_text(text))
    architecture = architecture_of(loaded.model.config.to_dict())
    first = first_token(loaded.tokenizer, starts_with_bos=architecture.starts_with_bos)
    try:
        cut = consecutive_windows(tokens, seq_len=seq_len, limit=windows, first=first)
    except CalibrationError as err:
        raise CalibrationError(f"text source {text.kind}:{text.name}: {err}") from err
    started = time.perf_counter()
    try:
        value = perplexity(loaded.model, cut, on_progress=on_progress)
    except CalibrationError as err:
        raise CalibrationError(f"{loaded.path}: {err}") from err
    return PerplexityResult(
        perplexity=value,
        tokens=cut.shape[0] * (seq_len - 1),
        windows=cut.shape[0],
        seq_len=seq_len,
        seconds=time.perf_counter() - started,
        model_bytes=loaded.parameter_bytes,
    )


@torch.no_grad()
def perplexity(
    model: Any, windows: Int64[Tensor, "windows seq_len"], *, on_progress: Callable[[int, int], None] | None = None
) -> float:
    """Return exp of the mean negative log-likelihood of every token but each window's first.

    Raises:
        CalibrationError: the model's outputs are NaN or Inf, or its loss is beyond any honest model's.
    """
    total, count = 0.0, 0
    for index, window in enumerate(windows):
        ids = window[None].to(model.device)
        # use_cache on purpose: keys and values then pass through the artifact's quantized cache.
        hidden = model.model(input_ids=ids, use_cache=True).last_hidden_state[0, :-1]
        total += _negative_log_likelihood(model.lm_head, hidden, ids[0, 1:])
        count += ids.shape[1] - 1
        if not total / count < _LARGEST_LOSS:  # NaN is not, either
            raise CalibrationError(f"the loss is {total / count:g}: the model's outputs are NaN, Inf or out of range")
        if on_progress:
            on_progress(index + 1, windows.shape[0])
    return math.exp(total / count)


def _negative_log_likelihood(
    head: torch.nn.Module, hidden: Float[Tensor, "tokens hidden"], targets: Int64[Tensor, " tokens"]
) -> float:
    total = 0.0
    for first in range(0, hidden.shape[0], _LOGIT_ROWS):
        logits = head(hidden[first : first + _LOGIT_ROWS]).float()
        total += float(torch.nn.functional.cross_entropy(logits, targets[first : first + _LOGIT_ROWS], reduction="sum"))
    return total


def directory_bytes(path: Path) -> int:
    """Return the size of all files directly in a directory."""
    return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
