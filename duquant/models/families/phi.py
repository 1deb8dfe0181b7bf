"""Phi-3: q, k and v in one linear, gate and up in another."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from duquant.models.architecture import Architecture, Fold
from duquant.models.families.llama import ATTN_IN, ATTN_OUT, MLP_IN, MLP_OUT


def phi3(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter: values begin after the rows of queries and keys, up after those of gate."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    values = Fold("kv_rows", ("self_attn.qkv_proj",), first_row=(heads + kv_heads) * head_dim)
    up = Fold("rows", ("mlp.gate_up_proj",), first_row=config["intermediate_size"])
    return Architecture(
        sites=(
            replace(ATTN_IN, linears=("self_attn.qkv_proj",)),
            replace(ATTN_OUT, fold=values),
            replace(MLP_IN, linears=("mlp.gate_up_proj",)),
            replace(MLP_OUT, fold=up),
        )
    )
