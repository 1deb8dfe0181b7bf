"""Mixtures of experts: Mixtral and Qwen3-MoE. Attention is Llama's; the router keeps 16 bits.

All experts of a layer share one transform at `mlp_in`, where every token enters, and one at `mlp_out`. Statistics are
those of all tokens, so an expert that no calibration token was sent to is rounded by what the others saw.
"""

from collections.abc import Mapping
from typing import Any

from duquant.errors import SourceError
from duquant.models.architecture import Architecture, Fold, Site
from duquant.models.families.llama import ATTN_IN, ATTN_OUT, LLAMA

MAX_EXPERTS = 4096
EXPERTS = "mlp.experts"
ROUTER = "mlp.gate"
_MIXTRAL_NAMES = (
    ("mlp.", "block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
)


def mixtral(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter.

    Raises:
        SourceError: the number of experts is missing or absurd.
    """
    experts = _positive(config, "num_local_experts", MAX_EXPERTS)
    return Architecture(sites=_sites(experts), experts=EXPERTS, stored_names=_MIXTRAL_NAMES)


def qwen3_moe(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter; some layers may be dense. transformers writes the number of experts under Mixtral's name.

    Raises:
        SourceError: the number of experts, or which layers have them, is missing or absurd.
    """
    experts = _positive(config, "num_local_experts" if "num_local_experts" in config else "num_experts", MAX_EXPERTS)
    step = _positive({"decoder_sparse_step": 1, **config}, "decoder_sparse_step", config["num_hidden_layers"])
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise SourceError(f"config.json: mlp_only_layers is {dense!r}; it must be a list of layers")
    others = {i: LLAMA.sites for i in range(config["num_hidden_layers"]) if i in dense or (i + 1) % step}
    return Architecture(sites=_sites(experts), other_layers=others, experts=EXPERTS)


def _sites(experts: int) -> tuple[Site, ...]:
    names = [f"{EXPERTS}.{index}" for index in range(experts)]
    mlp_in = Site(
        name="mlp_in",
        linears=tuple(f"{name}.{linear}" for name in names for linear in ("gate_proj", "up_proj")),
        fold=Fold("norm", ("post_attention_layernorm",)),
        module="mlp.mlp_in",
        experts=experts,
        also_read_by=(f"{ROUTER}.weight",),
        probe="mlp",
    )
    mlp_out = Site(
        name="mlp_out",
        linears=tuple(f"{name}.down_proj" for name in names),
        fold=Fold("rows", tuple(f"{name}.up_proj" for name in names)),
        module="mlp.mlp_out",
        experts=experts,
        probe=f"{EXPERTS}.down_in",
    )
    return ATTN_IN, ATTN_OUT, mlp_in, mlp_out


def _positive(config: Mapping[str, Any], name: str, limit: int) -> int:
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= limit:
        raise SourceError(f"config.json: {name} is {value!r}; it must be a whole number from 1 to {limit}")
    return value
