"""API keys: shown once, kept as an HMAC, recognised by a checksum before the database is asked."""

import hashlib
import hmac
import re
import secrets
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from pydantic import SecretStr
from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    bindparam,
    case,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.engine import RowMapping

from infra import audit
from infra.database import now_ms, read, take_turns, write
from infra.errors import InfraError, KeyConflict, KeyNotFound, QuotaExceeded
from infra.ids import new_id
from infra.prepared import Prepared, Row
from infra.schema import api_keys, tenants

TOKEN_PREFIX = "dq_live_"  # noqa: S105  the start of every token, not one
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_RANDOM_BYTES = 32
_RANDOM_CHARS = 43  # 62 ** 43 > 2 ** 256
_CRC_CHARS = 6
_TOKEN = re.compile(rf"{TOKEN_PREFIX}([0-9A-Za-z]{{{_RANDOM_CHARS}}})([0-9A-Za-z]{{{_CRC_CHARS}}})")
_SHOWN_CHARS = 8
_USE_RESOLUTION_MS = 60_000
MAX_KEYS = 500
"""Keys of one tenant that are neither revoked nor expired."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret."""

    id: str
    tenant_id: str
    name: str
    prefix: str
    """The first characters of the random part, by which a person recognises it."""
    scopes: frozenset[str]
    created_at: int
    expires_at: int | None
    last_used_at: int | None
    revoked_at: int | None


