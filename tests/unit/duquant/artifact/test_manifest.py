"""Manifests: what is accepted and what is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duquant.artifact.layout import FORMAT, SCHEMA_VERSION, layer_shard, quantization_config, smallest_index_type
from duquant.artifact.manifest import fingerprint, parse_manifest, read_manifest
from duquant.config import PRESETS, Recipe
from duquant.errors import ArtifactError


@pytest.fixture
def values(tiny_artifact: Callable[..., Any]) -> dict[str, Any]:
    """A good manifest's JSON."""
    return dict(json.loads((tiny_artifact().artifact / "manifest.json").read_text()))


def test_manifest_survives_json(values: dict[str, Any]) -> None:
    assert parse_manifest(values, "here").to_dict() == values


def test_an_older_algorithm_stays_that_of_the_artifact(values: dict[str, Any]) -> None:
    values["algorithm_version"] = 1
    assert parse_manifest(values, "here").to_dict()["algorithm_version"] == 1


def test_directory_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no manifest\.json: it is not a finished duquant artifact"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"a"', "\xff"])
def test_unreadable_manifest_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ArtifactError, match=r"manifest\.json is not readable JSON"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "null", "{}", '{"format": "gguf"}'])
def test_other_json_does_not_describe_an_artifact(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match="does not describe a duquant artifact"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_schema_version_is_named(values: dict[str, Any], version: object) -> None:
    values["schema_version"] = version
    with pytest.raises(ArtifactError, match=f"here has schema version {version}; this duquant reads version 1"):
        parse_manifest(values, "here")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "x\0y", "..\\x"])
def test_file_name_that_leaves_the_directory_is_refused(values: dict[str, Any], name: str) -> None:
    values["files"][0]["name"] = name
    with pytest.raises(ArtifactError, match="leaves the artifact's directory"):
        parse_manifest(values, "here")


@pytest.mark.parametrize(
    "field", ["algorithm_version", "fingerprint", "source", "recipe", "files", "versions", "summary"]
)
def test_missing_field_is_named(values: dict[str, Any], field: str) -> None:
    del values[field]
    with pytest.raises(ArtifactError, match=f"here is malformed: KeyError '{field}'"):
        parse_manifest(values, "here")


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("files", None),
        ("files", {"a": 1}),
        ("files", [3]),
        ("files", [{"name": "x"}]),
        ("files", [{"name": "x", "sha256": "y", "size_bytes": "many"}]),
        ("files", [{"name": "x", "sha256": "y", "size_bytes": float("inf")}]),
        ("source", 3),
        ("recipe", []),
        ("recipe", {"wieght": {}}),
        ("versions", "new"),
        ("summary", [1]),
        ("evaluation", 3),
    ],
)
def test_malformed_field_is_our_error(values: dict[str, Any], field: str, bad: object) -> None:
    values[field] = bad
    with pytest.raises(ArtifactError, match="here is malformed"):
        parse_manifest(values, "here")


def test_fingerprint_depends_on_source_and_recipe_but_not_on_its_name() -> None:
    base = fingerprint("a", Recipe())
    assert base == fingerprint("a", Recipe(name="other"))
    assert len({base, fingerprint("b", Recipe()), fingerprint("a", Recipe(seed=1))}) == 3


@pytest.mark.parametrize("name", list(PRESETS))
def test_recipe_travels_in_config_json(name: str) -> None:
    entry = json.loads(json.dumps(quantization_config(PRESETS[name][1])))
    assert (entry["quant_method"], entry["schema_version"]) == (FORMAT, SCHEMA_VERSION)
    assert Recipe.from_dict(entry["recipe"]) == PRESETS[name][1]


def test_index_type_is_the_smallest_that_fits() -> None:
    import torch

    assert smallest_index_type(torch.arange(2**15)).dtype == torch.int16
    assert smallest_index_type(torch.arange(2**15 + 1)).dtype == torch.int32
    assert torch.equal(smallest_index_type(torch.arange(2**15)).long(), torch.arange(2**15))


def test_shards_sort_by_layer() -> None:
    names = [layer_shard(layer) for layer in range(0, 300, 7)]
    assert names == sorted(names)
