"""Artifacts: layout, shards, manifest, model card, writing and verifying."""

from duquant.artifact.manifest import Manifest, read_manifest
from duquant.artifact.verify import VerifyReport, require_intact, verify

__all__ = ["Manifest", "VerifyReport", "read_manifest", "require_intact", "verify"]
