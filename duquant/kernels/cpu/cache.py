"""The packed KV cache on the CPU: rounding, restoring, and attention with one query straight from the codes."""

from ctypes import byref

import torch
from jaxtyping import Float
from torch import Tensor

from duquant.errors import KernelUnavailableError, ShapeError
from duquant.kernels.cpu.library import AttentionArgs, CacheArgs, KvRowsArgs, library
from duquant.quantizers.kv import KVQuantizer, PackedKV

_MOST_HEAD_DIM = 512
_DTYPES = (torch.float32, torch.bfloat16)


def quantize_kv(X: Float[Tensor, "batch heads tokens head_dim"], quantizer: KVQuantizer, out: PackedKV) -> None:
    """Round every row as KVQuantizer does, and write codes and grids to `out`: views of a larger cache, for example.

    Raises:
        KernelUnavailableError: the cache has other than 4 bits, or its tokens do not lie next to each other.
        ShapeError: `out` is not made for these rows.
    """
    _require(quantizer)
    batch, heads, tokens, head_dim = X.shape
    if head_dim != quantizer.head_dim or out.packed.shape != (batch, heads, tokens, (head_dim + 1) // 2):
        raise ShapeError(f"rows {tuple(X.shape)} do not fit codes {tuple(out.packed.shape)}")
    if not _is_dense(out):
        raise KernelUnavailableError("the cache's tokens do not lie next to each other")
    if X.dtype not in _DTYPES or X.stride(3) != 1:
        X = X.to(X.dtype if X.dtype in _DTYPES else torch.float32).contiguous()
    rotation = quantizer.rotation_on(X.device)
    args = _rows(X, out, quantizer, rotation)
    library().quantize_kv(byref(args), torch.get_num_threads())


def dequantize_kv(
    packed: PackedKV, quantizer: KVQuantizer, dtype: torch.dtype
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Return what the codes stand for, rotated back.

    Raises:
        KernelUnavailableError: the cache has other than 4 bits.
    """
    _require(quantizer)
    made = dtype if dtype in _DTYPES else torch.float32
    out = torch.empty((*packed.packed.shape[:3], quantizer.head_dim), dtype=made)
    packed = _dense(packed)
    args = _rows(out, packed, quantizer, quantizer.inverse_on(out.device))
    library().dequantize_kv(byref(args), torch.get_num_threads())
    return out if made == dtype else out.to(dtype)


def attend(
    Q: Float[Tensor, "batch heads queries head_dim"],
    keys: PackedKV,
    values: PackedKV,
    quantizer: KVQuantizer,
    *,
    scaling: float,
    mask: Tensor | None,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "batch heads queries head_dim"]:
    """Return attention's output. Queries are rotated, not keys: the scores are the same.

    Raises:
        KernelUnavailableError: there are several queries, other than 4 bits, or a mask of its own for each head.
    """
    _require(quantizer)
    batch, heads, queries, head_dim = Q.shape
    if queries != 1:
        raise KernelUnavailableError("the kernel attends with one query at a time")
    tokens, kv_heads = keys.packed.shape[2], keys.packed.shape[1]
    query = Q.to(Q.dtype if Q.dtype in _DTYPES else torch.float32).contiguous()
    sink_keys, sink_values = (None, None) if sinks is None else (part.to(query.dtype).contiguous() for part in sinks)
    first = 0 if sink_keys is None else sink_keys.shape[2]
    added = _row_mask(mask, batch, first + tokens)
    rotation, inverse = quantizer.rotation_on(Q.device), quantizer.inverse_on(Q.device)
    keys, values = _dense(keys), _dense(values)
    out = torch.empty_like(query)
    args = AttentionArgs(
        query.data_ptr(),
        out.data_ptr(),
        _address(rotation),
        _address(inverse),
        _address(added),
        _cache(keys),
        _cache(values),
        _address(sink_keys),
        _address(sink_values),
        batch,
        kv_heads,
        heads // kv_heads,
        tokens,
        head_dim,
        first,
        first + tokens,
        scaling,
        query.dtype == torch.bfloat16,
    )
    library().attend(byref(args), torch.get_num_threads())
    return out.to(Q.dtype)


def _require(quantizer: KVQuantizer) -> None:
    if quantizer.config.bits != 4 or quantizer.head_dim > _MOST_HEAD_DIM:
        raise KernelUnavailableError(f"{quantizer.config.bits}-bit caches have no kernel yet")


def _rows(X: Tensor, packed: PackedKV, quantizer: KVQuantizer, rotation: Tensor | None) -> KvRowsArgs:
    """Return the arguments. They point into the tensors: the caller keeps these."""
    batch, heads, tokens, head_dim = X.shape
    return KvRowsArgs(
        X.data_ptr(),
        _address(rotation),
        _cache(packed),
        X.stride()[:3],
        batch,
        heads,
        tokens,
        head_dim,
        quantizer.config.clip_ratio,
        X.dtype == torch.bfloat16,
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _cache(packed: PackedKV) -> CacheArgs:
    codes, scale, low = packed
    return CacheArgs(codes.data_ptr(), scale.data_ptr(), low.data_ptr(), codes.stride()[:2], scale.stride()[:2])


def _is_dense(packed: PackedKV) -> bool:
    codes, scale, low = packed
    return codes.stride()[2:] == (codes.shape[3], 1) and scale.stride(2) == 1 and scale.stride() == low.stride()


def _dense(packed: PackedKV) -> PackedKV:
    """Return codes and grids whose tokens lie next to each other, copied only where they do not."""
    return packed if _is_dense(packed) else PackedKV(*(part.contiguous() for part in packed))


def _row_mask(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Return what is added to the scores, (batch, tokens) float32."""
    if mask is None:
        return None
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] != 1:
        raise KernelUnavailableError(f"the kernel takes one mask for all heads, not {tuple(mask.shape)}")
    rows = mask[:, 0, 0, :].expand(batch, tokens)
    if rows.dtype == torch.bool:
        return torch.zeros(batch, tokens, dtype=torch.float32).masked_fill_(~rows, float("-inf"))
    return rows.float().contiguous()
