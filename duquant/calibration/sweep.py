"""Forward passes of unquantized layers, one (layer, shard of windows) at a time, through files.

Boundary `i` of a shard holds the inputs of layer i for its windows. A sweep reads boundary i of the unquantized model,
records the sites' statistics where layer i is calibrated on it, and writes boundary i + 1. An observation reads what
quantized layers made of the text, and records statistics alone. Shards never meet, so they run in parallel on any
number of workers; a file that exists is complete (it is renamed into place), so a step whose outputs exist is not done
again after a crash.
"""

import uuid
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duquant.calibration.boundaries import BoundaryWriter, read_micro_batches
from duquant.calibration.keys import KeyRecorder
from duquant.calibration.statistics import StatisticsRecorder, save_statistics
from duquant.config import CalibrationConfig, Recipe, even_ranges
from duquant.errors import CalibrationError, ScratchError, SourceError
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.models.tensor_files import save_tensors

_KEY_TOKENS = 4096
"""How many tokens the statistics of keys are of: all of a text's would cost a third of a sweep."""


@dataclass(frozen=True)
class WorkDir:
    """The files of one calibration run."""

    root: Path
    pass_index: int = 0
    """Whose boundaries, statistics and layers these are."""

    def of_pass(self, index: int) -> "WorkDir":
        """Return the files of a pass."""
        return WorkDir(self.root, index)

    @property
    def folder(self) -> Path:
        """Where the files of the pass are."""
        return self.root / f"pass-{self.pass_index}" if self.pass_index else self.root

    @property
    def tokens(self) -> Path:
        """The token windows, int64, (samples, seq_len)."""
        return self.root / "tokens.bin"

    @property
    def rotations(self) -> Path:
        """The rotations of the residual stream, for recipes that have them."""
        return self.root / "rotations.safetensors"

    @property
    def distilled(self) -> Path:
        """The folder of the layers that learned together, and of a report; it appears whole."""
        return self.root / "distilled"

    def boundary(self, layer: int, shard: int) -> Path:
        """Inputs of `layer` in the unquantized model for one shard."""
        return self.folder / f"boundary-{layer:04d}-{shard:04d}.bin"

    def chain(self, layer: int, shard: int) -> Path:
        """Inputs of `layer` behind quantized layers for one shard."""
        return self.folder / f"chain-{layer:04d}-{shard:04d}.bin"

    def statistics(self, layer: int, shard: int) -> Path:
        """Statistics of `layer` over one shard."""
        return self.folder / f"statistics-{layer:04d}-{shard:04d}.safetensors"

    def inputs(self, layer: int, shard: int) -> Path:
        """Inputs of `layer` over one shard that are kept to learn on."""
        return self.folder / f"inputs-{layer:04d}-{shard:04d}.safetensors"

    def packed(self, layer: int) -> Path:
        """The quantized `layer`, while text has to be run through it."""
        return self.folder / f"packed-{layer:04d}.safetensors"

    def found(self, kind: Literal["boundary", "chain", "statistics"]) -> frozenset[tuple[int, int]]:
        """Return the (layer, shard) pairs of the complete files of a kind."""
        return frozenset((int(layer), int(shard)) for layer, shard in self._numbers(kind))

    def found_packed(self) -> frozenset[int]:
        """Return the quantized layers that are there."""
        return frozenset(int(layer) for (layer,) in self._numbers("packed"))

    def _numbers(self, kind: str) -> Iterator[list[str]]:
        for path in self.folder.glob(f"{kind}-*"):
            if path.suffix in (".bin", ".safetensors"):
                yield path.stem.split("-")[1:]


def shard_windows(config: CalibrationConfig) -> list[range]:
    """Return the windows of each shard; the first ones get one more when the division has a remainder.

    >>> shard_windows(CalibrationConfig(samples=5, shards=2))
    [range(0, 3), range(3, 5)]
    """
    return even_ranges(config.samples, config.shards)


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


def read_tokens(work: WorkDir, windows: range, seq_len: int) -> Int64[Tensor, "windows seq_len"]:
    """Return some of the token windows, which are of `seq_len` tokens."""
    flat = np.fromfile(work.tokens, dtype=np.int64, count=len(windows) * seq_len, offset=windows.start * seq_len * 8)
    return torch.from_numpy(flat).view(len(windows), seq_len)


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
    tokens = read_tokens(work, windows, seq_len)
    table = source.embedding_table()
    if int(tokens.max()) >= table.shape[0]:
        raise SourceError(
            f"token {int(tokens.max())} is outside {source.architecture.embeddings} with {table.shape[0]} rows; "
            "wrong tokenizer?"
        )
    with BoundaryWriter(target) as out:
        for first in range(0, len(windows), recipe.calibration.micro_batch):
            batch = tokens[first : first + recipe.calibration.micro_batch]
            out.write(skeleton.embed(batch, table))


