"""RMSNorm on the CPU."""

from ctypes import byref

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.kernels.cpu.library import NormArgs, library


def rms_norm(
    X: Float[Tensor, "*rows channels"], weight: Float[Tensor, " channels"], epsilon: float
) -> Float[Tensor, "*rows channels"]:
    """See duquant.kernels.rms_norm, which has checked dtypes and sizes."""
    X, weight = X.contiguous(), weight.contiguous()
    out = torch.empty_like(X)
    channels = weight.shape[0]
    tokens = X.numel() // channels
    args = NormArgs(
        X.data_ptr(), weight.data_ptr(), out.data_ptr(), tokens, channels, epsilon, X.dtype == torch.bfloat16
    )
    if tokens:
        library().rms_norm(byref(args), torch.get_num_threads())
    return out
