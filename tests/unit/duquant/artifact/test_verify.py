"""verify finds whatever was done to an artifact."""

import hashlib
import json
from pathlib import Path

import pytest

from duquant.artifact import require_intact, verify
from duquant.errors import ArtifactError

SHARD = "model-layer-0001.safetensors"


def problems(directory: Path) -> list[str]:
    report = verify(directory)
    assert report.ok is (not report.problems)
    if report.problems:
        with pytest.raises(ArtifactError, match=str(directory)):
            require_intact(directory)
    else:
        require_intact(directory)
    return report.problems


def test_untouched_artifact_is_intact(own_artifact: Path) -> None:
    assert problems(own_artifact) == []
    report = verify(own_artifact)
    assert report.files == len(list(own_artifact.iterdir()))
    assert report.size_bytes == sum(p.stat().st_size for p in own_artifact.iterdir() if p.name != "manifest.json")


@pytest.mark.parametrize("name", [SHARD, "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_missing_file_is_found(own_artifact: Path, name: str) -> None:
    (own_artifact / name).unlink()
    assert problems(own_artifact) == [f"{name} is missing"]


@pytest.mark.parametrize("position", [0, 9, 1000, -1])
def test_changed_byte_is_found(own_artifact: Path, position: int) -> None:
    raw = bytearray((own_artifact / SHARD).read_bytes())
    raw[position] ^= 1
    (own_artifact / SHARD).write_bytes(raw)
    assert problems(own_artifact) == [f"{SHARD} does not match its sha256; it was changed or damaged"]


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_truncated_file_is_found(own_artifact: Path, keep: int) -> None:
    raw = (own_artifact / SHARD).read_bytes()
    (own_artifact / SHARD).write_bytes(raw[:keep])
    (problem,) = problems(own_artifact)
    assert problem == f"{SHARD} has {len(raw[:keep])} bytes, the manifest says {len(raw)}"


@pytest.mark.parametrize("name", ["model-layer-0002.safetensors", "modeling_evil.py", "pytorch_model.bin", "folder"])
def test_extra_file_is_found(own_artifact: Path, name: str) -> None:
    (own_artifact / name).mkdir() if name == "folder" else (own_artifact / name).write_text("x")
    assert problems(own_artifact) == [f"{name} is not in the manifest"]


def test_file_that_became_a_directory_is_found(own_artifact: Path) -> None:
    (own_artifact / SHARD).unlink()
    (own_artifact / SHARD).mkdir()
    assert problems(own_artifact) == [f"{SHARD} is missing"]


def test_missing_manifest_is_found(own_artifact: Path) -> None:
    (own_artifact / "manifest.json").unlink()
    (problem,) = problems(own_artifact)
    assert "it is not a finished duquant artifact" in problem


def test_absent_directory_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    (problem,) = verify(tmp_path / "absent").problems
    assert "manifest.json" in problem


def test_other_schema_version_is_found(own_artifact: Path) -> None:
    manifest = own_artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 9'))
    (problem,) = problems(own_artifact)
    assert "schema version 9" in problem


def test_names_that_leave_the_directory_are_never_followed(own_artifact: Path) -> None:
    secret = own_artifact.parent / "secret"
    secret.write_text("secret")
    values = json.loads((own_artifact / "manifest.json").read_text())
    digest = hashlib.sha256(b"secret").hexdigest()
    values["files"].append({"name": "../secret", "sha256": digest, "size_bytes": 6})
    (own_artifact / "manifest.json").write_text(json.dumps(values))
    (problem,) = problems(own_artifact)
    assert "leaves the artifact's directory" in problem


def test_many_problems_are_counted_in_the_error(own_artifact: Path) -> None:
    for index in range(5):
        (own_artifact / f"extra-{index}").touch()
    with pytest.raises(ArtifactError, match=r"\(and 2 more\)"):
        require_intact(own_artifact)
