"""The transformers quantizer: swaps linears for packed ones before weights load, and gives the model its KV cache."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from duquant.artifact.layout import FORMAT, SCHEMA_VERSION
from duquant.config import KVCacheConfig, Recipe
from duquant.errors import ArtifactError
from duquant.inference.attention import IMPLEMENTATION
from duquant.inference.cache import DuQuantCache
from duquant.inference.keys import add_key_smoothing, smoothing_by_layer
from duquant.inference.layers import pack_site
from duquant.inference.norms import use_norm_kernel
from duquant.models.attention import head_dim_of
from duquant.models.experts import split_experts
from duquant.models.families import architecture_of


@register_quantization_config(FORMAT)
class DuQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped here
    """The `quantization_config` entry of an artifact's config.json."""

    def __init__(self, recipe: dict[str, Any], schema_version: int = SCHEMA_VERSION, **_kwargs: Any) -> None:
        self.quant_method = FORMAT
        self.schema_version = schema_version
        self.recipe = recipe
        self.parsed()

    def parsed(self) -> Recipe:
        """Return the recipe.

        Raises:
            ArtifactError: the schema version is not the one this duquant reads.
        """
        if self.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"config.json has duquant schema version {self.schema_version}; this duquant reads {SCHEMA_VERSION}"
            )
        return Recipe.from_dict(self.recipe)


@register_quantizer(FORMAT)
class DuQuantHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped here
    """Loads packed checkpoints; weights stay packed in memory."""

    requires_calibration = True
    serialized_names = {  # noqa: RUF012  # transformers reads a plain class attribute
        "weight": ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"]
    }

    def _process_model_before_weight_loading(self, model: Any, **_kwargs: Any) -> None:
        recipe = self.quantization_config.parsed()
        architecture = architecture_of(model.config.to_dict())
        layers = model.get_submodule(architecture.layers_prefix)
        assert isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(layers):
            if architecture.experts:
                split_experts(layer, architecture.experts)
            for site in architecture.kept_sites(recipe.skip_linears, index):
                pack_site(layer, site, recipe)
            if recipe.kv_cache.smooth_keys:
                add_key_smoothing(layer, kv_heads=model.config.num_key_value_heads, head_dim=head_dim_of(model.config))
        # Before accelerate wraps what a model on several devices runs.
        use_norm_kernel(model)

    def update_weight_conversions(self, _weight_conversions: list[Any], _model: Any) -> list[Any]:
        """Return none: tensors of an artifact have the names of the modules, whatever the source's had."""
        return []

    def _process_model_after_weight_loading(self, model: nn.Module, **_kwargs: Any) -> None:
        # Loading marks every float parameter as trainable; a forward pass would then keep all activations.
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_as_one_matrix)
        attach_cache(model, self.quantization_config.parsed())

    def is_serializable(self, *_args: Any, **_kwargs: Any) -> bool:
        """Packed weights are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights have no gradients."""
        return False


def _as_one_matrix(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hand a linear its rows next to each other.

    For rows that are not (the last tokens of a prompt, on their way to the head), torch multiplies batch row by batch
    row, each with a copy of the weight, unless the weight wants a gradient.
    """
    if not args:  # given by its name: as torch has it
        return None
    X, *rest = args
    return X.reshape(-1, X.shape[-1]).contiguous().view(X.shape), *rest


def sliding_windows(config: Any) -> list[int | None]:
    """Return the sliding window of each layer of a transformers config, None where a layer sees all tokens."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def new_cache(config: Any, kv_cache: KVCacheConfig, layers: Iterable[nn.Module]) -> DuQuantCache:
    """Return an empty cache for a model of this transformers config, packed as its attention takes it.

    Args:
        config: of the whole model.
        kv_cache: how keys and values are rounded.
        layers: the decoder layers that the cache is for; others may use it when their keys are not smoothed.
    """
    return DuQuantCache(
        kv_cache,
        windows=sliding_windows(config),
        head_dim=head_dim_of(config),
        hands_out_packed=config._attn_implementation == IMPLEMENTATION,
        smoothing=smoothing_by_layer(layers),
    )


def attach_cache(model: Any, recipe: Recipe) -> None:
    """Make forward passes and `generate` use the recipe's KV cache wherever they would make a cache of their own."""
    if recipe.kv_cache.bits == 16:
        return
    config = model.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = IMPLEMENTATION

    def fill_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        use_cache = kwargs.get("use_cache")
        wanted = config.use_cache if use_cache is None else use_cache
        if wanted and kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = new_cache(config, recipe.kv_cache, module.layers)
        return args, kwargs

    model.model.register_forward_pre_hook(fill_cache, with_kwargs=True)

    def empty(self: Any) -> DuQuantCache:
        """Return an empty INT4 cache for this model."""
        return new_cache(self.config, recipe.kv_cache, self.model.layers)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' generate with an INT4 cache unless the caller brings one or wants none."""
        if kwargs.get("past_key_values") is None and kwargs.get("use_cache") is not False:
            kwargs["past_key_values"] = empty(self)
        return type(self).generate(self, *args, **kwargs)

    # Bound methods, so that a deep copy of the model gets those bound to the copy.
    model.generate = MethodType(generate, model)
    model.duquant_new_cache = MethodType(empty, model)
