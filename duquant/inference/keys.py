"""Where a loaded layer keeps the smoothing of its keys."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from duquant.artifact.layout import KEY_SMOOTHING
from duquant.quantizers.keys import KeySmoothing


class KeySmoothingModule(nn.Module):
    """Center and smoothing scale of one layer's keys; the cache reads them."""

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.center = nn.Parameter(torch.empty(kv_heads, head_dim, dtype=torch.float32), requires_grad=False)
        self.smooth_scale = nn.Parameter(torch.empty(kv_heads, head_dim, dtype=torch.float32), requires_grad=False)


def add_key_smoothing(layer: nn.Module, *, kv_heads: int, head_dim: int) -> None:
    """Give a decoder layer room for the smoothing of its keys, on the device of its other parameters."""
    attention, _, name = KEY_SMOOTHING.partition(".")
    with next(layer.parameters()).device:
        layer.get_submodule(attention).add_module(name, KeySmoothingModule(kv_heads, head_dim))


def smoothing_by_layer(layers: Iterable[nn.Module]) -> dict[int, KeySmoothing]:
    """Return the smoothing of the layers that have one, by their index in the model."""
    attention, _, name = KEY_SMOOTHING.partition(".")
    found = {}
    for layer in layers:
        module: Any = layer.get_submodule(attention)
        if (smoothing := getattr(module, name, None)) is not None:
            found[int(module.layer_idx)] = KeySmoothing(smoothing.center, smoothing.smooth_scale)
    return found
