"""API keys and logins: made, found, listed and revoked. Only their hashes are kept."""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from corolla.errors import InvalidSetting, Unauthorized
from corolla.gateway.database import Database, keys, logins

PREFIX = "ck-"
LOGIN_SECONDS = 30 * 24 * 3600
_REMEMBERED = 2.0  # seconds that a key is believed without asking the database again: how long a revoked one may still work
_MOST_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: `id` is their key's, empty where the gateway is open; `rate` in requests a minute."""

    id: str = ""
    name: str = ""
    rate: float | None = None


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key as it is listed; times are unix time in seconds."""

    id: str
    name: str
    hint: str
    rate: float | None
    created: float
    revoked: float | None


class Keys:
    """The keys in a database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._remembered: dict[str, tuple[float, Caller]] = {}

    def create(self, name: str, rate: float | None = None) -> str:
        """A new key, shown this once. Raises `InvalidSetting` for a name that is taken or no name, and a rate below 1."""
        if not 0 < len(name) <= 64 or not name.isprintable():
            raise InvalidSetting("name", "give 1 to 64 printable characters")
        if rate is not None and rate < 1:
            raise InvalidSetting("rate", f"{rate:g} is not at least 1 request a minute")
        if any(entry.name == name and entry.revoked is None for entry in self.entries()):
            raise InvalidSetting("name", f"there is a key {name!r} already: revoke it, or choose another name")
        key = PREFIX + secrets.token_urlsafe(32)
        row = {"id": uuid.uuid4().hex, "name": name, "hash": _hash(key), "hint": key[:7], "rate": rate, "created": time.time()}
        self._database.now(lambda connection: connection.execute(insert(keys).values(row)))
        return key

    def entries(self) -> list[KeyEntry]:
        """All keys, the oldest first."""
        columns = [keys.c[name] for name in KeyEntry.__slots__]
        return [
            KeyEntry(*row)
            for row in self._database.now(lambda connection: connection.execute(select(*columns).order_by(keys.c.created)).all())
        ]

    def revoke(self, name: str) -> None:
        """No request with that key is answered from now on. Raises `InvalidSetting` where there is none."""
        entry = next((entry for entry in self.entries() if name in (entry.name, entry.id) and entry.revoked is None), None)
        if entry is None:
            raise InvalidSetting("name", f"there is no key {name!r}; `corolla keys list` shows them")

        def work(connection: Connection) -> None:
            connection.execute(update(keys).where(keys.c.id == entry.id).values(revoked=time.time()))
            connection.execute(delete(logins).where(logins.c.key == entry.id))

        self._database.now(work)

    def any(self) -> bool:
        """Whether there is a key that is not revoked."""
        return any(entry.revoked is None for entry in self.entries())

    async def caller(self, key: str) -> Caller | None:
        """Whose key it is, if anybody's."""
        return await self._find(_hash(key), login=False)

    async def logged_in(self, cookie: str) -> Caller | None:
        """Whose login it is, if anybody's."""
        return await self._find(_hash(cookie), login=True)

    async def log_in(self, key: str) -> str:
        """The cookie of a new login. Raises `Unauthorized` for what is no key."""
        caller = await self.caller(key)
        if caller is None:
            raise Unauthorized("that is no key of this gateway, or it was revoked")
        cookie = secrets.token_urlsafe(32)
        now = time.time()

        def work(connection: Connection) -> None:
            connection.execute(delete(logins).where(logins.c.expires < now))
            connection.execute(insert(logins).values(hash=_hash(cookie), key=caller.id, expires=now + LOGIN_SECONDS))

        await self._database.write(work)
        return cookie

    async def log_out(self, cookie: str) -> None:
        """The cookie is worth nothing any more."""
        self._remembered.pop(_hash(cookie), None)
        await self._database.write(lambda connection: connection.execute(delete(logins).where(logins.c.hash == _hash(cookie))))

    async def _find(self, digest: str, *, login: bool) -> Caller | None:
        now = time.monotonic()
        known = self._remembered.get(digest)
        if known is not None and now - known[0] < _REMEMBERED:
            return known[1]
        query = select(keys.c.id, keys.c.name, keys.c.rate).where(keys.c.revoked.is_(None))
        if login:
            query = query.join(logins).where(logins.c.hash == digest, logins.c.expires > time.time())
        else:
            query = query.where(keys.c.hash == digest)
        row = await self._database.read(lambda connection: connection.execute(query).one_or_none())
        if row is None:
            self._remembered.pop(digest, None)
            return None
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        caller = Caller(*row)
        self._remembered[digest] = now, caller
        return caller


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
