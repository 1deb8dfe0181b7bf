"""The unquantized forward sweep, one (layer, shard of windows) at a time, through files.

Boundary `i` of a shard holds the inputs of layer i for its windows: raw bfloat16, (windows, seq_len, hidden). A step
reads boundary i, records the sites' statistics of layer i, and writes boundary i + 1. Shards never meet, so they run in
parallel on any number of workers; a file that exists is complete (it is renamed into place), so a step whose outputs
exist is not done again after a crash.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duquant.calibration.statistics import StatisticsRecorder, save_statistics
from duquant.config import CalibrationConfig, Recipe
from duquant.errors import CalibrationError, ScratchError, SourceError
from duquant.models.skeleton import COMPUTE_DTYPE, Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.models.tensor_files import save_tensors


@dataclass(frozen=True)
class WorkDir:
    """The files of one calibration run."""

    root: Path

    @property
    def tokens(self) -> Path:
        """The token windows, int64, (samples, seq_len)."""
        return self.root / "tokens.bin"

    def boundary(self, layer: int, shard: int) -> Path:
        """Inputs of `layer` for one shard."""
        return self.root / f"boundary-{layer:04d}-{shard:04d}.bin"

    def statistics(self, layer: int, shard: int) -> Path:
        """Statistics of `layer` over one shard."""
        return self.root / f"statistics-{layer:04d}-{shard:04d}.safetensors"

    def inputs(self, layer: int, shard: int) -> Path:
        """Inputs of `layer` over one shard that are kept to learn on."""
        return self.root / f"inputs-{layer:04d}-{shard:04d}.safetensors"

    def found(self, kind: Literal["boundary", "statistics"]) -> frozenset[tuple[int, int]]:
        """Return the (layer, shard) pairs of the complete files of a kind."""
        names = (path.name.split(".")[0].split("-") for path in self.root.glob(f"{kind}-*"))
        return frozenset((int(layer), int(shard)) for _, layer, shard in names)


def shard_windows(config: CalibrationConfig) -> list[range]:
    """Return the windows of each shard; the first ones get one more when the division has a remainder.

    >>> shard_windows(CalibrationConfig(samples=5, shards=2))
    [range(0, 3), range(3, 5)]
    """
    shards = min(config.shards, config.samples)
    base, extra = divmod(config.samples, shards)
    edges = [index * base + min(index, extra) for index in range(shards + 1)]
    return [range(first, last) for first, last in pairwise(edges)]


def learning_windows(recipe: Recipe, shard: int) -> list[int]:
    """Return which windows of a shard are kept to learn on, evenly spread over all of them.

    >>> from duquant.config import CalibrationConfig, LearningConfig
    >>> recipe = Recipe(calibration=CalibrationConfig(samples=6, shards=2), learning=LearningConfig(samples=3))
    >>> learning_windows(recipe, 0), learning_windows(recipe, 1)
    ([1], [0, 2])
    """
    calibration = recipe.calibration
    kept = min(recipe.learning.samples, calibration.samples)
    windows = shard_windows(calibration)[shard]
    return [
        w - windows.start for w in windows if w * kept // calibration.samples < (w + 1) * kept // calibration.samples
    ]


def write_tokens(work: WorkDir, windows: Int64[Tensor, "samples seq_len"]) -> None:
    """Store the token windows."""
    work.root.mkdir(parents=True, exist_ok=True)
    staged = work.root / f".{work.tokens.name}.{uuid.uuid4().hex}.part"
    try:
        # Not tofile: on a full disk its error has neither a number nor a name.
        staged.write_bytes(windows.numpy().tobytes())
        staged.rename(work.tokens)
    finally:
        staged.unlink(missing_ok=True)


def embed_shard(source: SourceCheckpoint, skeleton: Skeleton, recipe: Recipe, work: WorkDir, shard: int) -> None:
    """Write boundary 0 of a shard: the embeddings of its windows.

    Raises:
        SourceError: the embeddings are missing, not finite, or too few for the tokens.
    """
    target = work.boundary(0, shard)
    if target.exists():
        return
    windows = shard_windows(recipe.calibration)[shard]
    seq_len = recipe.calibration.seq_len
    flat = np.fromfile(work.tokens, dtype=np.int64, count=len(windows) * seq_len, offset=windows.start * seq_len * 8)
    tokens = torch.from_numpy(flat).view(len(windows), seq_len)
    name = source.architecture.embeddings
    table = source.tensors([name])[name]
    if int(tokens.max()) >= table.shape[0]:
        raise SourceError(f"token {int(tokens.max())} is outside {name} with {table.shape[0]} rows; wrong tokenizer?")
    with _Writer(target) as out:
        for first in range(0, len(windows), recipe.calibration.micro_batch):
            batch = tokens[first : first + recipe.calibration.micro_batch]
            out.write(skeleton.embed(batch, table))


@torch.no_grad()
def sweep_layer(
    source: SourceCheckpoint, skeleton: Skeleton, recipe: Recipe, work: WorkDir, layer: int, shard: int
) -> None:
    """Run one layer over one shard: boundary `layer` in; statistics and boundary `layer + 1` out.

    The last layer's outputs are not needed and not written.

    Raises:
        SourceError: the layer's tensors are unusable.
        CalibrationError: activations are NaN or Inf.
    """
    last = layer == source.layers - 1
    target = work.boundary(layer + 1, shard)
    if work.statistics(layer, shard).exists() and (last or target.exists()):
        return
    calibration = recipe.calibration
    sites = source.architecture.kept_sites(recipe.skip_linears, layer)
    tokens = calibration.samples * calibration.seq_len
    recorder = StatisticsRecorder(
        sites,
        row_stride=max(1, tokens // calibration.search_tokens),
        moment_stride=max(1, tokens // calibration.moment_tokens) if recipe.needs_second_moments else None,
        mean_squares=recipe.transform.smooth_statistic == "rms",
    )
    with (
        _Writer(target) as out,
        skeleton.layer(layer, skeleton.load(source, layer)) as module,
        recorder.attached(module),
    ):
        kept: list[Tensor] = []
        wanted = set(learning_windows(recipe, shard)) if recipe.learns else set()
        first = 0
        for X in _read_micro_batches(work.boundary(layer, shard), calibration, int(source.config["hidden_size"])):
            kept += [X[i, : recipe.learning.seq_len].clone() for i in range(len(X)) if first + i in wanted]
            first += len(X)
            Y = skeleton.forward(module, X.to(skeleton.device))
            if not last:
                out.write(Y)
            del X, Y  # or they would still be there during the next micro-batch
        try:
            statistics = recorder.finish()
        except CalibrationError as err:
            raise CalibrationError(f"layer {layer}: {err}", layer=layer, **err.facts) from err
        # Before the boundary is renamed into place: a step counts as done when both files are there.
        if recipe.learns:
            save_tensors(work.inputs(layer, shard), {"inputs": torch.stack(kept)} if kept else {})
        save_statistics(work.statistics(layer, shard), statistics)
        out.keep = not last


def load_inputs(work: WorkDir, layer: int, shards: int, device: torch.device) -> Float[Tensor, "samples seq hidden"]:
    """Return the inputs of a layer that the sweep kept to learn on, in shard order.

    Raises:
        ScratchError: a file is missing or broken; its shard's statistics are deleted: the next try sweeps again.
    """
    kept = []
    for shard in range(shards):
        path = work.inputs(layer, shard)
        try:
            with safe_open(path, framework="pt", device=str(device)) as reader:
                kept += [reader.get_tensor(name) for name in reader.keys()]  # noqa: SIM118  # it is no mapping
        except (OSError, SafetensorError) as err:
            path.unlink(missing_ok=True)
            work.statistics(layer, shard).unlink(missing_ok=True)
            raise ScratchError(f"cannot read the inputs that were kept to learn on, {path}: {err}") from err
    return torch.cat(kept)


def _read_micro_batches(
    path: Path, calibration: CalibrationConfig, hidden: int
) -> Iterator[Float[Tensor, "batch seq hidden"]]:
    """Yield micro-batches by plain reads: a memory map would count the whole file towards the process's memory."""
    window_bytes = calibration.seq_len * hidden * 2
    with path.open("rb", buffering=0) as file:
        left = path.stat().st_size
        while left:
            raw = bytearray(min(left, window_bytes * calibration.micro_batch))
            if (count := file.readinto(raw)) != len(raw):
                raise ScratchError(f"{path} ends {len(raw) - count} bytes too soon; it changed while it was read")
            left -= count
            batch = torch.frombuffer(raw, dtype=COMPUTE_DTYPE).view(-1, calibration.seq_len, hidden)
            del raw
            yield batch
            del batch


class _Writer:
    """Appends tensors to a scratch file that is renamed to `target` at a clean end with `keep` set."""

    def __init__(self, target: Path) -> None:
        self._target = target
        # A name of its own: a worker that was given up may still be writing its copy.
        self._staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        self.keep = True

    def __enter__(self) -> "_Writer":
        self._file = self._staged.open("wb")
        return self

    def write(self, tensor: Tensor) -> None:
        self._file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is None and self.keep:
            self._staged.rename(self._target)
        else:
            self._staged.unlink(missing_ok=True)
