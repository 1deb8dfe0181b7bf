"""What is kept of a site's activations: the largest magnitude per channel, a sample of rows, and second moments."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duquant.calibration.keys import KeyStatistics
from duquant.errors import CalibrationError, ScratchError
from duquant.models.architecture import Site
from duquant.models.magnitudes import SHORT_FORMATS, magnitude_bits
from duquant.models.tensor_files import save_tensors

_CACHED = 1 << 17
_KEYS = "keys."
"""What the names of the statistics of keys begin with in a file; no site is called that."""


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site's inputs X over the calibration tokens, in the unquantized layer."""

    absmax: Float[Tensor, " channels"]
    """max|X| over all tokens, float32."""
    rows: Float[Tensor, "sample channels"]
    """Evenly spaced tokens with the first of every window (where massive activations sit), in the compute dtype."""
    mean_square: Float[Tensor, " channels"] | None = None
    """Mean of X^2 over all tokens, float32; only kept for recipes that use it."""
    second_moment: Float[Tensor, "channels channels"] | None = None
    """X^T X over evenly spaced tokens, float32; only kept for recipes that use it."""
    reached: Int64[Tensor, " experts"] | None = None
    """How many tokens each expert was sent; only for sites with experts."""

    @property
    def unseen_experts(self) -> int:
        """Return how many experts no token was sent to."""
        return 0 if self.reached is None else int((self.reached == 0).sum())


class StatisticsRecorder:
    """Collects SiteStatistics of one layer over micro-batches, through hooks on what the sites enter.

    Args:
        sites: what to record.
        row_stride: every so many tokens of a window one row is kept.
        moment_stride: every so many tokens of a window one counts towards the second moment; None keeps none.
        mean_squares: keep them.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        *,
        row_stride: int,
        moment_stride: int | None = None,
        mean_squares: bool = False,
    ) -> None:
        self._sites = sites
        self._stride = row_stride
        self._moment_stride = moment_stride
        self._mean_squares = mean_squares
        self._moments: dict[str, Tensor] = {}
        self._square_sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = dict.fromkeys((site.name for site in sites), 0)
        self._absmax: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        self._reached: dict[str, Tensor] = {
            site.name: torch.zeros(site.experts, dtype=torch.int64) for site in sites if site.experts > 1
        }

    @contextmanager
    def attached(self, layer: nn.Module) -> Iterator[None]:
        """Record every forward pass of `layer` inside the `with` block."""
        handles = []
        try:
            for site in self._sites:
                module = layer.get_submodule(site.probed)
                handles.append(module.register_forward_pre_hook(self._hook(site.name)))
                for expert, group in enumerate(site.groups if site.name in self._reached else ()):
                    linear = layer.get_submodule(group[0])
                    handles.append(linear.register_forward_pre_hook(self._counter(site.name, expert)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: str):  # type: ignore[no-untyped-def]  # torch's hook type is private
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.add(site, inputs[0])

        return record

    def _counter(self, site: str, expert: int):  # type: ignore[no-untyped-def]  # torch's hook type is private
        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._reached[site][expert] += inputs[0].shape[0]

        return count

    def add(self, site: str, X: Float[Tensor, "batch seq channels"]) -> None:
        """Add one micro-batch of a site's inputs."""
        rows = X.reshape(-1, X.shape[-1])
        for block in torch.split(rows, _block_rows(rows)):
            absmax = _absmax_of(block)
            known = self._absmax.get(site)
            self._absmax[site] = absmax if known is None else torch.maximum(known, absmax)
            if self._mean_squares:
                # Not vector_norm, for the same reason, only worse.
                squares = block.float().square_().sum(0)
                known = self._square_sums.get(site)
                self._square_sums[site] = squares if known is None else known.add_(squares)
        self._tokens[site] += rows.shape[0]
        for window in X:
            picked = torch.arange(0, window.shape[0], self._stride, device=X.device)
            self._rows[site].append(window[picked].clone())
            if self._moment_stride is not None:
                known = self._moments.get(site)
                moment = gram(window[:: self._moment_stride])
                self._moments[site] = moment if known is None else known.add_(moment)

    def finish(self) -> dict[str, SiteStatistics]:
        """Return the statistics.

        Raises:
            CalibrationError: activations are NaN or Inf at a site, or their squares are, or nothing was recorded.
        """
        result: dict[str, SiteStatistics] = {}
        for site in self._sites:
            if site.name not in self._absmax:
                raise CalibrationError(f"no activations reached site {site.name}")
            absmax = self._absmax[site.name]
            if not bool(torch.isfinite(absmax).all()):
                raise CalibrationError(f"activations at site {site.name} are NaN or Inf", site=site.name)
            squares, moment = self._square_sums.get(site.name), self._moments.get(site.name)
            for sums in (squares, moment):
                _check_range(sums, site.name, absmax)
            result[site.name] = SiteStatistics(
                absmax=absmax,
                rows=torch.cat(self._rows[site.name]),
                mean_square=None if squares is None else squares / self._tokens[site.name],
                second_moment=moment,
                reached=self._reached.get(site.name),
            )
        return result


