"""The small files of an artifact, written when all shards are there."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duquant.artifact.card import model_card
from duquant.artifact.layout import INDEX, MANIFEST, REPORT, quantization_config
from duquant.artifact.manifest import FileEntry, Manifest, fingerprint, tool_versions
from duquant.artifact.shards import ShardInfo, sha256_file, write_index, write_json
from duquant.config import Recipe
from duquant.models.rotated import rotated_config
from duquant.models.source import TOKENIZER_FILES, SourceCheckpoint


def write_small_files(
    directory: Path,
    source: SourceCheckpoint,
    recipe: Recipe,
    shards: Sequence[ShardInfo],
    *,
    source_name: str,
    source_sha256: str,
    summary: Mapping[str, Any],
    report: Mapping[str, Any],
    is_rotated: bool = False,
) -> Manifest:
    """Write config, index, tokenizer, report and model card into `directory`; return the manifest, not yet written.

    A model whose residual stream is rotated has embeddings and a head of its own, whatever the source has.
    The shards need not be in `directory`: on a worker they are in object storage already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = rotated_config(source.config) if is_rotated else dict(source.config)
    config["quantization_config"] = quantization_config(recipe)
    config["dtype"] = "bfloat16"
    write_json(directory / "config.json", config)
    write_index(directory, shards)
    write_json(directory / REPORT, report)
    copied = [name for name in TOKENIZER_FILES if (source.path / name).is_file()]
    for name in copied:
        shutil.copyfile(source.path / name, directory / name)
    small = ["config.json", INDEX, REPORT, *copied]
    small_entries = [_entry(directory / name) for name in small]
    shard_entries = [FileEntry(name=s.name, sha256=s.sha256, size_bytes=s.size_bytes) for s in shards]
    manifest = Manifest(
        fingerprint=fingerprint(source_sha256, recipe),
        source={
            "name": source_name,
            "sha256": source_sha256,
            "model_type": source.config["model_type"],
            "layers": source.layers,
        },
        recipe=recipe,
        files=(),
        versions=tool_versions(),
        summary=dict(summary),
    )
    (directory / "README.md").write_text(model_card(manifest), encoding="utf-8")
    small_entries.append(_entry(directory / "README.md"))
    files = tuple(sorted([*shard_entries, *small_entries], key=lambda entry: entry.name))
    return replace(manifest, files=files)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write manifest.json: the step that makes the directory an artifact."""
    write_json(directory / MANIFEST, manifest.to_dict())


def _entry(path: Path) -> FileEntry:
    return FileEntry(name=path.name, sha256=sha256_file(path), size_bytes=path.stat().st_size)
