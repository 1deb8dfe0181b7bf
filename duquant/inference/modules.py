"""The modules of a quantized model: a transform per site, and linears that read it, with their weights joined."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from duquant.config import Recipe
from duquant.inference.sharing import Prepared, Shared
from duquant.kernels import (
    LinearWeight,
    PackedWeight,
    PreparedTransform,
    QuantizedActivation,
    fake_linear,
    prepare_transform,
    prepare_weight,
    transform_quantize_pack,
    transformed_linear,
)
from duquant.quantizers.outliers import OUTLIER_ACTIVATIONS, OUTLIER_WEIGHTS
from duquant.quantizers.packing import unpack
from duquant.quantizers.weight import resolve_group_size
from duquant.transforms.site import SiteTransform, rotation_sides


def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


@dataclass(frozen=True)
class _Joined:
    """The weights of linears that read the same tensor, one after the other."""

    weight: LinearWeight
    outliers: LinearWeight | None
    """Of the outlier channels, which come after the others."""
    bias: Float[Tensor, " out_features"] | None


class SiteReaders:
    """Linears that read the same tensor at a site: all of them, or those of one expert. They share one result."""

    def __init__(self, site: "SiteModule") -> None:
        self._site = site
        self._linears: list[DuQuantLinear] = []
        self._codes: Shared[QuantizedActivation | Tensor] = Shared(0)
        self._outputs: Shared[tuple[Tensor, ...]] = Shared(0)
        self._prepared: Prepared[_Joined] | None = None

    def attach(self, linear: "DuQuantLinear") -> int:
        """Add a linear; return its index."""
        self._linears.append(linear)
        self._codes.readers = self._outputs.readers = len(self._linears)
        return len(self._linears) - 1

    def codes(self, X: Float[Tensor, "*batch channels"]) -> QuantizedActivation | Tensor:
        """Return what the site makes of `X`, once for all linears."""
        return self._codes.get(X, lambda: self._site.enter(X.reshape(-1, X.shape[-1])))

    def output(self, X: Float[Tensor, "*batch channels"], index: int) -> Float[Tensor, "rows out_features"]:
        """Return linear `index`'s X W.T + bias in the dtype of `X`: all the linears are one product."""
        return self._outputs.get(X, lambda: self._all_outputs(X))[index]

    @property
    def keeps_results(self) -> bool:
        """Whether a result waits for more linears to ask for it."""
        return self._codes.result is not None or self._outputs.result is not None

    @property
    def joined(self) -> LinearWeight | None:
        """The weights as the kernels have them, once they ran."""
        return None if self._prepared is None else self._prepared.result.weight

    def _all_outputs(self, X: Tensor) -> tuple[Tensor, ...]:
        ready = self._ready()
        rows = X.reshape(-1, X.shape[-1])
        if ready.outliers is None:
            Y = transformed_linear(rows, self._site.prepared(), ready.weight, bias=ready.bias, dtype=X.dtype)
        else:
            most, last = self._site.in_parts(rows)
            Y = transformed_linear(most, self._site.prepared(), ready.weight, bias=ready.bias)
            Y = (Y + transformed_linear(last, self._site.prepared_outliers(), ready.outliers)).to(X.dtype)
        return (Y,) if len(self._linears) == 1 else torch.split_with_sizes(Y, ready.weight.splits, dim=1)

    def _ready(self) -> _Joined:
        """Return what the kernels run on: made when first asked for, and again when parameters were replaced."""
        ready = self._prepared
        if ready is None or not ready.is_of(self._parameters_read()):
            joined = self._join()
            # Only now: joining gives the linears other data.
            ready = self._prepared = Prepared(joined, self._parameters_read())
        return ready.result

    def _parameters_read(self) -> tuple[nn.Parameter | None, ...]:
        return tuple(linear._parameters["weight_packed"] for linear in self._linears)

    def _join(self) -> _Joined:
        joined = prepare_weight([linear.packed_weight() for linear in self._linears])
        outliers = None
        if self._site.outliers:
            outliers = prepare_weight([linear.packed_outliers() for linear in self._linears])
        # The linears' words become parts of the joined ones: there is one copy, in whatever order the backend reads.
        first = 0
        for linear in self._linears:
            linear.adopt(joined, outliers, first)
            first += linear.out_features
        biases = [linear.bias for linear in self._linears]
        bias = None
        if any(each is not None for each in biases):
            pairs = zip(biases, joined.splits, strict=True)
            device = joined.data.device
            bias = torch.cat(
                [torch.zeros(n, device=device, dtype=torch.float32) if b is None else b.float() for b, n in pairs]
            )
        return _Joined(joined, outliers, bias)

    def forget(self) -> None:
        """Let go of what the kernels made of the parameters: they changed."""
        self._prepared = None

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in a copy.
        return {**self.__dict__, "_prepared": None}