def sweep_layer(
    source: SourceCheckpoint, skeleton: Skeleton, recipe: Recipe, work: WorkDir, layer: int, shard: int
) -> None:
    """Run one layer over one shard: boundary `layer` in; statistics and boundary `layer + 1` out.

    Statistics are recorded where a stage starts. Boundaries are written as long as another stage starts behind them.

    Raises:
        SourceError: the layer's tensors are unusable.
        CalibrationError: activations are NaN or Inf.
    """
    starts = [stage.start for stage in recipe.stages(source.layers, work.pass_index)]
    target = work.boundary(layer + 1, shard) if layer < starts[-1] else None
    records = layer in starts
    is_recorded = not records or work.statistics(layer, shard).exists()
    if is_recorded and (target is None or target.exists()):
        return
    given = work.boundary(layer, shard)
    _run_layer(source, skeleton, recipe, work, layer, shard, given=given, target=target, records=records)


def observe_layer(
    source: SourceCheckpoint, skeleton: Skeleton, recipe: Recipe, work: WorkDir, layer: int, shard: int
) -> None:
    """Run one layer over what quantized layers gave for one shard: chain `layer` in, statistics out.

    Raises:
        SourceError: the layer's tensors are unusable.
        CalibrationError: activations are NaN or Inf.
    """
    if not work.statistics(layer, shard).exists():
        given = work.chain(layer, shard)
        _run_layer(source, skeleton, recipe, work, layer, shard, given=given, target=None, records=True)


@torch.no_grad()
def _run_layer(
    source: SourceCheckpoint,
    skeleton: Skeleton,
    recipe: Recipe,
    work: WorkDir,
    layer: int,
    shard: int,
    *,
    given: Path,
    target: Path | None,
    records: bool,
) -> None:
    """Run one unquantized layer over the windows of `given`; write its outputs to `target`, its statistics, or both."""
    recorder = _recorder(source, recipe, layer)
    keys = KeyRecorder(first_token=recipe.first_smoothed_key, stride=_stride(recipe.calibration, _KEY_TOKENS))
    records_keys = records and recipe.kv_cache.smooth_keys
    keeps = records and recipe.learns_by_layer
    wanted = set(learning_windows(recipe, shard)) if keeps else set()
    with (
        BoundaryWriter(target) if target else nullcontext() as out,
        skeleton.layer(layer, skeleton.load(source, layer)) as module,
        recorder.attached(module) if records else nullcontext(),
        keys.attached(module) if records_keys else nullcontext(),
    ):
        kept: list[Tensor] = []
        first = 0
        for X in read_micro_batches(given, recipe.calibration, int(source.config["hidden_size"])):
            kept += [X[i, : recipe.learning.seq_len].clone() for i in range(len(X)) if first + i in wanted]
            first += len(X)
            Y = skeleton.forward(module, X.to(skeleton.device))
            if out is not None:
                out.write(Y)
            del X, Y  # or they would still be there during the next micro-batch
        # Before the boundary is renamed into place: a step counts as done when both files are there.
        if keeps:
            save_tensors(work.inputs(layer, shard), {"inputs": torch.stack(kept)} if kept else {})
        if records:
            try:
                statistics, key_statistics = recorder.finish(), keys.finish() if records_keys else None
            except CalibrationError as err:
                raise CalibrationError(f"layer {layer}: {err}", layer=layer, **err.facts) from err
            save_statistics(work.statistics(layer, shard), statistics, key_statistics)


def _recorder(source: SourceCheckpoint, recipe: Recipe, layer: int) -> StatisticsRecorder:
    """Return what records the statistics that a recipe needs of a layer."""
    calibration = recipe.calibration
    return StatisticsRecorder(
        source.architecture.kept_sites(recipe.skip_linears, layer),
        row_stride=_stride(calibration, calibration.search_tokens),
        moment_stride=_stride(calibration, calibration.moment_tokens) if recipe.needs_second_moments else None,
        mean_squares=recipe.transform.smooth_statistic == "rms",
    )


def _stride(calibration: CalibrationConfig, tokens: int) -> int:
    """Return every which token of a window counts, so that all together they are so many."""
    return max(1, calibration.samples * calibration.seq_len // tokens)


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
