"""ModelRun: does the steps of one run through files. A plain class: the command line and the workers both use it."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from duquant.artifact.layout import EXTRA_SHARD, layer_shard
from duquant.artifact.manifest import Manifest
from duquant.artifact.shards import ShardInfo, write_shard
from duquant.artifact.writer import write_small_files
from duquant.calibration.statistics import load_statistics, merge
from duquant.calibration.sweep import WorkDir, embed_shard, load_inputs, shard_windows, sweep_layer, write_tokens
from duquant.calibration.text import calibration_windows
from duquant.config import Recipe
from duquant.models.architecture import Site
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.models.tensor_files import hash_tensors
from duquant.pipeline.folds import LayerShape
from duquant.pipeline.layer import quantize_layer
from duquant.pipeline.learning import LayerSamples
from duquant.pipeline.plan import Found, StepId
from duquant.quantizers.weight import resolve_group_size


@dataclass(frozen=True)
class ShardOutcome:
    """A finished shard, in types that travel as JSON."""

    layer: int
    """-1 for the extra shard."""
    shard: ShardInfo
    source_sha256: str
    """Of the tensors that went in."""
    source_bytes: int
    quantized_weights: int
    metrics: dict[str, dict[str, float]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "shard": self.shard.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ShardOutcome":
        """Undo `to_dict`."""
        return cls(**{**values, "shard": ShardInfo.from_dict(values["shard"])})


class ModelRun:
    """The steps of quantizing one model with one recipe. Steps touch only files, so any process can do any of them.

    Raises:
        SourceError, UnsupportedModelError: from the constructor, when the model cannot be used at all.
        ConfigError: likewise, when the recipe's group size divides no site's width.
    """

    def __init__(
        self, model_path: Path, recipe: Recipe, work_dir: Path, *, device: torch.device, text_file: Path | None = None
    ) -> None:
        self.source = SourceCheckpoint(model_path)
        self.recipe = recipe
        self.work = WorkDir(work_dir)
        self.device = device
        self._text_file = text_file
        for layer in range(self.source.layers):
            self._check_widths(layer, self.source.architecture.kept_sites(recipe.skip_linears, layer))

    @property
    def shards(self) -> int:
        """Number of sweep shards."""
        return len(shard_windows(self.recipe.calibration))

    @cached_property
    def _skeleton(self) -> Skeleton:
        return Skeleton(self.source, self.device)

    def _check_widths(self, layer: int, sites: tuple[Site, ...]) -> None:
        """Find a group size that suits no width of the model before hours of work, not after."""
        if self.recipe.weight.group_size is None:
            return
        shapes = self._skeleton.layer_names(layer)
        for site in sites:
            resolve_group_size(shapes[f"{site.linears[0]}.weight"][1], self.recipe.weight.group_size)

    def found(self) -> Found:
        """Return what an earlier try left in the work directory."""
        return Found(boundaries=self.work.found("boundary"), statistics=self.work.found("statistics"))

    def do(self, step: StepId, out: Path) -> ShardOutcome | None:
        """Do one step; return the outcome of those that make a shard, which is then in directory `out`."""
        match step.kind:
            case "tokenize":
                self.tokenize()
            case "embed":
                self.embed(step.shard)
            case "sweep":
                self.sweep(step.layer, step.shard)
            case "quantize":
                return self.quantize(step.layer, out)
            case "extra":
                return self.embeddings(out)
        return None

    def tokenize(self) -> None:
        """Write the calibration windows, unless they are there."""
        if self.work.tokens.exists():
            return
        calibration = self.recipe.calibration
        windows = calibration_windows(
            self.source.path,
            calibration.source,
            samples=calibration.samples,
            seq_len=calibration.seq_len,
            seed=self.recipe.seed,
            local_file=self._text_file,
            starts_with_bos=self.source.architecture.starts_with_bos,
        )
        write_tokens(self.work, windows)

    def embed(self, shard: int) -> None:
        """Write the inputs of layer 0 for one shard."""
        embed_shard(self.source, self._skeleton, self.recipe, self.work, shard)

    def sweep(self, layer: int, shard: int) -> None:
        """Run one layer over one shard, then delete its input: no later step reads it."""
        sweep_layer(self.source, self._skeleton, self.recipe, self.work, layer, shard)
        self.work.boundary(layer, shard).unlink(missing_ok=True)

    def quantize(self, layer: int, out: Path) -> ShardOutcome:
        """Quantize one layer into its shard in directory `out`."""
        started = time.perf_counter()
        files = [self.work.statistics(layer, shard) for shard in range(self.shards)]
        windows = [len(shard) for shard in shard_windows(self.recipe.calibration)]
        statistics = merge([load_statistics(file, self.device) for file in files], windows)
        stored = self._skeleton.load(self.source, layer)
        shape = LayerShape(kv_heads=self._skeleton.kv_heads, head_dim=self._skeleton.head_dim)
        tensors = {name: tensor.to(self.device) for name, tensor in stored.items()}
        samples = None
        if self.recipe.learns:
            samples = LayerSamples(self._skeleton, load_inputs(self.work, layer, self.shards, self.device))
        quantized = quantize_layer(
            tensors, statistics, self.source.architecture, shape, self.recipe, layer=layer, samples=samples
        )
        prefix = f"{self.source.architecture.layers_prefix}.{layer}."
        shard = write_shard(out / layer_shard(layer), {prefix + n: t for n, t in quantized.tensors.items()})
        return ShardOutcome(
            layer=layer,
            shard=shard,
            source_sha256=hash_tensors(stored),
            source_bytes=sum(tensor.numel() * 2 for tensor in stored.values()),
            quantized_weights=quantized.quantized_weights,
            metrics=quantized.metrics,
            seconds=time.perf_counter() - started,
        )

    def forget(self, layer: int) -> None:
        """Delete the statistics of a layer whose shard is safe."""
        for shard in range(self.shards):
            self.work.statistics(layer, shard).unlink(missing_ok=True)
            self.work.inputs(layer, shard).unlink(missing_ok=True)

    def embeddings(self, out: Path) -> ShardOutcome:
        """Write embeddings, final norm and head, in 16 bits, into their shard in directory `out`.

        Raises:
            SourceError: one of them is missing, has the wrong shape or is not finite.
        """
        started = time.perf_counter()
        stored = self._skeleton.load_extra(self.source)
        shard = write_shard(out / EXTRA_SHARD, {name: t.to(torch.bfloat16) for name, t in stored.items()})
        return ShardOutcome(
            layer=-1,
            shard=shard,
            source_sha256=hash_tensors(stored),
            source_bytes=sum(tensor.numel() * 2 for tensor in stored.values()),
            quantized_weights=0,
            metrics={},
            seconds=time.perf_counter() - started,
        )

    def finish(self, out: Path, outcomes: Sequence[ShardOutcome], *, name: str) -> Manifest:
        """Write the small files into `out`; return the manifest, which the caller writes last."""
        ordered = sorted(outcomes, key=lambda outcome: outcome.layer)
        digest = hashlib.sha256("".join(outcome.source_sha256 for outcome in ordered).encode()).hexdigest()
        size = sum(outcome.shard.size_bytes for outcome in ordered)
        source_bytes = sum(outcome.source_bytes for outcome in ordered)
        weights = sum(outcome.quantized_weights for outcome in ordered)
        packed_bytes = sum(outcome.shard.tensor_bytes for outcome in ordered if outcome.layer >= 0)
        summary = {
            "size_bytes": size,
            "source_bytes": source_bytes,
            "size_ratio": round(size / source_bytes, 4),
            "quantized_weights": weights,
            "bits_per_weight": round(8 * packed_bytes / weights, 4) if weights else 16.0,
        }
        report = {"layers": {str(outcome.layer): outcome.metrics for outcome in ordered if outcome.layer >= 0}}
        return write_small_files(
            out,
            self.source,
            self.recipe,
            [outcome.shard for outcome in ordered],
            source_name=name,
            source_sha256=digest,
            summary=summary,
            report=report,
        )
