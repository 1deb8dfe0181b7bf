"""Names inside an artifact: files, tensors, and the quantization entry of config.json."""

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from duquant.config import Recipe

FORMAT = "duquant"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
EXTRA_SHARD = "model-extra.safetensors"
"""Embeddings, final norm and head."""
REPORT = "report.json"
KEY_SMOOTHING = "self_attn.key_smoothing"
"""The submodule of a layer that holds what the cache does to keys before it rounds them."""


def layer_shard(layer: int) -> str:
    """Return the file name of a layer's shard.

    >>> layer_shard(7)
    'model-layer-0007.safetensors'
    """
    return f"model-layer-{layer:04d}.safetensors"


def quantization_config(recipe: Recipe) -> dict[str, Any]:
    """Return the `quantization_config` entry of config.json."""
    return {"quant_method": FORMAT, "schema_version": SCHEMA_VERSION, "recipe": recipe.to_dict()}


def smallest_index_type(perm: Int64[Tensor, " channels"]) -> Tensor:
    """Return the permutation in int16 when it fits, else int32."""
    return perm.to(torch.int16 if perm.numel() <= 2**15 else torch.int32)
