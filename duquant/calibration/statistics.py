"""What is kept of the activations at a site: the largest magnitude per channel, and a sample of whole rows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duquant.errors import CalibrationError, ScratchError
from duquant.models.architecture import Site
from duquant.models.tensor_files import save_tensors


@dataclass(frozen=True)
class SiteStatistics:
    """Statistics of one site's inputs X over the calibration tokens, in the unquantized model."""

    absmax: Float[Tensor, " channels"]
    """max|X| over all tokens, float32."""
    rows: Float[Tensor, "sample channels"]
    """Evenly spaced tokens with the first of every window (where massive activations sit), in the compute dtype."""


class StatisticsRecorder:
    """Collects SiteStatistics of one layer over micro-batches, through hooks on the sites' first linears."""

    def __init__(self, sites: Sequence[Site], *, row_stride: int) -> None:
        self._sites = sites
        self._stride = row_stride
        self._absmax: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    @contextmanager
    def attached(self, layer: nn.Module) -> Iterator[None]:
        """Record every forward pass of `layer` inside the `with` block."""
        handles = []
        try:
            for site in self._sites:
                linear = layer.get_submodule(site.linears[0])
                handles.append(linear.register_forward_pre_hook(self._hook(site.name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: str):  # type: ignore[no-untyped-def]  # torch's hook type is private
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.add(site, inputs[0])

        return record

    def add(self, site: str, X: Float[Tensor, "batch seq channels"]) -> None:
        """Add one micro-batch of a site's inputs."""
        # Not aminmax: over the first axis it is five times slower than this.
        absmax = X.reshape(-1, X.shape[-1]).abs().amax(0).float()
        known = self._absmax.get(site)
        self._absmax[site] = absmax if known is None else torch.maximum(known, absmax)
        for window in X:
            picked = torch.arange(0, window.shape[0], self._stride, device=X.device)
            self._rows[site].append(window[picked].clone())

    def finish(self) -> dict[str, SiteStatistics]:
        """Return the statistics.

        Raises:
            CalibrationError: activations are NaN or Inf at a site, or nothing was recorded.
        """
        result: dict[str, SiteStatistics] = {}
        for site in self._sites:
            if site.name not in self._absmax:
                raise CalibrationError(f"no activations reached site {site.name}")
            absmax = self._absmax[site.name]
            if not bool(torch.isfinite(absmax).all()):
                raise CalibrationError(f"activations at site {site.name} are NaN or Inf", site=site.name)
            result[site.name] = SiteStatistics(absmax=absmax, rows=torch.cat(self._rows[site.name]))
        return result


@dataclass(frozen=True)
class _Parts:
    absmax: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)


def merge(parts: Sequence[Mapping[str, SiteStatistics]]) -> dict[str, SiteStatistics]:
    """Join the statistics of all shards of one layer, in shard order."""
    collected: dict[str, _Parts] = {}
    for part in parts:
        for name, statistics in part.items():
            entry = collected.setdefault(name, _Parts())
            entry.absmax.append(statistics.absmax)
            entry.rows.append(statistics.rows)
    return {
        name: SiteStatistics(absmax=torch.stack(entry.absmax).amax(0), rows=torch.cat(entry.rows))
        for name, entry in collected.items()
    }


def save_statistics(path: Path, statistics: Mapping[str, SiteStatistics]) -> None:
    """Write one shard's statistics; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for name, entry in statistics.items():
        tensors[f"{name}.absmax"] = entry.absmax
        tensors[f"{name}.rows"] = entry.rows
    save_tensors(path, tensors)


def load_statistics(path: Path, device: torch.device) -> dict[str, SiteStatistics]:
    """Read what `save_statistics` wrote.

    Raises:
        ScratchError: the file is missing or broken; it is deleted, so that the next try sweeps its layer again.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as reader:
            names = sorted({key.rsplit(".", 1)[0] for key in reader.keys()})  # noqa: SIM118  # not a dict
            return {
                name: SiteStatistics(absmax=reader.get_tensor(f"{name}.absmax"), rows=reader.get_tensor(f"{name}.rows"))
                for name in names
            }
    except (OSError, SafetensorError) as err:
        path.unlink(missing_ok=True)
        raise ScratchError(f"cannot read calibration statistics {path}: {err}") from err
