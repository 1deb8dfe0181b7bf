"""Distillation: a quantized network learns to give the unquantized one's distribution of the next token.

Layers are quantized first, each by itself; what that leaves is that they do not know of each other's errors. The scales
of the weights and the gains of the norms then move by gradients of the whole network's divergence, with everything
rounded as at run time; codes stay. These are a few thousand numbers a layer, so little text is enough and it helps on
other kinds of text, too. Layers run one at a time, forwards and then backwards, each layer's forward pass done again
for its gradients, so that one layer's activations are there at once. The unquantized network is run once, before, and
its last hidden states are kept.

Reference: EfficientQAT, arXiv 2407.11062v3, section 3.3 (step sizes of the whole network alone, on the tokens'
cross-entropy, with weights alone rounded); the divergence as the loss is LLM-QAT's, arXiv 2305.17888v1, section 2.2.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from duquant.config import DistillationConfig, Recipe
from duquant.errors import CalibrationError
from duquant.models.skeleton import COMPUTE_DTYPE, NetworkEnds, Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.pipeline.site import site_seed
from duquant.pipeline.student import StudentLayer

_LOG = logging.getLogger(__name__)
_WARM_UP = 5
"""Steps in which the rates rise."""
_HELD_OUT = 16
"""Every so many sequences, one is not learned on: whether learning helped is measured on these."""
_MOST_HELD_OUT = 16
_ROWS = 256
"""Rows of logits at once: a vocabulary is large."""


@dataclass(frozen=True)
class DistillationReport:
    """How distillation went. Losses are means over the tokens of sequences that are not learned on, in nats."""

    loss_before: float
    loss_after: float | None
    """Measured after the last step, also where the layers do not keep what was learned. None if it is not finite, or if
    learning ended before: a loss or a gradient of a step was not finite."""
    steps: int
    """Done ones."""
    is_restored: bool
    """Learning gave nothing better, or numbers that are not finite: the layers stay what they were, and so does their
    loss, which is `loss_before`."""


@dataclass(frozen=True)
class Sequences:
    """What is learned on."""

    tokens: Int64[Tensor, "sequences seq"]
    hidden: Float[Tensor, "sequences seq hidden"]
    """The last hidden states of the unquantized network, before the final norm."""

    def some(self, indices: Sequence[int] | slice) -> "Sequences":
        """Return those: a slice is not copied."""
        return Sequences(self.tokens[indices], self.hidden[indices])


def cut(windows: Int64[Tensor, "samples seq_len"], length: int, *, starts_with_bos: bool) -> Int64[Tensor, "n length"]:
    """Cut windows into pieces of `length` tokens; what is left of each is dropped.

    Models that need every text to start with its BOS token get it in the place of each piece's first token.

    >>> cut(torch.tensor([[9, 1, 2, 3, 4]]), 2, starts_with_bos=True)
    tensor([[9, 1],
            [9, 3]])
    """
    per_window = windows.shape[1] // length
    pieces = windows[:, : per_window * length].reshape(-1, length)
    if starts_with_bos:
        pieces = torch.cat((windows[:1, :1].expand(len(pieces), 1), pieces[:, 1:]), dim=1)
    return pieces


def split(count: int) -> tuple[list[int], list[int]]:
    """Return the sequences to learn on and those to measure on, evenly spread.

    >>> split(2)
    ([1], [0])
    """
    held = set(range(0, count, max(_HELD_OUT, -(-count // _MOST_HELD_OUT))))
    return [index for index in range(count) if index not in held], sorted(held)


@torch.no_grad()
def last_hidden_states(
    source: SourceCheckpoint, skeleton: Skeleton, ends: NetworkEnds, tokens: Int64[Tensor, "n seq"], batch: int
) -> Float[Tensor, "n seq hidden"]:
    """Return what the unquantized layers make of token sequences, `batch` at a time, on the CPU."""
    # Written in place: all of the text's states are there once.
    states = torch.empty(*tokens.shape, int(source.config["hidden_size"]), dtype=COMPUTE_DTYPE)
    for part, state in zip(torch.split(tokens, batch), torch.split(states, batch), strict=True):
        state.copy_(ends.embed(part))
    for layer in range(source.layers):
        with skeleton.layer(layer, skeleton.load(source, layer)) as module:
            for state in torch.split(states, batch):
                state.copy_(skeleton.forward(module, state.to(skeleton.device)))
    return states


class Distiller:
    """The quantized network while it learns.

    Args:
        layers: all of them.
        ends: what is outside the layers.
        config: rates and budget.
    """

    def __init__(self, layers: Sequence[StudentLayer], ends: NetworkEnds, config: DistillationConfig) -> None:
        self._layers, self._ends, self._config = layers, ends, config

    def learn(self, learned: Sequences, held_out: Sequences, generator: torch.Generator) -> DistillationReport:
        """Spend the budget; the layers have what was learned then, whatever it is worth.

        Raises:
            CalibrationError: the loss is NaN or Inf before anything is learned.
        """
        config = self._config
        before = self.loss(held_out)
        if not math.isfinite(before):
            raise CalibrationError(f"the quantized network's divergence is {before} before anything is learned")
        done = 0
        for done, indices in enumerate(_batches(len(learned.tokens), config, generator), 1):
            rate = config.rate * min(1.0, done / _WARM_UP) * (1 + math.cos(math.pi * (done - 1) / config.steps)) / 2
            loss = self._step(learned.some(indices), rate)
            if not math.isfinite(loss):
                _LOG.warning("distillation: the loss is %s in step %d; the layers stay what they were", loss, done)
                return DistillationReport(before, None, done - 1, is_restored=True)
            if done % 10 == 0:
                _LOG.info("distillation: step %d of %d, loss %.4f", done, config.steps, loss)
        after = self.loss(held_out)
        is_finite = math.isfinite(after)
        is_better = is_finite and after < before
        if not is_better:
            message = "distillation: the loss is %s after it and was %s; the layers stay what they were"
            _LOG.warning(message, after, before)
        # JSON has no NaN.
        return DistillationReport(before, after if is_finite else None, done, is_restored=not is_better)

    @torch.no_grad()
    def loss(self, sequences: Sequences) -> float:
        """Return the mean divergence over all tokens."""
        total = 0.0
        for indices in torch.split(torch.arange(len(sequences.tokens)), self._config.batch):
            part = sequences.some(indices.tolist())
            total += self._divergence(self._forward(part.tokens)[-1], part.hidden)[0] * len(indices)
        return total / len(sequences.tokens)

    def _step(self, batch: Sequences, rate: float) -> float:
        """Learn from some sequences; return the loss before, or NaN when a gradient is not finite."""
        with torch.no_grad():
            inputs = self._forward(batch.tokens)
        with torch.enable_grad():
            loss, gradient = self._divergence(inputs.pop(), batch.hidden)
            for layer in reversed(self._layers):
                X = inputs.pop().requires_grad_()
                with layer.running() as run:
                    run(X).backward(gradient)  # type: ignore[no-untyped-call]  # torch's
                assert X.grad is not None
                gradient = X.grad
                if not layer.is_finite:
                    return math.nan
                # At once: no more than one layer's gradients are there.
                layer.step(rate)
        return loss

    def _forward(self, tokens: Tensor) -> list[Tensor]:
        """Return the inputs of every layer, and the last one's outputs."""
        states = [self._ends.embed(tokens)]
        for layer in self._layers:
            with layer.running() as run:
                states.append(run(states[-1]))
        return states

    def _divergence(self, hidden: Tensor, target: Tensor) -> tuple[float, Tensor]:
        """Return the mean divergence over tokens and, where gradients are on, its gradient."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        targets = target.to(hidden.device).reshape(rows.shape)
        total = 0.0
        gradients: list[Tensor] = []
        for X, wanted in zip(torch.split(rows, _ROWS, dim=1), torch.split(targets, _ROWS, dim=1), strict=True):
            part = X.detach().requires_grad_(torch.is_grad_enabled())
            logits = self._ends.logits(part)
            with torch.no_grad():
                teacher = self._ends.logits(wanted).float().log_softmax(-1)
                student = logits.float().log_softmax(-1)
                expected = teacher.exp()
                total += float(teacher.sub_(student).mul_(expected).sum()) / rows.shape[1]
            if torch.is_grad_enabled():
                # By hand: autograd would go over the vocabulary three more times.
                by_logits = student.exp_().sub_(expected).div_(rows.shape[1]).to(logits.dtype)
                gradients += torch.autograd.grad(logits, part, by_logits)
        return total, torch.cat(gradients, dim=1).view(hidden.shape) if gradients else hidden


def _batches(count: int, config: DistillationConfig, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield the sequences of each step: all in a random order, then again in another."""
    waiting: list[int] = []
    for _ in range(config.steps):
        while len(waiting) < config.batch:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[: config.batch]
        del waiting[: config.batch]


