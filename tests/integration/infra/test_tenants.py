"""Tenants and the audit log, on SQLite and on PostgreSQL."""

import pytest
from sqlalchemy import Engine

from infra import audit
from infra.errors import TenantExists, TenantNotFound
from infra.tenants import TenantStore


@pytest.fixture
def store(engine: Engine) -> TenantStore:
    return TenantStore(engine)


def test_a_tenant_is_made_read_and_changed(store: TenantStore) -> None:
    made = store.create("zoo", actor="key:a", name="Zoo", weight=2.0, max_queued=10)
    assert (made.id, made.name, made.weight, made.max_queued, made.max_bytes) == ("zoo", "Zoo", 2.0, 10, None)
    changed = store.change("zoo", actor="key:a", max_queued=None, paused=True)
    assert (changed.max_queued, changed.paused, changed.weight) == (None, True, 2.0)
    assert store.get("zoo") == changed
    assert store.change("zoo", actor="key:a") == changed


def test_an_id_is_given_once(store: TenantStore) -> None:
    store.create("zoo", actor="key:a", name="Zoo")
    with pytest.raises(TenantExists):
        store.create("zoo", actor="key:a", name="Other")
    assert store.get("zoo").name == "Zoo"


def test_what_is_not_there_is_not_found(store: TenantStore) -> None:
    with pytest.raises(TenantNotFound):
        store.get("nobody")
    with pytest.raises(TenantNotFound):
        store.change("nobody", actor="key:a", name="Somebody")


def test_pages_show_every_tenant_once(store: TenantStore) -> None:
    for number in range(5):
        store.create(f"t{number}", actor="key:a", name="T")
    seen: list[str] = []
    before = None
    while page := store.page(limit=2, before=before):
        seen += [tenant.id for tenant in page]
        before = (page[-1].created_at, page[-1].id)
    assert len(seen) == 6
    assert set(seen) == {"default", *(f"t{number}" for number in range(5))}


def test_every_change_is_in_the_audit_log_with_who_made_it(store: TenantStore, engine: Engine) -> None:
    store.create("zoo", actor="key:a", name="Zoo")
    store.change("zoo", actor="key:b", weight=3.0)
    with pytest.raises(TenantExists):
        store.create("zoo", actor="key:c", name="Zoo")
    entries = audit.entries(engine, tenant_id="zoo")
    assert [(entry.actor, entry.action, entry.target) for entry in entries] == [
        ("key:b", "tenant.changed", "zoo"),
        ("key:a", "tenant.created", "zoo"),
    ]
    assert entries[0].data == {"weight": 3.0}
    assert audit.entries(engine, before=entries[0].id, limit=1) == [entries[1]]
    assert audit.entries(engine, tenant_id="default") == []
