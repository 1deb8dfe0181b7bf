"""Running a quantized layer over calibration text, as it will run in the artifact, for the inputs of the next layer."""

from pathlib import Path

import torch

from duquant.calibration.boundaries import BoundaryWriter, read_micro_batches
from duquant.config import Recipe
from duquant.inference.hf import new_cache
from duquant.inference.layers import packed_layer
from duquant.models.skeleton import Skeleton
from duquant.models.tensor_files import read_tensors


@torch.no_grad()
def propagate_layer(skeleton: Skeleton, recipe: Recipe, layer: int, *, packed: Path, given: Path, target: Path) -> None:
    """Run one quantized layer over the windows of a boundary file, unless that is done.

    The modules and the cache are those of a loaded artifact, so activations, keys and values are rounded as there.

    Args:
        skeleton: where the layer comes from.
        recipe: what it was quantized with.
        layer: which.
        packed: its shard.
        given: its inputs.
        target: where its outputs go.

    Raises:
        ScratchError: the shard is missing or broken; a broken one is deleted, so that the next try gets it anew.
    """
    if target.exists():
        return
    prefix = f"{skeleton.architecture.layers_prefix}.{layer}."
    read, _ = read_tensors(packed, "the quantized layer", prefix=prefix)
    tensors = {name: tensor.to(skeleton.device) for name, tensor in read.items()}
    del read
    sites = skeleton.architecture.kept_sites(recipe.skip_linears, layer)
    module = packed_layer(skeleton.empty_layer(layer), sites, recipe, tensors)
    del tensors
    with BoundaryWriter(target) as out:
        for X in read_micro_batches(given, recipe.calibration, skeleton.config.hidden_size):
            cache = new_cache(skeleton.config, recipe.kv_cache, [module]) if recipe.kv_cache.bits < 16 else None
            out.write(skeleton.forward(module, X.to(skeleton.device), cache=cache))
            del X, cache
