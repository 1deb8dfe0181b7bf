"""API keys, on SQLite and on PostgreSQL."""

import time

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, insert, select, update

from infra import audit
from infra.database import read, write
from infra.errors import InfraError, KeyConflict, KeyNotFound
from infra.keys import KeyStore, is_well_formed, new_token
from infra.schema import api_keys, tenants

PEPPER = SecretStr("pepper")


@pytest.fixture
def keys(engine: Engine) -> KeyStore:
    return KeyStore(engine, PEPPER)


def test_a_key_is_recognised_by_its_token(keys: KeyStore) -> None:
    key, token = keys.create("default", "laptop", {"jobs:write", "jobs:read"})
    assert token.startswith("dq_live_")
    assert token.removeprefix("dq_live_").startswith(key.prefix)
    known = keys.authenticate(token)
    assert known is not None
    assert (known.id, known.tenant_id, known.scopes) == (key.id, "default", {"jobs:read", "jobs:write"})
    assert known.name == "laptop"


def test_the_database_never_sees_the_token(keys: KeyStore, engine: Engine) -> None:
    _, token = keys.create("default", "laptop", [])
    with read(engine) as connection:
        stored = str(connection.execute(select(api_keys)).mappings().one())
    assert token not in stored
    assert token.removeprefix("dq_live_")[8:] not in stored


def test_a_key_is_worth_nothing_under_another_pepper(keys: KeyStore, engine: Engine) -> None:
    _, token = keys.create("default", "laptop", [])
    assert KeyStore(engine, SecretStr("other")).authenticate(token) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dq_live_",
        "x",
        "dq_live_" + "a" * 49,
        "Bearer dq_live_x",
        "dq_live_" + "é" * 49,
        "dq_live_'; DROP TABLE jobs",
    ],
)
def test_what_is_no_token_is_refused(keys: KeyStore, text: str) -> None:
    assert keys.authenticate(text) is None


def test_a_mistyped_token_fails_its_checksum() -> None:
    token = new_token()
    assert is_well_formed(token)
    for place in range(len("dq_live_"), len(token)):
        wrong = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
        assert not is_well_formed(wrong)
    assert not is_well_formed(token + "0")
    assert not is_well_formed(token + "\n")
    assert len({new_token() for _ in range(1000)}) == 1000


def test_revoked_and_expired_keys_are_refused(keys: KeyStore) -> None:
    key, token = keys.create("default", "laptop", [])
    assert not keys.revoke(key.id, "other")
    assert keys.authenticate(token) is not None
    assert keys.revoke(key.id, "default")
    assert not keys.revoke(key.id, "default")
    assert keys.authenticate(token) is None
    now = time.time_ns() // 1_000_000
    _, old = keys.create("default", "old", [], expires_at=now - 1)
    _, young = keys.create("default", "young", [], expires_at=now + 600_000)
    assert keys.authenticate(old) is None
    assert keys.authenticate(young) is not None


def test_a_given_token_makes_one_key_however_often_it_is_given(keys: KeyStore, engine: Engine) -> None:
    token = new_token()
    first, same = keys.create("default", "up", ["jobs:read"], token=token)
    again, _ = keys.create("default", "up", ["jobs:read"], token=token)
    assert same == token
    assert again.id == first.id
    with write(engine) as connection:
        connection.execute(insert(tenants).values(id="other", name="Other", created_at=0))
    with pytest.raises(InfraError, match="another project"):
        keys.create("other", "up", [], token=token)
    keys.revoke(first.id, "default")
    with pytest.raises(InfraError, match="revoked"):
        keys.create("default", "up", [], token=token)


def test_bad_tokens_and_tenants_make_no_key(keys: KeyStore) -> None:
    with pytest.raises(InfraError, match="not an API key"):
        keys.create("default", "up", [], token="dq_live_short")
    with pytest.raises(InfraError, match="no project nobody"):
        keys.create("nobody", "up", [])
    assert keys.list("default") == []


def test_tenants_see_their_own_keys(keys: KeyStore) -> None:
    first, _ = keys.create("default", "a", [])
    second, _ = keys.create("default", "b", [])
    assert keys.list("default") == [first, second]
    assert keys.list("other") == []


def test_the_last_use_is_noted_once_a_minute(keys: KeyStore, engine: Engine) -> None:
    key, token = keys.create("default", "a", [])
    assert key.last_used_at is None
    keys.authenticate(token)
    (used,) = keys.list("default")
    assert used.last_used_at is not None
    with write(engine) as connection:
        connection.execute(update(api_keys).values(last_used_at=used.last_used_at - 30_000))
    keys.authenticate(token)
    assert keys.list("default")[0].last_used_at == used.last_used_at - 30_000
    with write(engine) as connection:
        connection.execute(update(api_keys).values(last_used_at=used.last_used_at - 90_000))
    keys.authenticate(token)
    assert (keys.list("default")[0].last_used_at or 0) >= used.last_used_at


