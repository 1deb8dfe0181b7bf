"""The RMSNorms of a loaded model, in one pass over their rows: transformers takes seven."""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from duquant.kernels import rms_norm

_SAME = frozenset(
    f"{family}RMSNorm" for family in ("Llama", "Mistral", "Mixtral", "Phi3", "Qwen2", "Qwen3", "Qwen3Moe")
)
"""Classes of transformers that are one and the same; Gemma's multiplies by 1 + weight, before it rounds."""
_DTYPES = (torch.float32, torch.bfloat16)


def use_norm_kernel(model: nn.Module) -> None:
    """Let the model's norms run duquant.kernels.rms_norm on CPUs; elsewhere they stay as they are."""
    for module in model.modules():
        if type(module).__name__ in _SAME:
            # A bound method, so that a deep copy of the model gets one bound to the copy.
            module.forward = MethodType(_forward, module)


def _forward(self: Any, hidden_states: Tensor) -> Tensor:
    X, weight = hidden_states, self.weight
    is_known = X.device.type == weight.device.type == "cpu" and X.dtype in _DTYPES and weight.dtype == X.dtype
    if not is_known or (torch.is_grad_enabled() and (X.requires_grad or weight.requires_grad)):
        plain: Tensor = type(self).forward(self, X)
        return plain
    return rms_norm(X, weight, self.variance_epsilon)
