"""Launches of the INT4 linear."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int8
from torch import Tensor

from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.configs import LinearConfig, linear_config
from duquant.kernels.gpu.launch import COUNTERS, arrival_counters, capability, is_interpreted
from duquant.kernels.gpu.linear_kernels import linear_kernel, planes_kernel, split_linear_kernel
from duquant.kernels.types import LinearWeight, QuantizedActivation

_OUT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_GROUP = 8
_PLANES_BLOCK = 4096


@dataclass(frozen=True)
class PlanarActivation(QuantizedActivation):
    """A quantized activation that also has its codes in the form that products of many rows read."""

    planes: Int8[Tensor, "2 tokens half"] | None = None
    """Centred codes of the even and of the odd channels."""


def int4_linear(
    X: QuantizedActivation,
    W: LinearWeight,
    bias: Float[Tensor, " out_features"] | None,
    dtype: torch.dtype,
    *,
    config: LinearConfig | None = None,
) -> Float[Tensor, "tokens out_features"]:
    """Return X W.T + bias, bit for bit the reference's; `config` overrides the table's tiles.

    Raises:
        KernelUnavailableError: the weight has groups or not 4 bits, or the result is to be in an odd dtype.
    """
    require_linear(W)
    if dtype not in _OUT:
        raise KernelUnavailableError(f"GPU products are written as float32, bfloat16 or float16, not {dtype}")
    tokens, out_features = X.data.shape[0], W.out_features
    Y = torch.empty(tokens, out_features, dtype=dtype, device=X.data.device)
    if tokens == 0:
        return Y
    row_bytes = -(-W.in_features // 2)
    weight = W.data.view(torch.uint8)
    config = config or linear_config(tokens, out_features, row_bytes, capability(Y.device))
    rows, plane = _activation_rows(X, config)
    split = max(config.split, 1)
    steps = triton.cdiv(triton.cdiv(row_bytes, config.block_k), split)
    is_even = steps * split * config.block_k == row_bytes
    arguments: dict[str, Any] = {
        "X_ptr": rows, "W_ptr": weight, "Y_ptr": Y,
        "X_scale_ptr": X.scale, "X_zero_ptr": X.zero_point, "X_sum_ptr": X.row_sum,
        "W_scale_ptr": W.scale, "W_zero_ptr": W.zero_point, "W_sum_ptr": W.weight_sum,
        "bias_ptr": W.scale if bias is None else bias,
        "M": tokens, "N": out_features, "K": W.in_features,
        "X_bytes": row_bytes, "X_stride": row_bytes, "W_stride": weight.stride(0), "X_plane": plane,
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "STEPS": steps, "STAGES": config.stages,
        "HAS_BIAS": bias is not None, "IS_PACKED": plane == 0, "EVEN_K": is_even,
        "USE_ASM": not is_interpreted(), "OUT": _OUT[dtype],
        "num_warps": config.warps, "num_stages": config.stages,
        # The reference rounds a product before it adds the bias.
        "enable_fp_fusion": False,
    }  # fmt: skip
    tiles_m, tiles_n = triton.cdiv(tokens, config.block_m), triton.cdiv(out_features, config.block_n)
    if config.split == 0:
        if config.unpack_weight and is_even:
            arguments["W_ptr"] = unpack_planes(weight[:, :row_bytes].contiguous(), offset=0)
            arguments["W_stride"] = row_bytes
        planes = arguments["W_ptr"]
        linear_kernel[(tiles_m * tiles_n,)](
            **arguments, W_plane=out_features * row_bytes, IS_UNPACKED=planes is not weight, GROUP=_GROUP
        )
        return Y
    if tiles_m * tiles_n > COUNTERS:
        raise KernelUnavailableError(f"{tiles_m * tiles_n} tiles are more than can count their arrivals ({COUNTERS})")
    partial = torch.empty(
        (split, tiles_m * tiles_n, config.block_n, config.block_m) if split > 1 else (1,),
        dtype=torch.int32,
        device=Y.device,
    )
    split_linear_kernel[(tiles_n, split, tiles_m)](
        **arguments,
        partial_ptr=partial,
        arrived_ptr=arrival_counters(Y.device),
        SPLIT=split,
    )
    return Y


def require_linear(W: LinearWeight) -> None:
    """Check that the kernels can read a weight.

    Raises:
        KernelUnavailableError: they cannot.
    """
    if W.bits != 4:
        raise KernelUnavailableError(f"the GPU linear multiplies 4-bit weights, not {W.bits}-bit ones")
    if W.scale.shape[1] != 1:
        raise KernelUnavailableError(
            f"the GPU linear takes one scale for each output channel; this weight has {W.scale.shape[1]} groups"
        )


def unpack_planes(data: Tensor, *, offset: int) -> Int8[Tensor, "2 rows half"]:
    """Return the low and the high nibbles of uint8 (rows, half) as two int8 planes, minus `offset`."""
    planes = torch.empty((2, *data.shape), dtype=torch.int8, device=data.device)
    count = data.numel()
    planes_kernel[(triton.cdiv(count, _PLANES_BLOCK),)](
        data, planes, count, count, OFFSET=offset, USE_ASM=not is_interpreted(), BLOCK=_PLANES_BLOCK, num_warps=8
    )
    return planes


def _activation_rows(X: QuantizedActivation, config: LinearConfig) -> tuple[Tensor, int]:
    """Return the codes as the kernels read them, and how far apart their planes are: 0 when they are packed."""
    if isinstance(X, PlanarActivation) and X.planes is not None:
        planes = X.planes
    elif not X.is_packed:
        codes = torch.nn.functional.pad(X.data, (0, X.data.shape[1] % 2))
        planes = codes.view(codes.shape[0], -1, 2).permute(2, 0, 1).contiguous()
    elif config.unpack_activation:
        planes = unpack_planes(X.data.contiguous(), offset=8)
    else:
        return X.data.contiguous(), 0
    return planes, planes.stride(0)
