"""Model skeletons on the meta device, and decoder layers that borrow real tensors for a while."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from duquant.errors import SourceError, UnsupportedModelError
from duquant.models.architecture import Architecture
from duquant.models.attention import OBSERVABLE, head_dim_of
from duquant.models.building import one_at_a_time
from duquant.models.experts import split_experts
from duquant.models.source import SourceCheckpoint

COMPUTE_DTYPE = torch.bfloat16
"""Dtype of calibration forward passes. bfloat16 matrix products are several times faster than float32 everywhere."""


class Skeleton:
    """The decoder layers of a model without their weights.

    `layer(index, tensors)` lends one layer its tensors; nothing is kept after the `with` block.

    Args:
        source: the model.
        device: where layers run.
        dtype: what they compute in.

    Raises:
        UnsupportedModelError: transformers cannot build a model from config.json.
    """

    def __init__(self, source: SourceCheckpoint, device: torch.device, *, dtype: torch.dtype = COMPUTE_DTYPE) -> None:
        self.architecture: Architecture = source.architecture
        self.device = device
        self._dtype = dtype
        self.config = load_config(source)
        try:
            with one_at_a_time(), init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation=OBSERVABLE)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise UnsupportedModelError(
                f"{source.path / 'config.json'}: transformers cannot build the model: {err}"
            ) from err
        if self.architecture.experts:
            for layer in model.model.layers:
                split_experts(layer, self.architecture.experts)
        model.eval()
        self._model = model
        self._rotary = model.model.rotary_emb.to(device)

    def layer_names(self, layer: int) -> dict[str, torch.Size]:
        """Return the parameters of a layer, by their names inside it, with their shapes."""
        return {name: p.shape for name, p in self._model.model.layers[layer].named_parameters()}

    def load(self, source: SourceCheckpoint, layer: int) -> dict[str, Tensor]:
        """Read one layer's tensors from the source in their stored dtype, with shapes checked.

        Raises:
            SourceError: a tensor is missing, has another shape than the config says, or is not finite.
        """
        shapes = self.layer_names(layer)
        tensors = source.layer_tensors(layer, shapes)
        _check_shapes(f"{source.path}: layer {layer} ", tensors, shapes)
        return tensors

    def load_extra(self, source: SourceCheckpoint) -> dict[str, Tensor]:
        """Read what is outside the layers: embeddings, final norm, and the head unless it is tied.

        Raises:
            SourceError: a tensor is missing, has another shape than the config says, or is not finite.
        """
        names = [self.architecture.embeddings, self.architecture.final_norm]
        if not self.config.tie_word_embeddings:
            names.append(self.architecture.head)
        tensors = source.tensors(names)
        _check_shapes(f"{source.path}: ", tensors, {name: self._model.get_parameter(name).shape for name in names})
        return tensors

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; transformers knows each family's default."""
        return int(self.config.num_key_value_heads)

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return head_dim_of(self.config)

    @contextmanager
    def layer(
        self, index: int, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
    ) -> Iterator[nn.Module]:
        """Lend decoder layer `index` these tensors, converted to `dtype` (else the compute dtype) on the device."""
        module = self._model.model.layers[index]
        state = {name: tensor.to(self.device, dtype or self._dtype) for name, tensor in tensors.items()}
        module.load_state_dict(state, assign=True)
        try:
            yield module
        finally:
            module.to("meta")

    def empty_layer(self, index: int) -> nn.Module:
        """Return a copy of decoder layer `index` without tensors, on the meta device."""
        layer = copy.deepcopy(self._model.model.layers[index])
        assert isinstance(layer, nn.Module)
        return layer

    def embed(
        self, tokens: Int64[Tensor, "batch seq"], table: Float[Tensor, "vocab hidden"]
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the inputs of the first layer, in the compute dtype: the model's own embedding, scaled where it is."""
        embedded = functional_call(self._model.model.embed_tokens, {"weight": table.to(self._dtype)}, (tokens,))
        assert isinstance(embedded, Tensor)
        return embedded

    def logits(
        self,
        X: Float[Tensor, "batch seq hidden"],
        final_norm: Float[Tensor, " hidden"],
        head: Float[Tensor, "vocab hidden"],
    ) -> Float[Tensor, "batch seq vocab"]:
        """Return what the head makes of the last layer's outputs, in their dtype."""
        normed = functional_call(self._model.model.norm, {"weight": final_norm.to(X.dtype)}, (X,))
        assert isinstance(normed, Tensor)
        return nn.functional.linear(normed, head.to(X.dtype))

    def forward(
        self, module: nn.Module, X: Float[Tensor, "batch seq hidden"], *, cache: Any = None
    ) -> Float[Tensor, "batch seq hidden"]:
        """Run a lent layer over full windows: causal attention, positions 0..seq-1.

        `cache` stands where transformers has its KV cache: its `update(keys, values, ...)` returns what is attended to.
        """
        positions = torch.arange(X.shape[1], device=X.device)[None]
        attention: Any = module.self_attn
        by_type: dict[str, str] = {}
        if self.architecture.has_rope_by_layer_type:
            by_type["layer_type"] = self.config.layer_types[attention.layer_idx]
        output = module(
            X,
            attention_mask=self._mask(module, X, positions),
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=self._rotary(X, position_ids=positions, **by_type),
        )
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def _mask(self, module: nn.Module, X: Tensor, positions: Tensor) -> Tensor | None:
        """Return None where plain causal attention is right (sdpa then takes its fast path), else the window's mask."""
        # Qwen's and Gemma's attention knows its own window (it differs by layer); the others' reads the config's.
        window = getattr(module.self_attn, "sliding_window", getattr(self.config, "sliding_window", None))
        if window is None or window >= X.shape[1]:
            return None
        make = create_sliding_window_causal_mask if window else create_causal_mask
        mask = make(
            config=self.config, inputs_embeds=X, attention_mask=None, past_key_values=None, position_ids=positions
        )
        assert mask is None or isinstance(mask, Tensor)
        return mask


class NetworkEnds:
    """What is outside the layers of a model, ready to run.

    Raises:
        SourceError: its tensors are unusable.
    """

    def __init__(self, source: SourceCheckpoint, skeleton: Skeleton) -> None:
        architecture = source.architecture
        stored = skeleton.load_extra(source)
        self._skeleton = skeleton
        # On the CPU: a step reads few of its rows.
        self._table = stored[architecture.embeddings].to(COMPUTE_DTYPE)
        self._norm = stored[architecture.final_norm].to(skeleton.device)
        self._head = stored.get(architecture.head, self._table).to(skeleton.device, COMPUTE_DTYPE)

    def embed(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch seq hidden"]:
        """Return the inputs of the first layer, on the device."""
        return self._skeleton.embed(tokens, self._table).to(self._skeleton.device)

    def logits(self, X: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Return what final norm and head make of the last layer's outputs."""
        return self._skeleton.logits(X, self._norm, self._head)


def _check_shapes(where: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise SourceError(
                f"{where}{name} has shape {tuple(tensor.shape)}; config.json asks for {tuple(shapes[name])}"
            )


def load_config(source: SourceCheckpoint) -> Any:
    """Return the transformers config of a source.

    Raises:
        UnsupportedModelError: transformers refuses the config.
    """
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False, local_files_only=True)
    except (StrictDataclassError, ValueError, KeyError, OSError, TypeError) as err:
        raise UnsupportedModelError(f"{source.path / 'config.json'}: transformers cannot read it: {err}") from err
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{source.path} is already quantized; start from the unquantized model")
    return config