def distill(
    source: SourceCheckpoint,
    skeleton: Skeleton,
    recipe: Recipe,
    drafts: Sequence[dict[str, Tensor]],
    windows: Int64[Tensor, "samples seq_len"],
) -> tuple[list[dict[str, Tensor]], DistillationReport]:
    """Return the layers' tensors as they are after learning, and how it went.

    Args:
        source: the unquantized model.
        skeleton: of it.
        recipe: with distillation.steps.
        drafts: each layer's tensors by their names inside it.
        windows: the calibration's.

    Raises:
        CalibrationError: there is too little text, or the loss is NaN or Inf before anything is learned.
        SourceError: the model's tensors are unusable.
        UnsupportedModelError: what the recipe quantizes is no plain linear.
    """
    config = recipe.distillation
    tokens = cut(windows, config.seq_len, starts_with_bos=source.architecture.starts_with_bos)
    learned, held_out = split(len(tokens))
    if not learned:
        raise CalibrationError(
            f"distillation needs two pieces of distillation.seq_len {config.seq_len} tokens at least, and the "
            "calibration's windows have one; take more windows or a smaller seq_len"
        )
    generator = torch.Generator().manual_seed(site_seed(recipe.seed, -1, "distillation"))
    # No more than the steps can look at: the unquantized network runs over all of these.
    order = torch.randperm(len(learned), generator=generator)[: config.steps * config.batch].tolist()
    learned = [learned[index] for index in order]
    ends = NetworkEnds(source, skeleton)
    chosen = tokens[learned + held_out]
    sequences = Sequences(chosen, last_hidden_states(source, skeleton, ends, chosen, config.batch))
    layers = [
        StudentLayer(tensors, source.architecture.kept_sites(recipe.skip_linears, layer), recipe, skeleton, layer)
        for layer, tensors in enumerate(drafts)
    ]
    first_held = len(learned)
    report = Distiller(layers, ends, config).learn(
        sequences.some(slice(first_held)), sequences.some(slice(first_held, None)), generator
    )
    return [dict(draft) for draft in drafts] if report.is_restored else [layer.tensors() for layer in layers], report
