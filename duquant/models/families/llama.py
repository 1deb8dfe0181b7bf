"""Llama and its kin: separate q, k, v; gate and up; two norms a layer.

Qwen2's biases and Qwen3's q/k norms need nothing of their own: a bias folds with its rows, and the norms act after the
linears, on values that no transform changes. Mistral's sliding window is the mask's affair.
"""

from collections.abc import Mapping
from typing import Any

from duquant.models.architecture import Architecture, Fold, Site

ATTN_IN = Site(
    name="attn_in",
    linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    fold=Fold("norm", ("input_layernorm",)),
    module="self_attn.attn_in",
)
ATTN_OUT = Site(
    name="attn_out",
    linears=("self_attn.o_proj",),
    fold=Fold("kv_rows", ("self_attn.v_proj",)),
    module="self_attn.attn_out",
)
MLP_IN = Site(
    name="mlp_in",
    linears=("mlp.gate_proj", "mlp.up_proj"),
    fold=Fold("norm", ("post_attention_layernorm",)),
    module="mlp.mlp_in",
)
MLP_OUT = Site(
    name="mlp_out",
    linears=("mlp.down_proj",),
    fold=Fold("rows", ("mlp.up_proj",)),
    module="mlp.mlp_out",
)
LLAMA = Architecture(sites=(ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT))


def llama(_config: Mapping[str, Any]) -> Architecture:
    """Return the adapter; every model of the family has the same."""
    return LLAMA
