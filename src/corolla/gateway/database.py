"""The gateway's database: tables, migrations and the threads that speak to it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from alembic.util.exc import CommandError
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
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    NoSuchModuleError,
    NotSupportedError,
    ProgrammingError,
    SQLAlchemyError,
)

from corolla.errors import InvalidSetting, StorageError

Result = TypeVar("Result")
_MOST_SAID = 200  # characters of a database's own words

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
    Column("writer", String(32)),  # the gateway that writes it, or wrote it
)

gateways = Table(
    "gateways",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("seen", Float, nullable=False),  # what was being written by one that was not seen for a while is interrupted
)


class Database:
    """A database that any SQLAlchemy URL names, brought up to date when it is opened.

    Raises `InvalidSetting` for a URL that names none, `StorageError` when it cannot be opened.
    """

    def __init__(self, url: str, *, patience: float = 5.0) -> None:
        """`patience` are seconds that SQLite waits for another process's lock."""
        self.engine = _engine(url, patience)
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="corolla-database")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="corolla-database-writer")  # where it is locked, readers go on
        try:
            _migrate(self.engine)
        except SQLAlchemyError as error:
            raise StorageError(f"the database {self.engine.url!r} cannot be opened: {_reason(error)}") from None
        except CommandError as error:
            raise StorageError(f"the database {self.engine.url!r} is another version's: bring Corolla up to date ({error})") from None

    async def read(self, work: Callable[[Connection], Result]) -> Result:
        """One transaction that changes nothing, beside the event loop. Raises `StorageError`."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self.now, work)

    async def write(self, work: Callable[[Connection], Result]) -> Result:
        """One transaction after the other, beside the event loop. Raises `StorageError`."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, self.now, work)

    def now(self, work: Callable[[Connection], Result]) -> Result:
        """One transaction, on this thread. Raises `StorageError`."""
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except SQLAlchemyError as error:
            raise StorageError(f"the database {self.engine.url!r} does not answer: {_reason(error)}") from None

    def close(self) -> None:
        """Wait for what is under way, and leave."""
        self._readers.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self.engine.dispose()


def default_url() -> str:
    """A file below $XDG_DATA_HOME/corolla, else ~/.local/share/corolla."""
    shared = os.environ.get("XDG_DATA_HOME")
    directory = (Path(shared) if shared else Path.home() / ".local" / "share") / "corolla"
    return f"sqlite:///{directory / 'gateway.sqlite'}"


def _engine(url: str, patience: float) -> Engine:
    if "://" not in url:
        url = f"sqlite:///{url}"  # a file
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database and parsed.database != ":memory:":
            _make_private(Path(parsed.database))
        engine = create_engine(parsed, hide_parameters=True)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InvalidSetting("database", f"{url!r} cannot be used ({error}); give a file, or a URL as SQLAlchemy takes it") from None
    except OSError as error:
        raise StorageError(f"the database's file cannot be made: {error}") from None
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", partial(_set_up_sqlite, round(patience * 1000)))
    return engine


def _make_private(file: Path) -> None:
    """Conversations are in it: nobody else reads it, nor what SQLite writes beside it."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    for each in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm", "-journal"))):
        with suppress(FileNotFoundError, PermissionError):  # of another user that shares it with this one
            each.chmod(0o600)


def _reason(error: SQLAlchemyError) -> str:
    """In words without the statement and its parameters: people's conversations are among them."""
    about_data = isinstance(error, (IntegrityError, DataError, ProgrammingError, NotSupportedError))
    if isinstance(error, DBAPIError) and not about_data and (lines := str(error.orig).splitlines()):
        return lines[0][:_MOST_SAID]
    return type(error).__name__


def _set_up_sqlite(patience_ms: int, connection: object, _: object) -> None:
    cursor = connection.cursor()  # type: ignore[attr-defined]
    for pragma in (f"busy_timeout={patience_ms}", "journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
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
