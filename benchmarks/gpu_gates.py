"""The gate of the GPU benchmark: nothing is timed before every kernel has equalled the reference."""

from dataclasses import replace
from typing import Any

import torch
from gpu_operands import BACKEND, KINDS, Model, activation, generator, packed_weight, quantized, transform
from torch import Tensor

from duquant.config import KVCacheConfig
from duquant.evaluation.timing import Harness, poisoned_memory, relative_error
from duquant.kernels.reference import ReferenceBackend
from duquant.kernels.types import LinearWeight, QuantizedActivation
from duquant.quantizers.kv import KVQuantizer

REFERENCE = ReferenceBackend()
Row = dict[str, Any]


class GateError(AssertionError):
    """A kernel's result is wrong; nothing is timed then."""


def gates(
    harness: Harness, models: list[Model], tokens: tuple[int, ...], only: tuple[str, ...] | None = None
) -> list[Row]:
    """Compare every kernel with the reference on fresh random operands, outputs poisoned.

    Raises:
        GateError: one is wrong.
    """
    rows: list[Row] = []
    # What is timed later; the interpreter rounds to bfloat16 its own way.
    dtype = torch.bfloat16 if harness.is_gpu else torch.float32

    def check(name: str, measured: float, limit: float) -> None:
        rows.append({"check": name, "measured": measured, "limit": limit})
        if not measured <= limit:
            raise GateError(f"{name}: {measured:.3g} is over {limit:.3g}")

    with poisoned_memory():
        for model in models:
            for count in tokens:
                for name, (width, out) in model.linears().items():
                    if only and name not in only:
                        continue
                    X = quantized(count, width, model.block, harness.device, seed=count)
                    W = packed_weight(width, out, harness.device, seed=width)
                    wrong = _wrong_results(X, W, None, dtype)
                    check(f"linear {model.name} {name}, {count} tokens: share of wrong results", wrong, 0.0)
                bias = torch.randn(W.out_features, generator=generator(harness.device, 7), device=harness.device)
                wrong = _wrong_results(X, W, bias, torch.float32)
                check(f"linear {model.name} with a bias, {count} tokens: share of wrong results", wrong, 0.0)
                for kind in KINDS[1:]:
                    moved, far = _moved_codes(kind, count, model, harness.device)
                    check(f"transform {kind} {model.name}, {count} tokens: codes off by more than 1", far, 0.0)
                    check(f"transform {kind} {model.name}, {count} tokens: codes off by 1", moved, 0.03)
            for batch in (1, 3):
                error, moved = _attention_error(model, batch, harness)
                check(f"cache {model.name}, batch {batch}: share of other codes than the reference's", moved, 1e-3)
                check(f"attention {model.name}, batch {batch}: relative error", error, 2e-3)
    return rows


def _wrong_results(X: QuantizedActivation, W: LinearWeight, bias: Tensor | None, dtype: torch.dtype) -> float:
    found, expected = (backend.int4_linear(X, W, bias, dtype) for backend in (BACKEND, REFERENCE))
    return float((found != expected).double().mean())


def _moved_codes(kind: str, tokens: int, model: Model, device: torch.device) -> tuple[float, float]:
    """Return the shares of codes that are not the reference's, by one and by more, counted from the zero points."""
    X = activation(tokens, model.mlp, device, seed=tokens)
    prepared = transform(kind, model.mlp, model.block, device)
    found = BACKEND.transform_quantize_pack(X, prepared)
    expected = REFERENCE.transform_quantize_pack(X, replace(prepared, backend=REFERENCE))
    if not bool(torch.isfinite(found.scale).all() & (found.row_sum[:, 0] == found.codes.int().sum(1)).all()):
        return 1.0, 1.0
    steps = (found.codes.float() - found.zero_point) - (expected.codes.float() - expected.zero_point)
    return float((steps.abs() >= 1).double().mean()), float((steps.abs() > 1).double().mean())


def _attention_error(model: Model, batch: int, harness: Harness) -> tuple[float, float]:
    """Return the largest error of attention, with and without sinks, and the share of codes rounded otherwise."""
    context = 333 if harness.is_gpu else 70
    quantizer = KVQuantizer(KVCacheConfig(bits=4, rotate=True), model.head_dim)
    shape = (batch, model.kv_heads, context, model.head_dim)
    g = generator(harness.device, batch)
    states = [torch.randn(shape, generator=g, device=harness.device) for _ in range(2)]
    K, V = (quantizer.quantize(part) for part in states)
    ours = quantizer.empty(*shape[:3], harness.device)
    BACKEND.quantize_kv(states[0], quantizer, ours)
    moved = float((ours.packed != K.packed).double().mean())
    Q = torch.randn(batch, model.heads, 1, model.head_dim, generator=g, device=harness.device).bfloat16().float()
    errors = []
    for sinks in (None, (states[0][:, :, :4], states[1][:, :, :4])):
        found, expected = (
            backend.int4_kv_attention(Q, K, V, quantizer, scaling=model.head_dim**-0.5, mask=None, sinks=sinks)
            for backend in (BACKEND, REFERENCE)
        )
        errors.append(relative_error(found, expected))
    return max(errors), moved
