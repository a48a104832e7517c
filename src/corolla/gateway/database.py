"""The gateway's database: tables, migrations and the threads that speak to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from corolla.errors import InvalidSetting, StorageError

Result = TypeVar("Result")

metadata = MetaData()

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),  # SHA-256 of the key, which is 256 random bits: no salt is needed
    Column("hint", String(16), nullable=False),  # its first characters, for people who have several
    Column("rate", Float),  # requests a minute; null is unlimited
    Column("created", Float, nullable=False),  # unix time, as all times here
    Column("revoked", Float),
)

logins = Table(
    "logins",
    metadata,
    Column("hash", String(64), primary_key=True),  # SHA-256 of the cookie
    Column("key", String(32), ForeignKey("keys.id", ondelete="CASCADE"), nullable=False),
    Column("expires", Float, nullable=False),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("owner", String(32), nullable=False),  # a key's id; empty where the gateway is open
    Column("title", String(200), nullable=False),
    Column("model", String(200)),
    Column("system", Text),
    Column("template", String(64)),
    Column("prompt", String(200)),
    Column("settings", JSON, nullable=False),
    Column("leaf", String(32)),
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Index("conversations_by_owner", "owner", "updated"),
)

messages = Table(
    "messages",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),  # the order they were written in
    Column("id", String(32), nullable=False, unique=True),
    Column("conversation", String(32), ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("parent", String(32)),
    Column("role", String(16), nullable=False),
    Column("text", Text, nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("finish", String(16)),
    Column("stats", JSON),
    Column("error", Text),
    Column("notices", JSON, nullable=False),
    Column("created", Float, nullable=False),
)


class Database:
    """A database that any SQLAlchemy URL names, brought up to date when it is opened.

    Raises `InvalidSetting` for a URL that names none, `StorageError` when it cannot be opened.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="corolla-database")
        try:
            _migrate(self.engine)
        except SQLAlchemyError as error:
            raise StorageError(f"the database {self.engine.url!r} cannot be opened: {error}") from None

    async def run(self, work: Callable[[Connection], Result]) -> Result:
        """One transaction, beside the event loop. Raises `StorageError`."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.now, work)

    def now(self, work: Callable[[Connection], Result]) -> Result:
        """One transaction, on this thread. Raises `StorageError`."""
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise StorageError(f"the database {self.engine.url!r} does not answer: {error}") from None

    def close(self) -> None:
        """Wait for what is under way, and leave."""
        self._threads.shutdown(wait=True)
        self.engine.dispose()


def default_url() -> str:
    """A file below $XDG_DATA_HOME/corolla, else ~/.local/share/corolla."""
    shared = os.environ.get("XDG_DATA_HOME")
    directory = (Path(shared) if shared else Path.home() / ".local" / "share") / "corolla"
    return f"sqlite:///{directory / 'gateway.sqlite'}"


def _engine(url: str) -> Engine:
    if "://" not in url:
        url = f"sqlite:///{url}"  # a file
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        engine = create_engine(parsed)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InvalidSetting("database", f"{url!r} cannot be used ({error}); give a file, or a URL as SQLAlchemy takes it") from None
    except OSError as error:
        raise StorageError(f"the database's directory cannot be made: {error}") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _set_up_sqlite(connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _migrate(engine: Engine) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
