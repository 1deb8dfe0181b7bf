"""The reference backend: plain torch, any device, exact integers. It defines the results that the others must give."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from duquant.config import ActivationConfig
from duquant.errors import ShapeError
from duquant.kernels.types import (
    CHECKPOINT_LAYOUT,
    Backend,
    LinearWeight,
    PackedWeight,
    PreparedTransform,
    QuantizedActivation,
    join_weights,
    pack_pairs,
)
from duquant.quantizers.affine import code_range, row_grid
from duquant.quantizers.kv import KVQuantizer, PackedKV
from duquant.quantizers.packing import unpack
from duquant.quantizers.weight import resolve_group_size
from duquant.transforms.site import SiteTransform

_FLOAT32_EXACT = 2**24


class ReferenceBackend:
    """The definition. Slow: it unpacks a weight for every product."""

    name = "reference"

    def require(self, device: torch.device) -> str:
        """Return what runs: torch, on any device."""
        del device
        return "plain torch, any device"

    def prepare_transform(
        self, transform: SiteTransform, config: ActivationConfig, clip_ratio: Float[Tensor, "2"]
    ) -> PreparedTransform:
        """Keep the transform as it is."""
        return PreparedTransform(transform, config, clip_ratio, backend=self)

    def prepare_weight(self, weights: Sequence[PackedWeight]) -> LinearWeight:
        """Join the weights' rows."""
        return join_weights(weights, self)

    def restore_weight(self, weight: LinearWeight) -> Int32[Tensor, "out_features words"]:
        """Return the words as they are."""
        return weight.data

    def weight_codes(self, W: LinearWeight) -> Int8[Tensor, "out_features in_features"]:
        """Return the codes of a weight of any backend."""
        backend: Backend = W.backend
        words = W.data if W.layout == CHECKPOINT_LAYOUT else backend.restore_weight(W)
        return unpack(words, W.in_features, bits=W.bits)

    def transform_quantize_pack(
        self, X: Float[Tensor, "tokens in_features"], transform: PreparedTransform
    ) -> QuantizedActivation:
        """Apply R1, P, R2 in float32, choose each row's grid, and round: q = round(x / scale) + zero_point, clamped.

        The division is a product with the float32 reciprocal of the scale: the same on every backend, and fast.
        """
        config = transform.config
        transformed = transform.transform.apply(X.float())
        group_size = resolve_group_size(X.shape[1], config.group_size)
        grouped = transformed.reshape(X.shape[0], X.shape[1] // group_size, group_size)
        grid = row_grid(
            grouped, bits=config.bits, symmetric=config.symmetric, clip_ratio=transform.clip_ratio.to(X.device)
        )
        qmin, qmax = code_range(config.bits)
        rounded = grouped.mul(grid.scale.reciprocal()).round_().add_(grid.zero_point)
        codes = rounded.clamp_(qmin, qmax).to(torch.int8)  # (tokens, groups, group_size)
        flat = codes.view(X.shape)
        return QuantizedActivation(
            data=pack_pairs(flat) if config.bits <= 4 else flat,
            scale=grid.scale.squeeze(-1),
            zero_point=grid.zero_point.squeeze(-1),
            row_sum=codes.sum(-1, dtype=torch.int32).float(),
            in_features=X.shape[1],
            bits=config.bits,
        )

    def int4_linear(
        self,
        X: QuantizedActivation,
        W: LinearWeight,
        bias: Float[Tensor, " out_features"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "tokens out_features"]:
        """Return X W.T + bias from integer codes.

        With x = s_x (q_x - z_x) and w = s_w (q_w - z_w) per group:
        x.w = s_x s_w [ (q_x.q_w - z_w sum(q_x)) - z_x sum(q_w - z_w) ]. The bracket is a whole number. It is computed
        exactly (in float64 here), rounded once to float32, times s_w, times s_x, plus the bias in float32 (groups are
        added in order before s_x), then rounded to `dtype`. Any backend can do just that, so all give the same bits.
        Where activations have groups, each group's term takes its own s_x before it is added.
        """
        q_x = X.codes
        groups = W.scale.shape[1]
        is_grouped = X.scale.shape[1] > 1
        width = W.in_features // groups
        q_w = self.weight_codes(W)
        zero_point, weight_sum = W.zero_point.double(), W.weight_sum.double()
        total: Tensor | None = None
        for group in range(groups):
            columns = slice(group * width, (group + 1) * width)
            of_group = slice(group, group + 1) if is_grouped else slice(None)
            row_sum = X.row_sum[:, of_group]
            if groups > 1 and not is_grouped:
                row_sum = q_x[:, columns].sum(-1, keepdim=True, dtype=torch.int32)
            bracket = _int_matmul(q_x[:, columns], q_w[:, columns]).addmm_(
                torch.cat((row_sum.double(), X.zero_point[:, of_group].double()), dim=1),
                torch.stack((zero_point[:, group], weight_sum[:, group])),
                alpha=-1,
            )
            term = bracket.float().mul_(W.scale[:, group])
            if is_grouped:
                term.mul_(X.scale[:, of_group])
            total = term if total is None else total.add_(term)
        assert total is not None
        if not is_grouped:
            total.mul_(X.scale)
        if bias is not None:
            total.add_(bias.float())
        return total.to(dtype)

    def int4_kv_attention(
        self,
        Q: Float[Tensor, "batch heads queries head_dim"],
        keys: PackedKV,
        values: PackedKV,
        quantizer: KVQuantizer,
        *,
        scaling: float,
        mask: Tensor | None,
        sinks: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Dequantize keys and values to float32 and attend to them."""
        K, V = (quantizer.dequantize(part, torch.float32) for part in (keys, values))
        if sinks is not None:
            K, V = (torch.cat((whole.float(), part), dim=2) for whole, part in zip(sinks, (K, V), strict=True))
        repeats = Q.shape[1] // K.shape[1]
        K, V = (part.repeat_interleave(repeats, dim=1) for part in (K, V))
        scores = Q.float() @ K.transpose(-1, -2) * scaling
        queries, tokens = scores.shape[-2:]
        if mask is None:
            visible = torch.ones(queries, tokens, dtype=torch.bool, device=Q.device).tril(tokens - queries)
            scores = scores.masked_fill(~visible, float("-inf"))
        elif mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        else:
            scores = scores + mask.float()
        return (torch.softmax(scores, dim=-1) @ V).to(Q.dtype)


def fake_linear(X: Float[Tensor, "tokens in_features"], W: PackedWeight) -> Float[Tensor, "tokens out_features"]:
    """Return X W.T for activations left in 16 bits: the weight is dequantized for this one product."""
    codes = unpack(W.packed, W.in_features, bits=W.bits)
    grouped = codes.view(codes.shape[0], W.scale.shape[1], -1).float()
    values = (grouped - W.zero_point[..., None]) * W.scale[..., None]
    return X.float() @ values.view(codes.shape).T


def _int_matmul(A: Int8[Tensor, "m k"], B: Int8[Tensor, "n k"]) -> Float[Tensor, "m n"]:
    """Return A B.T exactly, as float64."""
    if A.device.type == "cpu":
        return torch._int_mm(A, B.T).double()
    # CUDA's integer product wants padded shapes; float products of whole numbers are exact while the sum stays small.
    exact = torch.float32 if A.shape[1] * 128 * 128 < _FLOAT32_EXACT else torch.float64
    return (A.to(exact) @ B.to(exact).T).double()


def check_linear(X: QuantizedActivation, W: LinearWeight, bias: Tensor | None) -> None:
    """Check what any backend needs of a linear's operands.

    Raises:
        ShapeError: widths, devices, dtypes or the bias's length do not fit together.
    """
    if X.in_features != W.in_features:
        raise ShapeError(f"the activation has {X.in_features} channels, the weight {W.in_features}")
    if X.data.dtype not in (torch.uint8, torch.int8):
        raise ShapeError(f"activation codes are {X.data.dtype}; they must be uint8 pairs or int8")
    expected = -(-X.in_features // 2) if X.is_packed else X.in_features
    if X.data.shape[1] != expected:
        raise ShapeError(f"{X.data.shape[1]} bytes a row do not hold {X.in_features} channels; the pack is corrupt")
    if X.scale.shape[1] not in (1, W.scale.shape[1]):
        raise ShapeError(f"the activation has {X.scale.shape[1]} groups, the weight {W.scale.shape[1]}")
    if X.data.device != W.data.device:
        raise ShapeError(f"the activation is on {X.data.device}, the weight on {W.data.device}")
    if bias is not None and bias.shape != (W.out_features,):
        raise ShapeError(f"the bias has shape {tuple(bias.shape)}, the weight {W.out_features} rows")
