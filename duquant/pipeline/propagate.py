"""Running a quantized layer over calibration text, as it will run in the artifact, for the inputs of the next layer."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from duquant.calibration.boundaries import BoundaryWriter, read_micro_batches
from duquant.config import Recipe
from duquant.errors import ScratchError
from duquant.inference.hf import new_cache
from duquant.inference.layers import packed_layer
from duquant.models.skeleton import Skeleton


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
    try:
        with safe_open(packed, framework="pt", device=str(skeleton.device)) as reader:
            tensors = {name.removeprefix(prefix): reader.get_tensor(name) for name in list(reader.keys())}
    except (OSError, SafetensorError) as err:
        if isinstance(err, SafetensorError):
            packed.unlink(missing_ok=True)
        raise ScratchError(f"cannot read the quantized layer {packed}: {err}") from err
    sites = skeleton.architecture.kept_sites(recipe.skip_linears, layer)
    module = packed_layer(skeleton.empty_layer(layer), sites, recipe, tensors)
    del tensors
    with BoundaryWriter(target) as out:
        for X in read_micro_batches(given, recipe.calibration, skeleton.config.hidden_size):
            cache = new_cache(skeleton.config, recipe.kv_cache, [module]) if recipe.kv_cache.bits < 16 else None
            out.write(skeleton.forward(module, X.to(skeleton.device), cache=cache))
            del X, cache
