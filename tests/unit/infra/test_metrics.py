"""Metrics travel as JSON from a dispatcher to whoever shows them."""

import json

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from infra.metrics import Families, merge, restore, snapshot


def shown(*sources: object) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(Families(merge(sources))).decode()  # type: ignore[arg-type]  # any sources
    assert text.count("# TYPE duquant_seconds ") <= 1
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def counted(seconds: float) -> CollectorRegistry:
    registry = CollectorRegistry()
    Histogram("duquant_seconds", "s", registry=registry, buckets=(1, 2)).observe(seconds)
    Counter("duquant_errors", "e", ["kind"], registry=registry).labels('a"\n').inc(3)
    Counter("duquant_silent", "has no sample yet", ["kind"], registry=registry)
    return registry


def test_a_snapshot_survives_json_and_gains_labels() -> None:
    families = json.loads(json.dumps(snapshot(counted(1.5))))
    assert [family["name"] for family in families] == ["duquant_seconds", "duquant_errors"]
    values = shown(restore(families, {"worker": "w1"}))
    assert values["duquant_errors_total", (("kind", 'a"\n'), ("worker", "w1"))] == 3
    assert values["duquant_seconds_bucket", (("le", "1.0"), ("worker", "w1"))] == 0
    assert values["duquant_seconds_bucket", (("le", "+Inf"), ("worker", "w1"))] == 1
    assert values["duquant_seconds_sum", (("worker", "w1"),)] == 1.5


def test_the_same_family_from_several_places_is_one_block() -> None:
    local = counted(0.5)
    values = shown(
        local.collect(),
        restore(snapshot(counted(1.5)), {"worker": "w1"}),
        restore(snapshot(counted(2.5)), {"worker": "w2"}),
    )
    assert values["duquant_seconds_sum", ()] == 0.5
    assert values["duquant_seconds_sum", (("worker", "w1"),)] == 1.5
    assert values["duquant_seconds_sum", (("worker", "w2"),)] == 2.5


def test_merging_leaves_the_sources_alone() -> None:
    registry = CollectorRegistry()
    Gauge("duquant_level", "l", registry=registry).set(1)
    families = list(registry.collect())
    merge([families, families])
    assert [len(family.samples) for family in families] == [1]
