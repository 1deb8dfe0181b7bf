"""The families of models that are supported: one adapter for each `model_type` of config.json."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.architecture import Architecture
from duquant.models.families.gemma import gemma3
from duquant.models.families.llama import llama
from duquant.models.families.mixture import mixtral, qwen3_moe
from duquant.models.families.phi import phi3


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` are read."""

    adapter: Callable[[Mapping[str, Any]], Architecture]
    """Returns the layout for a config.json whose sizes have been checked."""
    derives_head_dim: bool = True
    """Without a head_dim, it is the hidden size over the heads; else transformers has a default of its own."""


FAMILIES: dict[str, Family] = {
    "gemma3_text": Family(gemma3, derives_head_dim=False),
    "llama": Family(llama),
    "mistral": Family(llama),
    "mixtral": Family(mixtral),
    "phi3": Family(phi3),
    "qwen2": Family(llama),
    "qwen3": Family(llama, derives_head_dim=False),
    "qwen3_moe": Family(qwen3_moe),
}
"""By `model_type`."""

MAX_LAYERS, MAX_HIDDEN, MAX_VOCAB, MAX_HEAD_DIM = 512, 65_536, 2_000_000, 4096


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the layout of the model that a config.json describes.

    Raises:
        UnsupportedModelError: the model_type has no adapter, or the config asks for what is not supported.
        SourceError: a size is missing, not a positive whole number, or beyond what is reasonable.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    if "auto_map" in config:
        raise UnsupportedModelError("config.json has an auto_map, which asks for remote code; it is never run")
    limits = {
        "num_hidden_layers": MAX_LAYERS,
        "hidden_size": MAX_HIDDEN,
        "intermediate_size": MAX_HIDDEN * 4,
        "num_attention_heads": MAX_HIDDEN,
        "vocab_size": MAX_VOCAB,
    }
    for name, limit in limits.items():
        value = config.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise SourceError(f"config.json: {name} is {value!r}; it must be a whole number from 1 to {limit}")
    family = FAMILIES[model_type]
    _check_heads(config, family)
    return family.adapter(config)


def _check_heads(config: Mapping[str, Any], family: Family) -> None:
    """Check the optional sizes; where they are absent, transformers has a default for each family."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is not None and (type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads):
        raise SourceError(
            f"config.json: num_key_value_heads is {kv_heads!r}; it must divide num_attention_heads, {heads}"
        )
    head_dim = config.get("head_dim")
    if head_dim is None and family.derives_head_dim:
        if hidden % (2 * heads):
            raise SourceError(
                f"config.json: head_dim is missing, and hidden_size {hidden} is no even multiple of the {heads} heads"
            )
    elif head_dim is not None and (type(head_dim) is not int or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM):
        raise SourceError(f"config.json: head_dim is {head_dim!r}; it must be an even number from 2 to {MAX_HEAD_DIM}")
