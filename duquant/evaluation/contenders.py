"""What an artifact's speed is measured beside: the same model in bfloat16, and the same codes under other transforms.

Only shapes decide the time, so contenders without an artifact of their own are made of this one's tensors. INT4
contenders are the loaded model itself, with another transform put before its rounding: the same weights, the same
kernels, one copy in memory. The bfloat16 model has the artifact's embeddings and norms, and as weights what the packed
codes stand for, in the transformed basis. Neither would say anything sensible; they take the time that a model of these
shapes takes.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin

from duquant.config import Recipe, TransformConfig, preset
from duquant.errors import UnsupportedModelError
from duquant.evaluation.contender_names import DUQUANT, HADAMARD, RTN
from duquant.inference.modules import DuQuantLinear, SiteModule
from duquant.kernels import PreparedTransform, prepare_transform
from duquant.models.building import one_at_a_time
from duquant.transforms.site import search_transform

_SAMPLE_ROWS = 64


def kind_of(recipe: Recipe) -> str:
    """Return which of the contenders an artifact itself is, by its online transform."""
    transform = recipe.transform
    if transform.rotation == "none":
        return RTN
    return HADAMARD if transform.permutation in ("none", "transpose") else DUQUANT


class Transforms:
    """The sites of some layers, and for each contender the transform that runs there.

    One for each site: a single one would stay in a cache that a model's many do not fit.
    """

    def __init__(self, layers: nn.Module, recipe: Recipe) -> None:
        self._sites = [module for module in layers.modules() if isinstance(module, SiteModule)]
        own = kind_of(recipe)
        made = {
            kind: [_prepared(kind, site, recipe, n) for n, site in enumerate(self._sites)]
            for kind in (RTN, HADAMARD, DUQUANT)
            if kind != own
        }
        self._by_kind: Mapping[str, list[PreparedTransform]] = {
            **made,
            own: [site.prepared() for site in self._sites],
        }
        self.own = own

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the INT4 contenders."""
        return (RTN, HADAMARD, DUQUANT)

    def use(self, kind: str) -> None:
        """Put a contender's transforms in place."""
        for site, transform in zip(self._sites, self._by_kind[kind], strict=True):
            site.use(transform)


def _prepared(kind: str, site: SiteModule, recipe: Recipe, seed: int) -> PreparedTransform:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(_SAMPLE_ROWS, site.width, generator=generator).to(site.act_clip_ratio.device)
    configs = {
        RTN: TransformConfig(),
        HADAMARD: preset("quarot").transform,
        # Hadamard blocks for R1 and R2: the greedy search finds others of the same size, and takes its time.
        DUQUANT: TransformConfig(rotation="hadamard", permutation="zigzag"),
    }
    transform = search_transform(X, configs[kind], generator)
    return prepare_transform(transform, recipe.activation, site.act_clip_ratio)


@torch.no_grad()
def dense_twin(packed: Any, *, layers: int | None = None) -> Any:
    """Return the unquantized bfloat16 model of an artifact's shapes; see the module on its weights.

    Args:
        packed: the loaded artifact.
        layers: how many of its layers; none takes all.

    Raises:
        UnsupportedModelError: transformers' own model has no linears where the artifact has them.
    """
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with one_at_a_time(), torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    twin.model.layers = twin.model.layers[:layers]
    linears = {name: module for name, module in packed.named_modules() if isinstance(module, DuQuantLinear)}
    for name, _ in list(twin.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        try:
            if owner in linears and leaf == "weight":
                value = linears[owner].dequantized_weight().bfloat16()
            else:
                value = packed.get_parameter(name).detach()
        except AttributeError as err:
            raise UnsupportedModelError(f"the artifact has no {name}, which the unquantized model has") from err
        twin.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    for name, _ in list(twin.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        twin.get_submodule(owner).register_buffer(leaf, packed.get_buffer(name), persistent=False)
    return twin.eval()


class DenseCacheLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer in 16 bits, in buffers with room to spare.

    transformers' own growing cache copies all of it for each new token; beside that, any other would look fast.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._count = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the buffers."""
        batch, heads, _, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(batch, heads, self._room, head_dim)
        self.values = value_states.new_empty(batch, heads, self._room, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch heads new_tokens head_dim"],
        value_states: Float[Tensor, "batch heads new_tokens value_dim"],
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._count + key_states.shape[2]
        self.keys[:, :, self._count : end] = key_states
        self.values[:, :, self._count : end] = value_states
        self._count = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        return self._count

    def get_max_length(self) -> int:
        """Return the room."""
        return self._room

    def get_max_cache_shape(self) -> int:
        """Return the room (the name before transformers 5.2)."""
        return self._room

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """Return (length, offset) of the keys that the next `query_length` queries see."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else int(query_length)
        return self._count + new, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens; the count is negative, as in transformers' dynamic cache."""
        self._count += tokens_to_remove


def dense_cache(layers: int, room: int) -> Cache:
    """Return a 16-bit cache with room for so many tokens."""
    return Cache(layers=[DenseCacheLayer(room) for _ in range(layers)])


def linear_bytes(packed: Any) -> dict[str, int | float]:
    """Return the bytes of an artifact's linears in memory, what the kernels keep included, beside bfloat16's.

    To be called after a forward pass: the kernels make what they keep at the first use.
    """
    linears = [module for module in packed.modules() if isinstance(module, DuQuantLinear)]
    dense = sum(2 * linear.in_features * linear.out_features for linear in linears)
    tensors: list[Tensor] = [tensor for linear in linears for tensor in linear.parameters()]
    for module in packed.modules():
        for readers in module.readers if isinstance(module, SiteModule) else ():
            if (W := readers.joined) is not None:
                tensors += [W.data, W.scale, W.zero_point, W.weight_sum]
                if isinstance(W.state, Tensor):  # what a backend has made of the codes beside them
                    tensors.append(W.state)
    # Linears are parts of the kernels' tensors: each piece of memory counts once.
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    held = sum(storages.values())
    return {"bfloat16": dense, "int4": held, "ratio": round(held / dense, 4)}
