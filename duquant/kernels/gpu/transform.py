"""Preparation and launches of transform, rounding and packing."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from jaxtyping import Float, Int32
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import KernelUnavailableError
from duquant.kernels.gpu.configs import DECODE_ROWS, MAX_BLOCK, MAX_ROW_ELEMENTS, PREFILL_TOKENS, row_config
from duquant.kernels.gpu.launch import is_interpreted
from duquant.kernels.gpu.linear import PlanarActivation
from duquant.kernels.gpu.transform_kernels import (
    block_range_kernel,
    quantize_blocks_kernel,
    quantize_rows_kernel,
    rotate_permute_kernel,
)
from duquant.kernels.types import PreparedTransform, QuantizedActivation
from duquant.transforms.site import SiteTransform

_PLAIN_BLOCK = 128
"""Channels that a row is cut into when nothing is rotated."""


@dataclass(frozen=True)
class TransformState:
    """A transform as the kernels read it: an optional first step (R1, P), and a last rotation with the rounding."""

    first: Tensor | None
    """R1, bfloat16 (blocks or 1, n, n), when there is a first step that rotates."""
    target: Int32[Tensor, " channels"] | None
    """Where the first step puts each channel."""
    last: Tensor | None
    """The last rotation, bfloat16 (blocks or 1, 2, n, n / 2): its even columns, then its odd ones."""
    block: int
    clip_ratio: Float[Tensor, "2"]

    @property
    def has_first_step(self) -> bool:
        """Tell whether anything comes before the last rotation."""
        return self.first is not None or self.target is not None

    @property
    def is_last_shared(self) -> bool:
        """Tell whether all blocks share the last rotation, or there is none."""
        return self.last is None or self.last.shape[0] == 1


def prepare(transform: SiteTransform, clip_ratio: Float[Tensor, "2"]) -> TransformState:
    """Bring a transform into the kernels' dtypes and layouts.

    Raises:
        KernelUnavailableError: its blocks are odd or too large for the kernels.
    """
    R1, perm, R2 = transform.R1, transform.perm, transform.R2
    n = R1.shape[-1] if R1 is not None else R2.shape[-1] if R2 is not None else _PLAIN_BLOCK
    if n % 2 or n > MAX_BLOCK:
        raise KernelUnavailableError(f"GPU transforms rotate even blocks of up to {MAX_BLOCK} channels, not {n}")
    if R2 is not None and R2.shape[-1] != n:
        raise KernelUnavailableError(f"GPU transforms rotate blocks of one side, not of {n} and then {R2.shape[-1]}")
    first, last = (R1, R2) if R2 is not None or perm is not None else (None, R1)
    target = None
    if perm is not None:
        if R1 is None and R2 is None and perm.shape[0] % n:
            raise KernelUnavailableError(f"a permutation alone needs a width that {n} divides, not {perm.shape[0]}")
        target = torch.empty_like(perm)
        target[perm] = torch.arange(perm.shape[0], device=perm.device)
        target = target.to(clip_ratio.device, torch.int32)
    return TransformState(
        first=None if first is None else _blocks(first, clip_ratio.device),
        target=target,
        last=None if last is None else _halves(_blocks(last, clip_ratio.device)),
        block=n,
        clip_ratio=clip_ratio.float().contiguous(),
    )


def transform_quantize_pack(
    X: Float[Tensor, "tokens in_features"], transform: PreparedTransform
) -> QuantizedActivation:
    """See duquant.kernels.transform_quantize_pack."""
    state = transform.state
    assert isinstance(state, TransformState)
    X = X if X.stride(1) == 1 else X.contiguous()
    target = _empty_result(X, transform.config)
    if X.shape[0] == 0:
        return target
    is_small = X.shape[0] <= DECODE_ROWS
    padded = triton.next_power_of_2(triton.cdiv(X.shape[1], state.block)) * _pad(state.block)
    if state.is_last_shared and padded <= MAX_ROW_ELEMENTS and (is_small or not state.has_first_step):
        rows = _first_step(X, state, tile=16, is_tiled=False) if state.has_first_step else X
        _quantize_rows(rows, state, transform.config, target)
    else:
        tiled = _first_step(X, state, tile=16 if is_small else PREFILL_TOKENS, is_tiled=True)
        _quantize_blocks(tiled, state, transform.config, target)
    return target


def _empty_result(X: Tensor, config: ActivationConfig) -> PlanarActivation:
    tokens, width = X.shape
    half = -(-width // 2)
    is_packed = config.bits <= 4

    def column() -> Tensor:
        return torch.empty(tokens, 1, dtype=torch.float32, device=X.device)

    return PlanarActivation(
        data=torch.empty(
            tokens, half if is_packed else width, dtype=torch.uint8 if is_packed else torch.int8, device=X.device
        ),
        scale=column(),
        zero_point=column(),
        row_sum=column(),
        in_features=width,
        bits=config.bits,
        planes=torch.empty(2, tokens, half, dtype=torch.int8, device=X.device) if tokens > DECODE_ROWS else None,
    )


def _first_step(X: Tensor, state: TransformState, *, tile: int, is_tiled: bool) -> Tensor:
    """Return (X R1)[:, P] in bfloat16: (tokens, channels), or (tiles, channels, tile)."""
    tokens, width = X.shape
    tiles = triton.cdiv(tokens, tile)
    shape = (tiles, width, tile) if is_tiled else (tokens, width)
    Y = torch.empty(shape, dtype=torch.bfloat16, device=X.device)
    n = state.block
    rotate_permute_kernel[(tiles, width // n)](
        X, Y if state.first is None else state.first, Y if state.target is None else state.target, Y,
        tokens, width, X.stride(0), 0 if state.first is None or state.first.shape[0] == 1 else n * n,
        N=n, N_PAD=_pad(n), TOKENS=tile, HAS_R=state.first is not None, HAS_PERM=state.target is not None,
        IS_TILED=is_tiled, **_common(),
    )  # fmt: skip
    return Y


def _quantize_rows(X: Tensor, state: TransformState, config: ActivationConfig, target: PlanarActivation) -> None:
    tokens, width = X.shape
    n = state.block
    blocks = triton.next_power_of_2(triton.cdiv(width, n))
    rows = row_config(tokens, blocks, _pad(n))
    quantize_rows_kernel[(triton.cdiv(tokens, rows.tokens),)](
        X, X if state.last is None else state.last, state.clip_ratio, *_outputs(target),
        tokens, width, -(-width // 2), X.stride(0), _plane(target),
        N=n, N_PAD=_pad(n), BLOCKS_PAD=blocks, TOKENS=rows.tokens, HAS_R=state.last is not None,
        BITS=config.bits, IS_SYMMETRIC=config.symmetric, HAS_PLANES=target.planes is not None,
        num_warps=rows.warps, **_common(),
    )  # fmt: skip


def _quantize_blocks(Y: Tensor, state: TransformState, config: ActivationConfig, target: PlanarActivation) -> None:
    tiles, width, tile = Y.shape
    tokens, n = target.data.shape[0], state.block
    blocks = width // n
    ranges = torch.empty(2, blocks, tokens, dtype=torch.float32, device=Y.device)
    R = Y if state.last is None else state.last
    R_stride = 0 if state.is_last_shared else n * n
    shape = {"N": n, "N_PAD": _pad(n), "TOKENS": tile, "HAS_R": state.last is not None}
    block_range_kernel[(tiles, blocks)](
        Y, R, ranges[0], ranges[1], target.row_sum, tokens, width, R_stride, **shape, **_common()
    )
    quantize_blocks_kernel[(tiles, blocks)](
        Y, R, ranges[0], ranges[1], state.clip_ratio, *_outputs(target),
        tokens, width, -(-width // 2), blocks, R_stride, _plane(target),
        BLOCKS_PAD=triton.next_power_of_2(blocks), BITS=config.bits, IS_SYMMETRIC=config.symmetric,
        HAS_PLANES=target.planes is not None, **shape, **_common(),
    )  # fmt: skip


def _outputs(target: PlanarActivation) -> tuple[Tensor, ...]:
    planes = target.data if target.planes is None else target.planes
    return target.data, planes, target.scale, target.zero_point, target.row_sum


def _plane(target: PlanarActivation) -> int:
    return 0 if target.planes is None else target.planes.stride(0)


def _common() -> dict[str, Any]:
    return {"IN_FLOAT32": is_interpreted(), "enable_fp_fusion": False}


def _blocks(R: Tensor, device: torch.device) -> Tensor:
    """Return R as bfloat16 (blocks or 1, n, n)."""
    return R.to(device, torch.bfloat16).reshape(-1, *R.shape[-2:]).contiguous()


def _halves(R: Tensor) -> Tensor:
    """Return (blocks, n, n) as (blocks, 2, n, n / 2): even columns, odd columns."""
    return torch.stack((R[..., 0::2], R[..., 1::2]), dim=1).contiguous()


def _pad(n: int) -> int:
    """Return the side of the tile that holds a block: a power of two that the tensor cores take, halved as well."""
    return max(32, int(triton.next_power_of_2(n)))