def _check_range(sums: Tensor | None, site: str, absmax: Tensor) -> None:
    """Refuse sums of squares that overflow: by themselves the activations are finite."""
    if sums is not None and not bool(torch.isfinite(torch.stack(torch.aminmax(sums))).all()):
        raise CalibrationError(
            f"activations at site {site} are of up to {float(absmax.max()):.1e}, and the sums of their squares are Inf "
            "in float32; check the weights that make them",
            site=site,
        )


def _absmax_of(X: Float[Tensor, "tokens channels"]) -> Float[Tensor, " channels"]:
    """Return max|X| over the tokens, float32; NaN where one is."""
    if X.dtype in SHORT_FORMATS:
        return magnitude_bits(X).amax(0).view(X.dtype).float()
    # Not aminmax: over the first axis it is five times slower than this.
    return X.abs().amax(0).float()


def _block_rows(rows: Float[Tensor, "tokens channels"]) -> int:
    """Return how many rows are looked at together: on a CPU so many that a float32 copy of them stays in its cache."""
    return max(1, _CACHED // rows.shape[1]) if rows.device.type == "cpu" else rows.shape[0]


def gram(X: Float[Tensor, "tokens channels"]) -> Float[Tensor, "channels channels"]:
    """Return X^T X in float32."""
    X = X.float()
    if X.device.type != "cpu":
        return X.T @ X
    # X holds bfloat16 values, so bfloat16 products summed in float32 are exact, and several times faster.
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made when torch is imported
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return X.T @ X
    finally:
        matmul.fp32_precision = before


def merge(
    parts: Sequence[Mapping[str, SiteStatistics]], weights: Sequence[int] | None = None
) -> dict[str, SiteStatistics]:
    """Join the statistics of all shards of one layer, in shard order.

    Args:
        parts: of each shard.
        weights: windows of each shard, for the means; None takes them as equal.
    """
    weights = weights or [1] * len(parts)
    merged: dict[str, SiteStatistics] = {}
    for name in parts[0]:
        entries = [part[name] for part in parts]
        moments = [entry.second_moment for entry in entries if entry.second_moment is not None]
        counts = [entry.reached for entry in entries if entry.reached is not None]
        total = None
        for moment in moments:  # one after the other: a stack would hold them all twice
            total = moment if total is None else total + moment
        means = [
            entry.mean_square * (weight / sum(weights))
            for entry, weight in zip(entries, weights, strict=True)
            if entry.mean_square is not None
        ]
        merged[name] = SiteStatistics(
            absmax=torch.stack([entry.absmax for entry in entries]).amax(0),
            rows=torch.cat([entry.rows for entry in entries]),
            mean_square=torch.stack(means).sum(0) if means else None,
            second_moment=total,
            reached=torch.stack(counts).sum(0) if counts else None,
        )
    return merged


def save_statistics(path: Path, statistics: Mapping[str, SiteStatistics], keys: KeyStatistics | None = None) -> None:
    """Write one shard's statistics, by site and of the keys; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    if keys is not None:
        tensors.update({f"{_KEYS}{name}": tensor for name, tensor in keys.tensors().items()})
    for name, entry in statistics.items():
        tensors[f"{name}.absmax"] = entry.absmax
        tensors[f"{name}.rows"] = entry.rows
        if entry.mean_square is not None:
            tensors[f"{name}.mean_square"] = entry.mean_square
        if entry.second_moment is not None:
            tensors[f"{name}.second_moment"] = entry.second_moment
        if entry.reached is not None:
            tensors[f"{name}.reached"] = entry.reached
    save_tensors(path, tensors)


def load_statistics(path: Path, device: torch.device) -> dict[str, SiteStatistics]:
    """Read what `save_statistics` wrote, by site.

    Raises:
        ScratchError: the file is missing or broken; it is deleted, so that the next try sweeps its layer again.
    """
    with _reading(path, device) as reader:
        names = frozenset(reader.keys())

        def optional(name: str) -> Tensor | None:
            return reader.get_tensor(name) if name in names else None

        return {
            site: SiteStatistics(
                absmax=reader.get_tensor(f"{site}.absmax"),
                rows=reader.get_tensor(f"{site}.rows"),
                mean_square=optional(f"{site}.mean_square"),
                second_moment=optional(f"{site}.second_moment"),
                reached=optional(f"{site}.reached"),
            )
            for site in sorted({name.rpartition(".")[0] for name in names if not name.startswith(_KEYS)})
        }


def load_key_statistics(path: Path, device: torch.device) -> KeyStatistics:
    """Read the statistics of keys that `save_statistics` wrote.

    Raises:
        ScratchError: as `load_statistics`; or the file has none.
    """
    with _reading(path, device) as reader:
        return KeyStatistics(**{field.name: reader.get_tensor(_KEYS + field.name) for field in fields(KeyStatistics)})


@contextmanager
def _reading(path: Path, device: torch.device) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=str(device)) as reader:
            yield reader
    except (OSError, SafetensorError) as err:
        path.unlink(missing_ok=True)
        raise ScratchError(f"cannot read calibration statistics {path}: {err}") from err