class KeyStore:
    """The keys of all tenants, hashed with a pepper that the database does not hold."""

    def __init__(self, engine: Engine, pepper: SecretStr) -> None:
        self._engine = engine
        self._pepper = pepper.get_secret_value().encode()

    def create(
        self,
        tenant_id: str,
        name: str,
        scopes: Iterable[str],
        token: str | None = None,
        *,
        expires_at: int | None = None,
        actor: str = "operator",
    ) -> tuple[ApiKey, str]:
        """Make a key and return it with its token, which can never be read again.

        Args:
            tenant_id: Whose key it is.
            name: For people.
            scopes: What it allows.
            token: One made by `new_token` earlier; making the same one twice returns the first key, with these scopes.
            expires_at: Milliseconds since 1970 after which it is refused.
            actor: Who makes it, for the audit log.

        Raises:
            KeyConflict: the token is that of a revoked key or of another tenant's.
            QuotaExceeded: the tenant has as many as it may have.
            InfraError: no such tenant; the token is malformed.
        """
        token = token or new_token()
        if not is_well_formed(token):
            raise InfraError("this is not an API key: its form or checksum is wrong")
        scopes = sorted(set(scopes))
        with write(self._engine) as connection:
            if connection.execute(select(tenants.c.id).where(tenants.c.id == tenant_id)).first() is None:
                raise InfraError(f"no project {tenant_id}", tenant_id=tenant_id)
            # Also before the look: processes that start together make the same bootstrap key.
            take_turns(connection, f"keys of {tenant_id}")
            known = connection.execute(select(api_keys).where(api_keys.c.hash == self._hash(token))).mappings().first()
            if known is not None:
                return self._renew(connection, _from_row(known), tenant_id, scopes, actor), token
            self._require_room(connection, tenant_id)
            key = self._insert(connection, tenant_id, name, scopes, token, expires_at=expires_at)
            data = {"name": name, "scopes": scopes, "expires_at": expires_at}
            _audit(connection, key, actor, "key.created", data)
            return key, token

    def _require_room(self, connection: Connection, tenant_id: str) -> None:
        """Every key has limits of its own; without an end to keys there would be none to these."""
        take_turns(connection, f"keys of {tenant_id}")
        is_live = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now_ms(self._engine.dialect))
        live = select(func.count()).where(api_keys.c.tenant_id == tenant_id, api_keys.c.revoked_at.is_(None), is_live)
        used = connection.execute(live).scalar_one()
        if used >= MAX_KEYS:
            raise QuotaExceeded(f"a project has at most {MAX_KEYS} keys", quota="keys", limit=MAX_KEYS, used=used)

    def _insert(
        self,
        connection: Connection,
        tenant_id: str,
        name: str,
        scopes: Iterable[str],
        token: str,
        *,
        expires_at: int | ColumnElement[int] | None,
    ) -> ApiKey:
        statement = (
            insert(api_keys)
            .values(
                id=new_id("key"),
                tenant_id=tenant_id,
                name=name,
                prefix=token.removeprefix(TOKEN_PREFIX)[:_SHOWN_CHARS],
                hash=self._hash(token),
                scopes=sorted(scopes),
                created_at=now_ms(self._engine.dialect),
                expires_at=expires_at,
            )
            .returning(api_keys)
        )
        return _from_row(connection.execute(statement).mappings().one())

    def _renew(self, connection: Connection, key: ApiKey, tenant_id: str, scopes: list[str], actor: str) -> ApiKey:
        """Return a key that is given again, with the scopes that it is given now."""
        if key.tenant_id != tenant_id or key.revoked_at is not None:
            raise KeyConflict("this API key is revoked or belongs to another project")
        if key.scopes == set(scopes):
            return key
        statement = update(api_keys).where(api_keys.c.id == key.id).values(scopes=scopes).returning(api_keys)
        _audit(connection, key, actor, "key.changed", {"scopes": scopes})
        return _from_row(connection.execute(statement).mappings().one())

    def rotate(
        self, key_id: str, tenant_id: str, *, overlap_seconds: int, actor: str, latest: int | None = None
    ) -> tuple[ApiKey, str]:
        """Make a key that takes another's place: same name, scopes and lifetime. The old one expires after the overlap.

        Args:
            key_id: Which key.
            tenant_id: Whose it is.
            overlap_seconds: How long the old one goes on working.
            actor: Who asks, for the audit log.
            latest: Milliseconds since 1970 at which the new one ends, however long the old one's lifetime was.

        Raises:
            KeyNotFound: no such key, or it is another tenant's.
            KeyConflict: it is revoked or expired.
        """
        now = now_ms(self._engine.dialect)
        is_live = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now)
        end = now + overlap_seconds * 1000
        # The write comes first and is the check: two rotations at once make one key each, in turn.
        retire = (
            update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.tenant_id == tenant_id, api_keys.c.revoked_at.is_(None), is_live)
            .values(expires_at=case((api_keys.c.expires_at < end, api_keys.c.expires_at), else_=end))
        )
        with write(self._engine) as connection:
            old = self._one(connection, key_id, tenant_id)
            if connection.execute(retire).rowcount == 0:
                raise KeyConflict(f"key {key_id} is revoked or expired", key_id=key_id)
            token = new_token()
            lifetime = None if old.expires_at is None else now + (old.expires_at - old.created_at)
            expires_at = _sooner(lifetime, latest)
            key = self._insert(connection, tenant_id, old.name, old.scopes, token, expires_at=expires_at)
            _audit(connection, old, actor, "key.rotated", {"successor": key.id, "overlap_seconds": overlap_seconds})
        return key, token

    def get(self, key_id: str, tenant_id: str) -> ApiKey:
        """Return one key.

        Raises:
            KeyNotFound: no such key, or it is another tenant's.
        """
        with read(self._engine) as connection:
            return self._one(connection, key_id, tenant_id)

    def _one(self, connection: Connection, key_id: str, tenant_id: str) -> ApiKey:
        query = select(api_keys).where(api_keys.c.id == key_id, api_keys.c.tenant_id == tenant_id)
        row = connection.execute(query).mappings().first()
        if row is None:
            raise KeyNotFound(f"no key {key_id}", key_id=key_id)
        return _from_row(row)

    def authenticate(self, token: str) -> ApiKey | None:
        """Return the key of a token, or none when it is malformed, unknown, expired or revoked."""
        if not is_well_formed(token):
            return None
        digest = self._hash(token)
        with read(self._engine) as connection:
            row = self._by_hash.row(connection, {"digest": digest})
        if row is None or not hmac.compare_digest(row["hash"], digest):
            return None
        key = _from_row(row)
        if key.last_used_at is None or row["now"] - key.last_used_at >= _USE_RESOLUTION_MS:
            # Once a minute is exact enough, and spares a write on every request.
            with write(self._engine) as connection:
                connection.execute(update(api_keys).where(api_keys.c.id == key.id).values(last_used_at=row["now"]))
        return key

    @cached_property
    def _by_hash(self) -> Prepared:
        now = now_ms(self._engine.dialect)
        return Prepared(
            select(api_keys, now.label("now")).where(
                api_keys.c.hash == bindparam("digest"),
                api_keys.c.revoked_at.is_(None),
                or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now),
            )
        )

    def revoke(self, key_id: str, tenant_id: str, *, actor: str = "operator") -> bool:
        """Refuse a key from now on; return whether the tenant had it and it was valid until now."""
        statement = (
            update(api_keys)
            .where(api_keys.c.id == key_id, api_keys.c.tenant_id == tenant_id, api_keys.c.revoked_at.is_(None))
            .values(revoked_at=now_ms(self._engine.dialect))
            .returning(api_keys)
        )
        with write(self._engine) as connection:
            row = connection.execute(statement).mappings().first()
            if row is None:
                return False
            _audit(connection, _from_row(row), actor, "key.revoked", {})
        return True

    def list(self, tenant_id: str) -> list[ApiKey]:
        """Return a tenant's keys, oldest first, revoked ones too."""
        query = select(api_keys).where(api_keys.c.tenant_id == tenant_id).order_by(api_keys.c.id)
        with read(self._engine) as connection:
            return [_from_row(row) for row in connection.execute(query).mappings()]

    def page(self, tenant_id: str, *, limit: int, before: tuple[int, str] | None = None) -> Sequence[ApiKey]:
        """Return a tenant's keys, newest first; `before` is (created_at, id) of the last one on the page before."""
        order = tuple_(api_keys.c.created_at, api_keys.c.id)
        query = select(api_keys).where(api_keys.c.tenant_id == tenant_id)
        if before is not None:
            query = query.where(order < tuple_(*before))
        query = query.order_by(api_keys.c.created_at.desc(), api_keys.c.id.desc()).limit(limit)
        with read(self._engine) as connection:
            return [_from_row(row) for row in connection.execute(query).mappings()]

    def _hash(self, token: str) -> str:
        return hmac.new(self._pepper, token.encode(), hashlib.sha256).hexdigest()


