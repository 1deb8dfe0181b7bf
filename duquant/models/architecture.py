"""What an adapter says of a family: where a decoder layer's sites, linears and norms are, and what else is its own.

All names are relative to the decoder layer unless they say otherwise. The adapters are in duquant.models.families.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from duquant.errors import UnsupportedModelError

SiteName = Literal["attn_in", "attn_out", "mlp_in", "mlp_out"]


@dataclass(frozen=True)
class Fold:
    """What a site's smoothing scale divides, so that the layer computes what it did."""

    kind: Literal["norm", "rows", "kv_rows"]
    """norm: a norm's gain; rows: rows of linears; kv_rows: rows of values, one scale for each KV channel."""
    into: tuple[str, ...]
    """The norm, or the linears."""
    first_row: int = 0
    """Where those rows begin in a linear that holds others before them (a fused one); after the last nothing is
    divided."""
    gain_offset: float = 0.0
    """The norm multiplies by (gain_offset + weight)."""


@dataclass(frozen=True)
class Site:
    """A place where activations enter linears."""

    name: SiteName
    linears: tuple[str, ...]
    """The linears that read this site. With experts: those of the first, of the second, and so on."""
    fold: Fold
    module: str
    """The submodule that holds the site's transform in a quantized model."""
    experts: int = 1
    """The linears belong to so many experts, each of which reads only the tokens that are sent to it."""
    also_read_by: tuple[str, ...] = ()
    """Weights that read the site, too, and stay in 16 bits: a router. They are smoothed with the others."""
    probe: str = ""
    """The submodule whose first input is what enters the site; empty: the first linear."""

    @property
    def probed(self) -> str:
        """Name of the submodule whose first input is what enters the site, tokens in order."""
        return self.probe or self.linears[0]

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears that read the same tensor, together: all of them, or those of each expert."""
        size = len(self.linears) // self.experts
        return tuple(self.linears[first : first + size] for first in range(0, len(self.linears), size))


@dataclass(frozen=True)
class Architecture:
    """The layout of a model."""

    sites: tuple[Site, ...]
    """Of every layer that `other_layers` does not name."""
    other_layers: Mapping[int, tuple[Site, ...]] = field(default_factory=dict)
    """The sites of layers that are built differently, by layer: dense ones among sparse ones."""
    experts: str = ""
    """The submodule that transformers builds with all experts' weights fused into two tensors; see models.experts."""
    stored_names: tuple[tuple[str, str], ...] = ()
    """Parts of a tensor's name inside a layer, here and in the checkpoint, where the two differ; applied in order."""
    has_rope_by_layer_type: bool = False
    """The rotary embedding asks for the layer's entry of the config's layer_types."""
    starts_with_bos: bool = False
    """The model is of use only when every sequence starts with its BOS token. Windows of text then do, in calibration
    and evaluation; elsewhere they do not, as the literature measures perplexity."""
    has_output_norms: bool = False
    """Norms act on what attention and MLP add to the residual stream, so that no rotation of it can be folded."""
    layers_prefix: str = "model.layers"
    embeddings: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def sites_of(self, layer: int) -> tuple[Site, ...]:
        """Return the sites of one layer."""
        return self.other_layers.get(layer, self.sites)

    def linears_of(self, layer: int) -> tuple[str, ...]:
        """Return all linears of one layer, in site order."""
        return tuple(linear for site in self.sites_of(layer) for linear in site.linears)

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor inside a layer."""
        for ours, theirs in self.stored_names:
            name = name.replace(ours, theirs)
        return name

    def kept_sites(self, skip_linears: tuple[str, ...], layer: int) -> tuple[Site, ...]:
        """Return the sites of one layer that are quantized.

        Args:
            skip_linears: names, or patterns such as mlp.experts.*.down_proj.
            layer: which.

        Raises:
            UnsupportedModelError: a name is not a linear of this architecture, or only part of a site is left out.
        """
        self._check_names(skip_linears)
        kept = []
        for site in self.sites_of(layer):
            left_out = tuple(linear for linear in site.linears if _matches_any(linear, skip_linears))
            if left_out and len(left_out) < len(site.linears):
                raise UnsupportedModelError(
                    f"skip_linears leaves out {_listed(left_out)} but not the rest of site {site.name}, which shares "
                    f"one transform: {_listed(site.linears)}"
                )
            if not left_out:
                kept.append(site)
        return tuple(kept)

    def _check_names(self, patterns: tuple[str, ...]) -> None:
        layouts = (self.sites, *self.other_layers.values())
        known = dict.fromkeys(linear for sites in layouts for site in sites for linear in site.linears)
        for pattern in patterns:
            if not any(fnmatchcase(linear, pattern) for linear in known):
                raise UnsupportedModelError(
                    f"skip_linears names {pattern!r}; the linears of a layer are: {_listed(tuple(known))}"
                )


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listed(names: tuple[str, ...], limit: int = 12) -> str:
    """Join names, not hundreds of them."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
