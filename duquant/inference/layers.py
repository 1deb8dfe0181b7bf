"""Packed sites in a decoder layer: of a whole model that transformers loads, or of one layer by itself."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from duquant.artifact.layout import KEY_SMOOTHING
from duquant.config import Recipe
from duquant.inference.keys import add_key_smoothing
from duquant.inference.modules import DuQuantLinear, SiteModule
from duquant.inference.norms import use_norm_kernel
from duquant.models.architecture import Site


def packed_layer(layer: nn.Module, sites: Iterable[Site], recipe: Recipe, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return a decoder layer that runs from the tensors of its shard, by their names inside the layer.

    Args:
        layer: an empty layer, on the meta device; it is changed.
        sites: those that are quantized.
        recipe: what they were quantized with.
        tensors: they are not copied.
    """
    for site in sites:
        pack_site(layer, site, recipe)
    if recipe.kv_cache.smooth_keys:
        kv_heads, head_dim = tensors[f"{KEY_SMOOTHING}.center"].shape
        add_key_smoothing(layer, kv_heads=kv_heads, head_dim=head_dim)
    use_norm_kernel(layer)
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False)


def pack_site(layer: nn.Module, site: Site, recipe: Recipe) -> None:
    """Put a site's transform into a layer, and packed linears in the place of its linears."""
    first = layer.get_submodule(site.linears[0])
    assert isinstance(first, nn.Linear)
    with torch.device(first.weight.device):
        module = SiteModule(first.in_features, recipe, site=site.name, experts=site.experts)
        _set_submodule(layer, site.module, module)
        for readers, names in zip(module.readers, site.groups, strict=True):
            for name in names:
                old = layer.get_submodule(name)
                assert isinstance(old, nn.Linear)
                has_bias = old.bias is not None
                new = DuQuantLinear(old.in_features, old.out_features, bias=has_bias, recipe=recipe, readers=readers)
                _set_submodule(layer, name, new)


def _set_submodule(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
