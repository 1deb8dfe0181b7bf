"""Kernels behind one signature. Today there is one backend, the reference; faster ones must equal it."""

from typing import TypedDict

from duquant.kernels.reference import (
    PackedWeight,
    QuantizedActivation,
    fake_linear,
    int4_linear,
    transform_quantize,
)

__all__ = ["PackedWeight", "QuantizedActivation", "describe", "fake_linear", "int4_linear", "transform_quantize"]


class BackendStatus(TypedDict):
    """One row of `duquant doctor`'s kernel table."""

    backend: str
    available: bool
    reason: str


def describe() -> list[BackendStatus]:
    """Say which backends run here and why the others do not."""
    return [{"backend": "reference", "available": True, "reason": "plain torch, any device"}]
