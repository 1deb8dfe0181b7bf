"""The model as lm-eval sees it: log-likelihoods and generated text of a loaded artifact or an unquantized model."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from duquant.errors import EvaluationError

_BATCH_TOKENS = {"cuda": 32768, "cpu": 2048}
"""Tokens of one forward pass: what keeps the device busy, with room for the activations."""
_GENERATE_BATCH = {"cuda": 16, "cpu": 4}
_LOGIT_ROWS = 1024
"""Rows of logits held at once."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, and the token ids of both."""


class ScoringModel(HFLM):  # type: ignore[misc]  # lm-eval is untyped here
    """HFLM with batches by tokens, the head on continuations alone, float32 log-likelihoods and progress.

    HFLM keeps the logits of every token of a batch, in the model's dtype: with 49,152 words some gigabytes, and of
    bfloat16 only three digits.
    """

    def __init__(self, model: Any, tokenizer: Any, *, on_progress: Callable[[int, int], None] | None = None) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=_GENERATE_BATCH[model.device.type],
            trust_remote_code=False,
        )
        self._report = on_progress or (lambda _done, _total: None)
        self.is_running = False
        """Whether the model is at work: what fails then is not the fault of a task."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-likelihood, whether greedy decoding gives it) of each continuation."""
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each whole text."""
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the generated text of each request."""
        texts: list[str] = []
        step = self.batch_size
        for first in range(0, len(requests), step):
            self.is_running = True
            texts += super().generate_until(requests[first : first + step], disable_tqdm=disable_tqdm)
            self.is_running = False
            self._report(min(first + step, len(requests)), len(requests))
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_options: Any) -> list[tuple[float, bool]]:
        """Score continuations; those whose inputs are the same tokens share one row of a batch."""
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise EvaluationError(f"question {index + 1}: an answer has no tokens")
            # The last token is predicted, not read; what is too long loses its beginning.
            rows.setdefault(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in _batches(sorted(rows, key=len, reverse=True), _BATCH_TOKENS[self.device.type]):
            self.is_running = True
            hidden = self._hidden(batch)
            asked = [(index, place) for place, row in enumerate(batch) for index in rows[row]]
            # What of the continuation is in the row, and where: a row ends one token before its continuation does.
            targets = [torch.tensor(requests[index][2][-len(batch[place]) :]) for index, place in asked]
            ends = [len(batch[place]) for _, place in asked]
            parts = [hidden[p, end - len(t) : end] for (_, p), t, end in zip(asked, targets, ends, strict=True)]
            losses, is_greedy = self._losses(torch.cat(parts), torch.cat(targets).to(hidden.device))
            self.is_running = False
            sizes = [len(target) for target in targets]
            split = zip(torch.split_with_sizes(losses, sizes), torch.split_with_sizes(is_greedy, sizes), strict=True)
            for (index, _), (loss, is_best) in zip(asked, split, strict=True):
                found[index] = -float(loss.sum()), bool(is_best.all())
            done += len(asked)
            self._report(done, len(requests))
        return found

    @torch.inference_mode()
    def _hidden(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the last hidden states, (batch, longest row, hidden). Rows end in padding, which no token sees."""
        ids: Int64[Tensor, "batch tokens"] = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        for target, row in zip(ids, batch, strict=True):
            target[: len(row)] = torch.tensor(row)
        # use_cache on purpose: keys and values then pass through the artifact's quantized cache.
        hidden: Tensor = self.model.model(input_ids=ids.to(self.device), use_cache=True).last_hidden_state
        return hidden

    @torch.inference_mode()
    def _losses(
        self, states: Float[Tensor, "rows hidden"], targets: Int64[Tensor, " rows"]
    ) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
        """Return each target's negative log-likelihood in nats (float64), and whether it is the likeliest token."""
        losses, is_best = [], []
        for first in range(0, len(states), _LOGIT_ROWS):
            logits = self.model.lm_head(states[first : first + _LOGIT_ROWS]).float()
            part = targets[first : first + _LOGIT_ROWS]
            losses.append(torch.nn.functional.cross_entropy(logits, part, reduction="none").double())
            is_best.append(logits.argmax(-1) == part)
        joined = torch.cat(losses)
        if not bool(torch.isfinite(joined).all()):
            raise EvaluationError("the model's outputs are NaN or Inf")
        return joined, torch.cat(is_best)


def _batches(rows: Sequence[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    """Cut rows, longest first, into batches of about so many tokens with their padding."""
    batches: list[list[tuple[int, ...]]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
