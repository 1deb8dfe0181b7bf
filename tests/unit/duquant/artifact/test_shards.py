"""Shard files are deterministic and appear whole."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from duquant.artifact.card import model_card
from duquant.artifact.manifest import read_manifest
from duquant.artifact.shards import ShardInfo, write_index, write_shard
from duquant.config import ALGORITHM_VERSION


def tensors() -> dict[str, torch.Tensor]:
    return {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.int16)}


def test_equal_tensors_give_equal_bytes_in_any_order(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "first", tensors())
    second = write_shard(tmp_path / "second", dict(reversed(tensors().items())))
    assert first.sha256 == second.sha256 == hashlib.sha256((tmp_path / "first").read_bytes()).hexdigest()
    assert first.tensors == ("a", "b")
    assert first.tensor_bytes == 24 + 6
    assert first.size_bytes == (tmp_path / "first").stat().st_size


def test_shard_holds_what_was_written(tmp_path: Path) -> None:
    strided = {"t": torch.arange(6.0).view(2, 3).T}
    write_shard(tmp_path / "shard.safetensors", strided)
    assert torch.equal(load_file(tmp_path / "shard.safetensors")["t"], strided["t"])


def test_failed_write_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    write_shard(path, tensors())
    before = path.read_bytes()
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):
        write_shard(path, {"a": shared, "b": shared})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["shard"]


def test_shard_info_survives_json(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "shard", tensors())
    assert ShardInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_index_sums_the_tensor_bytes(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / name, {f"{name}.{n}": t for n, t in tensors().items()}) for name in ("x", "y")]
    write_index(tmp_path, shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 60
    assert index["weight_map"] == {"x.a": "x", "x.b": "x", "y.a": "y", "y.b": "y"}


def test_card_tells_recipe_sizes_and_measurements(tiny_artifact: Callable[..., Any]) -> None:
    manifest = read_manifest(tiny_artifact().artifact)
    card = model_card(manifest)
    assert "Nothing has been measured" in card
    assert "4 bits, asymmetric, per output channel" in card
    assert f"digest `{manifest.recipe.digest()[:12]}`, version {ALGORITHM_VERSION} of the algorithm" in card
    assert "version 1 of the algorithm" in model_card(replace(manifest, algorithm_version=1))
    assert "from duquant.inference import load" in card
    result = {"perplexity": 38.2, "text": {"kind": "file", "name": "a.txt"}, "windows": 2, "seq_len": 64}
    measured = model_card(replace(manifest, evaluation={"results": [result]}))
    assert "| 38.2000 | file `a.txt` | 2 of 64 tokens |" in measured
    assert "Nothing has been measured" not in measured