def test_a_rotated_key_and_its_successor_both_work_during_the_overlap(keys: KeyStore, engine: Engine) -> None:
    old, old_token = keys.create("default", "ci", ["jobs:read"])
    new, new_token = keys.rotate(old.id, "default", overlap_seconds=600, actor="key:admin")
    assert (new.name, new.scopes, new.expires_at) == ("ci", {"jobs:read"}, None)
    assert new.id != old.id
    for token in (old_token, new_token):
        assert keys.authenticate(token) is not None
    expires_at = keys.get(old.id, "default").expires_at
    assert expires_at is not None
    assert abs(expires_at - (time.time_ns() // 1_000_000 + 600_000)) < 60_000
    (entry,) = audit.entries(engine, tenant_id="default", limit=1)
    assert (entry.action, entry.target, entry.actor) == ("key.rotated", old.id, "key:admin")
    assert entry.data == {"successor": new.id, "overlap_seconds": 600}


def test_a_rotation_without_overlap_ends_the_old_key_at_once(keys: KeyStore) -> None:
    old, old_token = keys.create("default", "ci", [])
    _, new_token = keys.rotate(old.id, "default", overlap_seconds=0, actor="key:admin")
    assert keys.authenticate(old_token) is None
    assert keys.authenticate(new_token) is not None


def test_a_rotation_never_lengthens_a_life_and_gives_the_successor_the_same_one(keys: KeyStore) -> None:
    now = time.time_ns() // 1_000_000
    old, _ = keys.create("default", "ci", [], expires_at=now + 60_000)
    new, _ = keys.rotate(old.id, "default", overlap_seconds=3600, actor="key:admin")
    assert keys.get(old.id, "default").expires_at == old.expires_at
    assert new.expires_at is not None
    assert old.expires_at is not None
    assert abs((new.expires_at - new.created_at) - (old.expires_at - old.created_at)) <= 2


def test_a_successor_ends_when_whoever_asks_for_it_does(keys: KeyStore) -> None:
    now = time.time_ns() // 1_000_000
    for expires_at, latest in ((now + 60_000, now + 30_000), (None, now + 30_000), (now + 60_000, now + 10**9)):
        old, _ = keys.create("default", "ci", [], expires_at=expires_at)
        new, _ = keys.rotate(old.id, "default", overlap_seconds=0, actor="key:admin", latest=latest)
        assert new.expires_at is not None
        assert new.expires_at <= min(latest, now + 90_000)


def test_only_a_live_key_of_the_tenants_own_is_rotated(keys: KeyStore) -> None:
    key, token = keys.create("default", "ci", [])
    with pytest.raises(KeyNotFound):
        keys.rotate(key.id, "other", overlap_seconds=0, actor="key:admin")
    with pytest.raises(KeyNotFound):
        keys.get(key.id, "other")
    keys.revoke(key.id, "default")
    with pytest.raises(KeyConflict):
        keys.rotate(key.id, "default", overlap_seconds=0, actor="key:admin")
    expired, _ = keys.create("default", "old", [], expires_at=1)
    with pytest.raises(KeyConflict):
        keys.rotate(expired.id, "default", overlap_seconds=0, actor="key:admin")
    assert len(keys.list("default")) == 2
    assert keys.authenticate(token) is None


def test_the_audit_log_names_keys_and_holds_no_secret(keys: KeyStore, engine: Engine) -> None:
    key, token = keys.create("default", "ci", ["jobs:read"], actor="key:admin")
    keys.create("default", "ci", ["jobs:read", "jobs:write"], token=token, actor="key:admin")
    _, second = keys.rotate(key.id, "default", overlap_seconds=1, actor="key:admin")
    keys.revoke(key.id, "default", actor="key:admin")
    keys.revoke(key.id, "default", actor="key:admin")
    entries = audit.entries(engine, tenant_id="default")
    assert [entry.action for entry in entries] == ["key.revoked", "key.rotated", "key.changed", "key.created"]
    for secret in (token, second):
        assert secret.removeprefix("dq_live_")[8:] not in str(entries)


def test_a_known_token_gets_the_scopes_that_it_is_given_now(keys: KeyStore) -> None:
    token = new_token()
    keys.create("default", "bootstrap", ["jobs:read"], token=token)
    keys.create("default", "bootstrap", ["jobs:read", "keys:admin"], token=token)
    known = keys.authenticate(token)
    assert known is not None
    assert known.scopes == {"jobs:read", "keys:admin"}


def test_pages_of_keys_are_newest_first(keys: KeyStore) -> None:
    made = [keys.create("default", str(number), [])[0] for number in range(5)]
    first = keys.page("default", limit=3)
    second = keys.page("default", limit=3, before=(first[-1].created_at, first[-1].id))
    assert [key.id for key in (*first, *second)] == [key.id for key in reversed(made)]