def new_token() -> str:
    """Return a fresh token: prefix, 256 random bits in base 62, and their CRC-32, which secret scanners can check."""
    body = _base62(secrets.randbits(8 * _RANDOM_BYTES), _RANDOM_CHARS)
    return TOKEN_PREFIX + body + _checksum(body)


def is_well_formed(token: str) -> bool:
    """Whether a text could be a token of ours: right prefix, length, characters and checksum."""
    match = _TOKEN.fullmatch(token)
    return match is not None and _checksum(match[1]) == match[2]


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CRC_CHARS)


def _base62(number: int, width: int) -> str:
    digits = []
    for _ in range(width):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))


def _sooner(a: ColumnElement[int] | None, b: int | None) -> ColumnElement[int] | int | None:
    """Return the earlier of two times; none is never."""
    if a is None or b is None:
        return b if a is None else a
    return case((a < b, a), else_=b)


def _audit(connection: Connection, key: ApiKey, actor: str, action: str, data: dict[str, Any]) -> None:
    audit.record(connection, tenant_id=key.tenant_id, actor=actor, action=action, target=key.id, data=data)


def _from_row(row: RowMapping | Row) -> ApiKey:
    values = {item.name: row[item.name] for item in fields(ApiKey)}
    return ApiKey(**{**values, "scopes": frozenset(row["scopes"])})
