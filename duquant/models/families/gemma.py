"""Gemma 3, text only: norms that multiply by (1 + weight), four of them a layer, and windows that start with BOS.

The norms after attention and after the MLP act on outputs, which no transform changes. Its embeddings are scaled by its
own embedding module; each layer has its own rotary base and window by its type.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from duquant.errors import UnsupportedModelError
from duquant.models.architecture import Architecture, Fold
from duquant.models.families.llama import ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT

GEMMA3 = Architecture(
    sites=(
        replace(ATTN_IN, fold=Fold("norm", ("input_layernorm",), gain_offset=1.0)),
        ATTN_OUT,
        replace(MLP_IN, fold=Fold("norm", ("pre_feedforward_layernorm",), gain_offset=1.0)),
        MLP_OUT,
    ),
    has_rope_by_layer_type=True,
    has_output_norms=True,
    starts_with_bos=True,
)


def gemma3(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter.

    Raises:
        UnsupportedModelError: the config asks for attention to later tokens, or for capped logits.
    """
    for name in ("use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            raise UnsupportedModelError(f"config.json: {name} is {config[name]!r}; that is not supported for Gemma 3")
    return GEMMA3
