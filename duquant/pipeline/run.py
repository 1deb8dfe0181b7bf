"""ModelRun: does the steps of one run through files. A plain class: the command line and the workers both use it."""

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duquant.artifact.layout import EXTRA_SHARD, layer_shard
from duquant.artifact.manifest import Manifest
from duquant.artifact.shards import write_shard
from duquant.artifact.writer import write_small_files
from duquant.calibration.keys import KeyStatistics
from duquant.calibration.statistics import load_key_statistics, load_statistics, merge
from duquant.calibration.sweep import (
    WorkDir,
    embed_shard,
    load_inputs,
    observe_layer,
    read_tokens,
    shard_windows,
    sweep_layer,
    write_tokens,
)
from duquant.calibration.text import calibration_windows
from duquant.config import Recipe
from duquant.errors import ConfigError, ScratchError
from duquant.models.architecture import Site
from duquant.models.rotated import ResidualRotations, RotatedCheckpoint, require_rotatable
from duquant.models.skeleton import Skeleton
from duquant.models.source import SourceCheckpoint
from duquant.models.tensor_files import copy_file, hash_tensors, read_tensors, save_tensors, staged_folder
from duquant.pipeline.distillation import distill
from duquant.pipeline.folds import LayerShape
from duquant.pipeline.layer import QuantizedLayer, quantize_layer
from duquant.pipeline.learning import LayerSamples
from duquant.pipeline.outcome import ShardOutcome, report_of, summary_of
from duquant.pipeline.plan import plan
from duquant.pipeline.propagate import propagate_layer
from duquant.pipeline.rotations import rotate_first, write_rotations
from duquant.pipeline.steps import Found, Step, StepId
from duquant.quantizers.weight import resolve_group_size

_OUTCOME = "outcome"
"""The entry of a draft's metadata that has what its shard's outcome will tell."""
_REPORT = "report.json"


