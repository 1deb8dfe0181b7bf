"""Prometheus metrics of a process, and how a dispatcher's reach the one place where they are read.

Every process counts in its own REGISTRY. A dispatcher has no port: it puts a snapshot of its registry into its row of
the table of workers with every beat, and the API shows it at /metrics with the dispatcher's name as a label `worker`.
So one scrape target serves the whole installation, and nothing listens that did not listen before.

Several API processes on one port count in files of a folder that they share: whichever is asked shows the sums.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.multiprocess import MultiProcessCollector

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which the library learns of the folder; it looks when it is imported, and not again."""

# A gauge for each series that says when it began: twice the size, and of no use.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's own omission

REGISTRY = CollectorRegistry()
"""The metrics of this process. Modules that count declare theirs beside their code, on this registry."""

STORAGE_ERRORS = Counter(
    "duquant_storage_errors",
    "Calls to the object store that failed: unavailable (worth another try), refused",
    ["kind"],
    registry=REGISTRY,
)
DATABASE_ERRORS = Counter(
    "duquant_database_errors",
    "Transactions that failed: unavailable (worth another try), unusable",
    ["kind"],
    registry=REGISTRY,
)

for _errors in (STORAGE_ERRORS, DATABASE_ERRORS):
    for _kind in ("unavailable", "refused" if _errors is STORAGE_ERRORS else "unusable"):
        _errors.labels(_kind)  # a series that begins at zero shows its first error as a rise

Snapshot = list[dict[str, Any]]


def collected() -> Iterable[Metric]:
    """Return what this process counts, and those that share its folder, or did before they died."""
    folder = os.environ.get(SHARED_FOLDER)  # noqa: TID251  the library's variable, not a setting of ours
    if not folder:
        return REGISTRY.collect()
    shared: Iterable[Metric] = MultiProcessCollector(None, folder).collect()  # type: ignore[no-untyped-call]
    return shared


def snapshot(registry: CollectorRegistry = REGISTRY) -> Snapshot:
    """Return a registry's metrics as plain JSON; families without samples are left out."""
    return [
        {
            "name": family.name,
            "type": family.type,
            "help": family.documentation,
            "samples": [[sample.name, sample.labels, sample.value] for sample in family.samples],
        }
        for family in registry.collect()
        if family.samples
    ]


def restore(families: Snapshot, labels: Mapping[str, str]) -> list[Metric]:
    """Return the families of a snapshot, with `labels` added to every sample."""
    restored = []
    for family in families:
        metric = Metric(family["name"], family["help"], family["type"])
        for name, own, value in family["samples"]:
            metric.add_sample(name, {**own, **labels}, value)
        restored.append(metric)
    return restored


def merge(sources: Iterable[Iterable[Metric]]) -> list[Metric]:
    """Return families with the samples of all sources: the text format allows each family one block only."""
    families: dict[str, Metric] = {}
    for source in sources:
        for family in source:
            known = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            known.samples.extend(family.samples)
    return list(families.values())


class Families:
    """A collector that yields what it was given, for `prometheus_client.generate_latest`."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        """Yield the families."""
        return self._families