class SiteModule(nn.Module):
    """Online part of one site: R1, P, R2, and rounding. Experts share it, and have readers of their own."""

    def __init__(self, width: int, recipe: Recipe, *, site: str, experts: int = 1) -> None:
        super().__init__()
        self._config = recipe.activation
        self.width = width
        self.outliers = recipe.outlier_channels
        self.act_clip_ratio = _frozen((2,), torch.float32)
        transform = recipe.transform.online_at(site)
        self.R1: nn.Parameter | None = None
        self.perm: nn.Parameter | None = None
        self.R2: nn.Parameter | None = None
        if transform.rotation != "none":
            n1, n2 = rotation_sides(width, transform)
            is_shared = transform.shared_rotation
            dtype = getattr(torch, transform.rotation_dtype)
            self.R1 = _frozen((n1, n1) if is_shared else (width // n1, n1, n1), dtype)
            if transform.permutation != "none":
                self.perm = _frozen((width,), torch.int16 if width <= 2**15 else torch.int32)
                self.R2 = _frozen((n2, n2) if is_shared else (width // n2, n2, n2), dtype)
        elif self.outliers:
            self.perm = _frozen((width,), torch.int16 if width <= 2**15 else torch.int32)
        # No modules, so that the linears are not registered as this module's submodules, too.
        self.readers = [SiteReaders(self) for _ in range(experts)]
        self._prepared: Prepared[PreparedTransform] | None = None
        self._prepared_outliers: PreparedTransform | None = None

    def enter(self, rows: Float[Tensor, "rows channels"]) -> QuantizedActivation | Tensor:
        """Return rounded codes of the transformed rows, or the transformed rows in float32 for 16-bit activations."""
        if self._config.bits == 16:
            return self._transform().apply(rows.float())
        return transform_quantize_pack(rows, self.prepared())

    def prepared(self) -> PreparedTransform:
        """Return the transform that the kernels run: made when first asked for, and again when it was replaced."""
        ready = self._prepared
        if ready is None or not ready.is_of(self._parameters_read()):
            # With outliers, `in_parts` has done the transform.
            transform = SiteTransform() if self.outliers else self._transform()
            self.use(prepare_transform(transform, self._config, self.act_clip_ratio))
        assert self._prepared is not None
        return self._prepared.result

    def prepared_outliers(self) -> PreparedTransform:
        """Return the rounding of the outlier channels, which nothing clips."""
        if self._prepared_outliers is None:
            unclipped = torch.ones_like(self.act_clip_ratio)
            self._prepared_outliers = prepare_transform(SiteTransform(), OUTLIER_ACTIVATIONS, unclipped)
        return self._prepared_outliers

    def in_parts(self, rows: Float[Tensor, "rows channels"]) -> tuple[Tensor, Tensor]:
        """Return the transformed rows' channels: all but the outliers, and the outliers."""
        transformed = self._transform().apply(rows)
        return transformed[:, : -self.outliers].contiguous(), transformed[:, -self.outliers :].contiguous()

    def use(self, transform: PreparedTransform) -> None:
        """Run this transform until the parameters are replaced: benchmarks time several on the same weights."""
        self._prepared = Prepared(transform, self._parameters_read())

    def _parameters_read(self) -> tuple[nn.Parameter | None, ...]:
        return tuple(self._parameters.get(name) for name in ("act_clip_ratio", "R1", "perm", "R2"))

    def _transform(self) -> SiteTransform:
        perm = None if self.perm is None else self.perm.long()
        return SiteTransform(R1=self.R1, perm=perm, R2=self.R2)

    def forget(self) -> None:
        """Let go of what the kernels made of the parameters: they changed."""
        self._prepared = self._prepared_outliers = None
        for readers in self.readers:
            readers.forget()

    def _apply(self, fn: Any, recurse: bool = True) -> "SiteModule":
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # Addresses mean nothing in a copy.
        return {**self.__dict__, "_prepared": None, "_prepared_outliers": None}


def _dequantized(W: PackedWeight) -> Float[Tensor, "out_features in_features"]:
    codes = unpack(W.packed, W.in_features, bits=W.bits)
    grouped = codes.view(codes.shape[0], W.scale.shape[1], -1).float()
    return ((grouped - W.zero_point[..., None]) * W.scale[..., None]).view(codes.shape)


class DuQuantLinear(nn.Module):
    """A linear whose weight stays packed. Parameters are those of compressed-tensors' pack-quantized format."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, recipe: Recipe, readers: SiteReaders
    ) -> None:
        super().__init__()
        weight = recipe.weight
        per_word = 32 // weight.bits
        most = in_features - recipe.outlier_channels
        groups = most // resolve_group_size(most, weight.group_size)
        self.in_features, self.out_features, self.bits = in_features, out_features, weight.bits
        self.outliers = recipe.outlier_channels
        self.weight_packed = _frozen((out_features, -(-most // per_word)), torch.int32)
        self.weight_scale = _frozen((out_features, groups), torch.float32)
        self.weight_zero_point = _frozen((-(-out_features // per_word), groups), torch.int32)
        self.weight_shape = _frozen((2,), torch.int64)
        if self.outliers:
            self.outlier_packed = _frozen((out_features, -(-self.outliers * OUTLIER_WEIGHTS.bits // 32)), torch.int32)
            self.outlier_scale = _frozen((out_features, 1), torch.float32)
        self.bias = _frozen((out_features,), torch.bfloat16) if bias else None
        self._rounds_activations = recipe.activation.bits < 16
        self._readers = readers
        self._index = readers.attach(self)

    def forward(self, X: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """Return X W.T + bias in the dtype of `X`."""
        if self._rounds_activations:
            Y = self._readers.output(X, self._index)
        else:
            transformed = self._readers.codes(X)
            assert isinstance(transformed, Tensor)
            Y = fake_linear(transformed, self.packed_weight())
            Y = (Y if self.bias is None else Y + self.bias.float()).to(X.dtype)
        return Y.view(*X.shape[:-1], self.out_features)

    def packed_weight(self) -> PackedWeight:
        """Return the weight as the artifact has it, zero points unpacked; without the outlier channels."""
        # (groups, words) along the rows -> (out_features, groups)
        zero_point = unpack(self.weight_zero_point.T.contiguous(), self.out_features, bits=self.bits).T.float()
        most = self.in_features - self.outliers
        return PackedWeight(self.weight_packed, self.weight_scale, zero_point, most, self.bits)

    def packed_outliers(self) -> PackedWeight:
        """Return the outlier channels' weights as the artifact has them; their grids are symmetric."""
        zero_point = torch.zeros_like(self.outlier_scale)
        return PackedWeight(self.outlier_packed, self.outlier_scale, zero_point, self.outliers, OUTLIER_WEIGHTS.bits)

    def adopt(self, joined: LinearWeight, outliers: LinearWeight | None, first: int) -> None:
        """Let this linear's words be rows of joined ones, so that they are in memory once."""
        rows = slice(first, first + self.out_features)
        if outliers is not None:
            self.outlier_packed.data = outliers.data[rows]
            self.outlier_scale.data = outliers.scale[rows]
        self.weight_packed.data = joined.data[rows]
        self.weight_scale.data = joined.scale[rows]

    def dequantized_weight(self) -> Float[Tensor, "out_features in_features"]:
        """Return the float32 weight, in the transformed basis, that the packed codes stand for."""
        values = _dequantized(self.packed_weight())
        return torch.cat((values, _dequantized(self.packed_outliers())), dim=1) if self.outliers else values

    def _apply(self, fn: Any, recurse: bool = True) -> "DuQuantLinear":
        self._readers.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._readers.forget()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"
