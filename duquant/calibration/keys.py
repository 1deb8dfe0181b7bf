"""What is kept of a layer's attention: means of keys, and of squares of keys and queries, by head and channel."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from duquant.errors import CalibrationError
from duquant.models.attention import observed


@dataclass(frozen=True)
class KeyStatistics:
    """Sums over calibration tokens of a layer's keys and queries, behind the rotary embedding; float64."""

    tokens: Int64[Tensor, ""]
    """How many tokens were counted."""
    key_sum: Float[Tensor, "kv_heads head_dim"]
    key_square_sum: Float[Tensor, "kv_heads head_dim"]
    query_square_sum: Float[Tensor, "kv_heads head_dim"]
    """Over the queries of all heads that attend to a key head."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the means over tokens of keys, of their squares, and of the sums of their queries' squares."""
        return self.key_sum / self.tokens, self.key_square_sum / self.tokens, self.query_square_sum / self.tokens

    @property
    def is_finite(self) -> bool:
        """Whether no sum is NaN or Inf."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.tensors().values())

    @classmethod
    def merge(cls, parts: Sequence["KeyStatistics"]) -> "KeyStatistics":
        """Join the statistics of all shards of one layer, in shard order."""
        together: list[Mapping[str, Tensor]] = [part.tensors() for part in parts]
        return cls(**{name: torch.stack([part[name] for part in together]).sum(0) for name in together[0]})


class KeyRecorder:
    """Collects KeyStatistics of one layer over micro-batches.

    Args:
        first_token: earlier tokens of a window are not counted: their keys are unlike all others.
        stride: of so many tokens from there one counts, drawn anew for every window: at even steps a channel that the
            rotary embedding turns could show the same phase again and again, and at the same places of every window
            one that it turns slowly would show only these phases.
    """

    def __init__(self, *, first_token: int, stride: int) -> None:
        self._first, self._stride = first_token, stride
        self._windows = 0
        self._found: KeyStatistics | None = None

    @contextmanager
    def attached(self, layer: nn.Module) -> Iterator[None]:
        """Record every forward pass of a skeleton's `layer` inside the `with` block."""
        with observed(layer, self.add):
            yield

    def add(
        self,
        queries: Float[Tensor, "batch heads tokens head_dim"],
        keys: Float[Tensor, "batch kv_heads tokens head_dim"],
    ) -> None:
        """Count some windows' tokens."""
        counted = torch.stack([self._draw(keys.shape[2]) for _ in range(keys.shape[0])]).to(keys.device)
        K, Q = (_at(X.detach(), counted).double() for X in (keys, queries))
        by_key_head = Q.square().sum((0, 2)).view(K.shape[1], -1, K.shape[3]).sum(1)
        new = KeyStatistics(
            tokens=torch.tensor(K.shape[0] * K.shape[2], dtype=torch.int64, device=K.device),
            key_sum=K.sum((0, 2)),
            key_square_sum=K.square().sum((0, 2)),
            query_square_sum=by_key_head,
        )
        self._found = new if self._found is None else KeyStatistics.merge([self._found, new])

    def _draw(self, tokens: int) -> Int64[Tensor, " counted"]:
        """Return which tokens of the next window count, in order: one of every `stride`."""
        generator = torch.Generator().manual_seed(self._windows)
        self._windows += 1
        starts = torch.arange(self._first, tokens, self._stride)
        ends = (starts + self._stride).clamp_max(tokens)
        return starts + (torch.rand(len(starts), generator=generator) * (ends - starts)).long()

    def finish(self) -> KeyStatistics:
        """Return the statistics.

        Raises:
            CalibrationError: nothing was recorded, or keys or queries are NaN or Inf.
        """
        if self._found is None or not int(self._found.tokens):
            raise CalibrationError("no keys reached the statistics that the cache smooths them by")
        if not self._found.is_finite:
            raise CalibrationError("keys or queries are NaN or Inf")
        return self._found


def _at(
    X: Float[Tensor, "batch heads tokens head_dim"], places: Int64[Tensor, "batch counted"]
) -> Float[Tensor, "batch heads counted head_dim"]:
    """Return the tokens at each window's own places."""
    return X.gather(2, places[:, None, :, None].expand(-1, X.shape[1], -1, X.shape[3]))
