"""The experts of a layer as linears of their own, where transformers fuses all of them into two tensors."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Expert(nn.Module):
    """One expert: the three linears of a gated MLP."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


class Experts(nn.Module):
    """All experts of a layer; computes what the fused module of transformers computes.

    What enters the experts' down_proj passes through `down_in` first, as (top_k, tokens, inner): a hook there sees the
    tokens in order, once for each of their choices.
    """

    def __init__(self, count: int, width: int, inner: int, activation: nn.Module) -> None:
        super().__init__()
        self.count = count
        self._inner = inner
        self._activation = activation
        self.down_in = nn.Identity()
        for index in range(count):
            self.add_module(str(index), Expert(width, inner))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens width"],
        top_k_index: Int64[Tensor, "tokens top_k"],
        top_k_weights: Float[Tensor, "tokens top_k"],
    ) -> Float[Tensor, "tokens width"]:
        """Return the weighted sum of each token's experts."""
        X, choices = hidden_states, top_k_index.T  # (top_k, tokens)
        inner = X.new_empty(*choices.shape, self._inner)
        sent = [(index, torch.where(choices == index)) for index in torch.unique(choices).tolist()]
        for index, (rank, token) in sent:
            expert = self._expert(index)
            rows = X[token]
            inner[rank, token] = self._activation(expert.gate_proj(rows)) * expert.up_proj(rows)
        inner = self.down_in(inner)
        # Summed at the end and not as they come: one rounding, and the same order for every token.
        weighted = inner.new_empty(*choices.shape, X.shape[1], dtype=torch.result_type(X, top_k_weights))
        for index, (rank, token) in sent:
            weighted[rank, token] = self._expert(index).down_proj(inner[rank, token]) * top_k_weights[token, rank, None]
        total: Tensor = weighted.sum(0).to(X.dtype)
        return total

    def _expert(self, index: int) -> Expert:
        expert = self._modules[str(index)]
        assert isinstance(expert, Expert)
        return expert


def split_experts(layer: nn.Module, name: str) -> None:
    """Replace a layer's fused experts by `Experts` on the same device, without weights; a dense layer has none.

    Args:
        layer: the decoder layer, changed in place.
        name: the fused module's name inside it.
    """
    try:
        fused: Any = layer.get_submodule(name)
    except AttributeError:
        return
    parameter = next(fused.parameters())
    with torch.device(parameter.device):
        experts = Experts(fused.num_experts, fused.hidden_dim, fused.intermediate_dim, fused.act_fn)
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, experts.to(parameter.dtype))