class ModelRun:
    """The steps of quantizing one model with one recipe. Steps touch only files, so any process can do any of them.

    Raises:
        SourceError, UnsupportedModelError: from the constructor, when the model cannot be used at all.
        UnsupportedModelError: likewise, when the recipe rotates the residual stream and the model does not allow it.
        ConfigError: likewise, when the recipe's group size divides no site's width, or it has too many outliers.
    """

    def __init__(
        self, model_path: Path, recipe: Recipe, work_dir: Path, *, device: torch.device, text_file: Path | None = None
    ) -> None:
        self.source = SourceCheckpoint(model_path)
        self.recipe = recipe
        self.work = WorkDir(work_dir)
        self.device = device
        self._text_file = text_file
        if recipe.transform.rotates_residual:
            require_rotatable(self.source.architecture, self.source.config["model_type"])
        for layer in range(self.source.layers):
            self._check_widths(layer, self.source.architecture.kept_sites(recipe.skip_linears, layer))

    @property
    def shards(self) -> int:
        """Number of sweep shards."""
        return len(shard_windows(self.recipe.calibration))

    @property
    def quantizations(self) -> int:
        """How often a layer is quantized or packed in the whole run, all passes together."""
        layers, passes = self.source.layers, range(self.recipe.refine_passes + 1)
        drafts = sum(len(stage) for index in passes for stage in self.recipe.stages(layers, index))
        return drafts + layers if self.recipe.distills else drafts

    @cached_property
    def _skeleton(self) -> Skeleton:
        return Skeleton(self.source, self.device)

    @cached_property
    def _model(self) -> SourceCheckpoint:
        """What is swept and quantized: the source, rotated where the recipe says so."""
        if not self.recipe.transform.rotates_residual:
            return self.source
        return RotatedCheckpoint(self.source.path, self._rotations[0], self.device)

    @cached_property
    def _rotations(self) -> tuple[ResidualRotations, dict[str, str]]:
        return ResidualRotations.load(self.work.rotations)

    def _check_widths(self, layer: int, sites: tuple[Site, ...]) -> None:
        """Find a group size or outliers that suit no width of the model before hours of work, not after."""
        group_size, outliers = self.recipe.weight.group_size, self.recipe.outlier_channels
        if group_size is None and not outliers:
            return
        shapes = self._skeleton.layer_names(layer)
        for site in sites:
            width = shapes[f"{site.linears[0]}.weight"][1]
            if outliers >= width:
                raise ConfigError(
                    f"outlier_channels is {outliers}, and site {site.name} has {width} channels",
                    field="outlier_channels",
                )
            resolve_group_size(width - outliers, group_size)

    def steps(self, finished_layers: frozenset[int] = frozenset()) -> list[Step]:
        """Return the steps that are left, in a good order; see `plan`.

        `finished_layers` are not quantized again; -1 is the extra shard.
        """
        indices = range(self.recipe.refine_passes + 1)
        steps = plan(
            layers=self.source.layers,
            shards=self.shards,
            passes=[self.recipe.stages(self.source.layers, index) for index in indices],
            finished_layers=finished_layers,
            found=[self.found(index) for index in indices],
            distills=self.recipe.distills,
            is_distilled=self.work.distilled.exists(),
        )
        return rotate_first(steps) if self.recipe.transform.rotates_residual else steps

    def found(self, pass_index: int = 0) -> Found:
        """Return what an earlier try of a pass left in the work directory."""
        work = self.work.of_pass(pass_index)
        return Found(
            boundaries=work.found("boundary"),
            chains=work.found("chain"),
            statistics=work.found("statistics"),
            packed=work.found_packed(),
        )

    def do(self, step: StepId, out: Path) -> ShardOutcome | None:
        """Do one step; return the outcome of those that make a shard, which is then in directory `out`."""
        match step.kind:
            case "tokenize":
                self.tokenize()
            case "rotate":
                self.rotate()
            case "embed":
                self.embed(step.shard, step.pass_index)
            case "sweep":
                self.sweep(step.layer, step.shard, step.pass_index)
            case "observe":
                self.observe(step.layer, step.shard, step.pass_index)
            case "propagate":
                self.propagate(step.layer, step.shard, step.pass_index)
            case "draft":
                self.draft(step.layer, step.pass_index)
            case "distill":
                self.distill()
            case "quantize":
                return self.quantize(step.layer, out)
            case "extra":
                return self.embeddings(out)
        return None

    def tokenize(self) -> None:
        """Write the calibration windows, unless they are there."""
        if self.work.tokens.exists():
            return
        windows = calibration_windows(
            self.source.path,
            self.recipe.calibration,
            seed=self.recipe.seed,
            local_file=self._text_file,
            starts_with_bos=self.source.architecture.starts_with_bos,
        )
        write_tokens(self.work, windows)

    def rotate(self) -> None:
        """Write the rotations of the residual stream, unless they are there."""
        write_rotations(self.source, self._skeleton, self.recipe, self.work)

    def embed(self, shard: int, pass_index: int = 0) -> None:
        """Write the inputs of layer 0 for one shard."""
        embed_shard(self._model, self._skeleton, self.recipe, self._work(pass_index), shard)

    def sweep(self, layer: int, shard: int, pass_index: int = 0) -> None:
        """Run one layer over one shard of unquantized inputs, then delete them unless a chain starts from them."""
        work = self._work(pass_index)
        sweep_layer(self._model, self._skeleton, self.recipe, work, layer, shard)
        if layer != self._stage(layer, pass_index).start or not self._is_propagated(layer, pass_index):
            work.boundary(layer, shard).unlink(missing_ok=True)

    def observe(self, layer: int, shard: int, pass_index: int = 0) -> None:
        """Record the statistics of one layer over one shard of inputs behind quantized layers.

        The last layer's inputs are then deleted; the others are to be propagated.
        """
        work = self._work(pass_index)
        observe_layer(self._model, self._skeleton, self.recipe, work, layer, shard)
        if not self._is_propagated(layer, pass_index):
            work.chain(layer, shard).unlink(missing_ok=True)

    def propagate(self, layer: int, shard: int, pass_index: int = 0) -> None:
        """Run one quantized layer over one shard, then delete its input: all that read it have done so."""
        work = self._work(pass_index)
        is_start = layer == self._stage(layer, pass_index).start
        given = work.boundary(layer, shard) if is_start else work.chain(layer, shard)
        packed, target = self.packed(layer, pass_index), work.chain(layer + 1, shard)
        propagate_layer(self._skeleton, self.recipe, layer, packed=packed, given=given, target=target)
        given.unlink(missing_ok=True)

    def packed(self, layer: int, pass_index: int = 0) -> Path:
        """Return the file of the quantized layer that a pass runs text through."""
        return self.work.of_pass(max(pass_index - 1, 0)).packed(layer)

    @property
    def lost(self) -> str | None:
        """What finished layers have in common with those to come and is gone, in words: they are to be done again.

        Learning again gives the same bytes only on the same kind of device with as many threads.
        """
        if self.recipe.transform.rotates_residual and not self.work.rotations.exists():
            return "the rotations that it was folded with are gone"
        if self.recipe.distills and not self.work.distilled.exists():
            return "the other layers that it learned with are gone"
        return None

    def runs_shard(self, step: StepId) -> bool:
        """Tell whether a step runs a layer of the artifact, whose shard may be fetched from where it is kept."""
        return step.kind == "propagate" and not self.recipe.refine_passes and not self.recipe.distills

    def draft(self, layer: int, pass_index: int) -> None:
        """Quantize one layer for the next pass to run, unless it is there."""
        work = self._work(pass_index)
        if not work.packed(layer).exists():
            quantized = self._quantized(layer, self._skeleton.load(self.source, layer), work)
            metadata = {_OUTCOME: json.dumps(_told(quantized))}
            save_tensors(work.packed(layer), self._named(layer, quantized.tensors), metadata=metadata)
        self._forget_statistics(layer, work)

    def distill(self) -> None:
        """Let the drafts of the last pass learn together, unless they have; then delete them.

        Raises:
            ScratchError: a draft is missing or broken; a broken one is deleted.
        """
        work = self.work.of_pass(self.recipe.refine_passes)
        if not self.work.distilled.exists():
            read = [
                read_tensors(work.packed(layer), "the quantized layer", prefix=self._prefix(layer))
                for layer in range(self.source.layers)
            ]
            drafts = [tensors for tensors, _ in read]
            windows = read_tokens(self.work, range(self.recipe.calibration.samples), self.recipe.calibration.seq_len)
            learned, report = distill(self.source, self._skeleton, self.recipe, drafts, windows)
            with staged_folder(self.work.distilled) as folder:
                for layer, (tensors, (_, metadata)) in enumerate(zip(learned, read, strict=True)):
                    save_tensors(folder / layer_shard(layer), self._named(layer, tensors), metadata=metadata)
                (folder / _REPORT).write_text(json.dumps(asdict(report)), encoding="utf-8")
        for layer in range(self.source.layers):
            work.packed(layer).unlink(missing_ok=True)

    def quantize(self, layer: int, out: Path) -> ShardOutcome:
        """Quantize one layer into its shard in directory `out`."""
        started = time.perf_counter()
        last = self.recipe.refine_passes
        stored = self._skeleton.load(self.source, layer)
        told: dict[str, Any]
        if self.recipe.distills:
            tensors, told = self._distilled(layer)
        else:
            quantized = self._quantized(layer, stored, self._work(last))
            tensors = self._named(layer, quantized.tensors)
            told = _told(quantized)
        shard = write_shard(out / layer_shard(layer), tensors)
        if not self.recipe.distills and not last and self._is_propagated(layer, last):
            copy_file(out / shard.name, self.packed(layer))
        return ShardOutcome(
            layer=layer,
            shard=shard,
            source_sha256=hash_tensors(stored),
            source_bytes=sum(tensor.numel() * 2 for tensor in stored.values()),
            seconds=time.perf_counter() - started,
            **told,
        )

    def _work(self, pass_index: int) -> WorkDir:
        work = self.work.of_pass(pass_index)
        work.folder.mkdir(parents=True, exist_ok=True)
        return work

    def _stage(self, layer: int, pass_index: int) -> range:
        return next(stage for stage in self.recipe.stages(self.source.layers, pass_index) if layer in stage)

    def _is_propagated(self, layer: int, pass_index: int) -> bool:
        return layer + 1 in self._stage(layer, pass_index)

    def _quantized(self, layer: int, stored: dict[str, Tensor], work: WorkDir) -> QuantizedLayer:
        """Quantize one layer by the statistics of a pass."""
        files = [work.statistics(layer, shard) for shard in range(self.shards)]
        windows = [len(shard) for shard in shard_windows(self.recipe.calibration)]
        statistics = merge([load_statistics(file, self.device) for file in files], windows)
        shape = LayerShape(kv_heads=self._skeleton.kv_heads, head_dim=self._skeleton.head_dim)
        if isinstance(self._model, RotatedCheckpoint):
            tensors = self._model.rotate(layer, stored)
        else:
            tensors = {name: tensor.to(self.device) for name, tensor in stored.items()}
        samples = None
        if self.recipe.learns_by_layer:
            samples = LayerSamples(self._skeleton, load_inputs(work, layer, self.shards, self.device))
        keys = None
        if self.recipe.kv_cache.smooth_keys:
            keys = KeyStatistics.merge([load_key_statistics(file, self.device) for file in files])
        return quantize_layer(
            tensors, statistics, self.source.architecture, shape, self.recipe, layer=layer, samples=samples, keys=keys
        )

    def _distilled(self, layer: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a layer's tensors as learned, by their names in the model, and what its outcome tells."""
        path = self.work.distilled / layer_shard(layer)
        try:
            tensors, metadata = read_tensors(path, "the distilled layer")
        except ScratchError:
            if not path.exists():
                self._forget_distillation()
            raise
        return tensors, json.loads(metadata[_OUTCOME])

    def _distillation_report(self) -> dict[str, Any]:
        """Return how distillation went.

        Raises:
            ScratchError: the file is missing or broken; all that was learned is then deleted.
        """
        path = self.work.distilled / _REPORT
        try:
            report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            if isinstance(err, FileNotFoundError | ValueError):
                self._forget_distillation()
            raise ScratchError(f"cannot read the report of distillation {path}: {err}") from err
        return report

    def _forget_distillation(self) -> None:
        """Delete all that was learned when part of it is gone: one layer alone cannot be learned again."""
        shutil.rmtree(self.work.distilled, ignore_errors=True)

    def _prefix(self, layer: int) -> str:
        return f"{self.source.architecture.layers_prefix}.{layer}."

    def _named(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's tensors by their names in the model."""
        return {self._prefix(layer) + name: tensor for name, tensor in tensors.items()}

    def forget(self, layer: int) -> None:
        """Delete what a layer was quantized from, when its shard is safe."""
        last = self.recipe.refine_passes
        self._forget_statistics(layer, self.work.of_pass(last))
        if not last:
            # All of the text is behind these, or this layer had no statistics. Drafts have more readers: they stay.
            for earlier in range(self._stage(layer, last).start, layer):
                self.packed(earlier).unlink(missing_ok=True)

    def _forget_statistics(self, layer: int, work: WorkDir) -> None:
        for shard in range(self.shards):
            work.statistics(layer, shard).unlink(missing_ok=True)
            work.inputs(layer, shard).unlink(missing_ok=True)

    def embeddings(self, out: Path) -> ShardOutcome:
        """Write embeddings, final norm and head, in 16 bits, into their shard in directory `out`.

        Raises:
            SourceError: one of them is missing, has the wrong shape or is not finite.
            ScratchError: the report of distillation is missing or broken.
        """
        started = time.perf_counter()
        stored = self._skeleton.load_extra(self.source)
        tensors, metrics = stored, {}
        if isinstance(self._model, RotatedCheckpoint):
            tensors = self._model.rotate_ends(stored)
            metrics = {name: json.loads(value) for name, value in self._rotations[1].items()}
        if self.recipe.distills:
            metrics = {"distillation": self._distillation_report()}
        shard = write_shard(out / EXTRA_SHARD, {name: t.to(torch.bfloat16) for name, t in tensors.items()})
        return ShardOutcome(
            layer=-1,
            shard=shard,
            source_sha256=hash_tensors(stored),
            source_bytes=sum(tensor.numel() * 2 for tensor in stored.values()),
            quantized_weights=0,
            metrics=metrics,
            seconds=time.perf_counter() - started,
        )

    def finish(self, out: Path, outcomes: Sequence[ShardOutcome], *, name: str) -> Manifest:
        """Write the small files into `out`; return the manifest, which the caller writes last."""
        ordered = sorted(outcomes, key=lambda outcome: outcome.layer)
        digest = hashlib.sha256("".join(outcome.source_sha256 for outcome in ordered).encode()).hexdigest()
        return write_small_files(
            out,
            self.source,
            self.recipe,
            [outcome.shard for outcome in ordered],
            source_name=name,
            source_sha256=digest,
            summary=summary_of(ordered),
            report=report_of(ordered),
            is_rotated=self.recipe.transform.rotates_residual,
        )


def _told(quantized: QuantizedLayer) -> dict[str, Any]:
    """Return what the outcome of a layer's shard tells of how it was quantized, as plain JSON types."""
    return {"quantized_weights": quantized.quantized_weights, "metrics": quantized.metrics}
