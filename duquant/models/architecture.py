"""Adapters: where a decoder layer's sites, linears and norms are, and where a site's smoothing scale folds to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from duquant.errors import SourceError, UnsupportedModelError

SiteName = Literal["attn_in", "attn_out", "mlp_in", "mlp_out"]


@dataclass(frozen=True)
class Site:
    """A place where activations enter linears. All names are relative to the decoder layer."""

    name: SiteName
    linears: tuple[str, ...]
    """The linears that read this site."""
    fold_into: str
    """What the smoothing scale divides: a norm's gain, or the rows of a linear."""
    fold_kind: Literal["norm", "rows", "kv_rows"]
    """kv_rows: rows of v_proj, one scale for each KV channel."""
    module: str
    """The submodule that holds the site's transform in a quantized model."""


@dataclass(frozen=True)
class Architecture:
    """The layout shared by a family of models."""

    sites: tuple[Site, ...]
    layers_prefix: str = "model.layers"
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a layer, in site order."""
        return tuple(linear for site in self.sites for linear in site.linears)

    def kept_sites(self, skip_linears: tuple[str, ...]) -> tuple[Site, ...]:
        """Return the sites that are quantized.

        Raises:
            UnsupportedModelError: a name is not a linear of this architecture, or only part of a site is left out.
        """
        for name in skip_linears:
            if name not in self.linears:
                raise UnsupportedModelError(
                    f"skip_linears names {name!r}; the linears of a layer are: {', '.join(self.linears)}"
                )
        kept = []
        for site in self.sites:
            left_out = [linear for linear in site.linears if linear in skip_linears]
            if left_out and len(left_out) < len(site.linears):
                raise UnsupportedModelError(
                    f"skip_linears leaves out {', '.join(left_out)} but not the rest of site {site.name}, which shares "
                    f"one transform: {', '.join(site.linears)}"
                )
            if not left_out:
                kept.append(site)
        return tuple(kept)


LLAMA = Architecture(
    sites=(
        Site(
            name="attn_in",
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            fold_into="input_layernorm",
            fold_kind="norm",
            module="self_attn.attn_in",
        ),
        Site(
            name="attn_out",
            linears=("self_attn.o_proj",),
            fold_into="self_attn.v_proj",
            fold_kind="kv_rows",
            module="self_attn.attn_out",
        ),
        Site(
            name="mlp_in",
            linears=("mlp.gate_proj", "mlp.up_proj"),
            fold_into="post_attention_layernorm",
            fold_kind="norm",
            module="mlp.mlp_in",
        ),
        Site(
            name="mlp_out",
            linears=("mlp.down_proj",),
            fold_into="mlp.up_proj",
            fold_kind="rows",
            module="mlp.mlp_out",
        ),
    )
)

ARCHITECTURES: dict[str, Architecture] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA}
"""By `model_type`. Qwen2's biases and Qwen3's q/k norms need nothing of their own: a bias folds with its rows, and the
norms act after the linears, on values that no transform changes."""

MAX_LAYERS, MAX_HIDDEN, MAX_VOCAB, MAX_HEAD_DIM = 512, 65_536, 2_000_000, 4096


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the adapter for a model's config.json.

    Raises:
        UnsupportedModelError: the model_type has no adapter, or the config asks for remote code.
        SourceError: a size is missing, not a positive whole number, or beyond what is reasonable.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
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
    _check_heads(config)
    return ARCHITECTURES[model_type]


def _check_heads(config: Mapping[str, Any]) -> None:
    """Check the optional sizes; where they are absent, transformers has a default for each family."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is not None and (type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads):
        raise SourceError(
            f"config.json: num_key_value_heads is {kv_heads!r}; it must divide num_attention_heads, {heads}"
        )
    head_dim = config.get("head_dim")
    if head_dim is None and config["model_type"] != "qwen3":  # Qwen3 does not derive it from the hidden size
        if hidden % (2 * heads):
            raise SourceError(
                f"config.json: head_dim is missing, and hidden_size {hidden} is no even multiple of the {heads} heads"
            )
    elif head_dim is not None and (type(head_dim) is not int or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM):
        raise SourceError(f"config.json: head_dim is {head_dim!r}; it must be an even number from 2 to {MAX_HEAD_DIM}")
