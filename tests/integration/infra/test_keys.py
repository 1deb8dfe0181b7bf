"""API keys, on SQLite and on PostgreSQL."""

import time

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, insert, select, update

from infra.database import read, write
from infra.errors import InfraError
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
    with pytest.raises(InfraError, match="another tenant"):
        keys.create("other", "up", [], token=token)
    keys.revoke(first.id, "default")
    with pytest.raises(InfraError, match="revoked"):
        keys.create("default", "up", [], token=token)


def test_bad_tokens_and_tenants_make_no_key(keys: KeyStore) -> None:
    with pytest.raises(InfraError, match="not an API key"):
        keys.create("default", "up", [], token="dq_live_short")
    with pytest.raises(InfraError, match="no tenant nobody"):
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
