"""A database that is locked, shared by two gateways, or read by others: answers go on, and nothing of them is told."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from corolla.errors import StorageError
from corolla.gateway.conversations import Conversations
from corolla.gateway.database import Database
from corolla.gateway.keeping import Keeper
from tests.gateway.running import Running, TinySwarm, running
from tests.gateway.test_conversations import events, new

SECRET = "my bank PIN is 4711"


@contextmanager
def locked(file: Path) -> Iterator[sqlite3.Connection]:
    """As a backup tool, or another process in the middle of a long transaction."""
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other
        other.rollback()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "g.sqlite"


@pytest.fixture
def database(file: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{file}", patience=0)
    yield database
    database.close()


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO messages (id, text) VALUES (:text, :text)",  # a constraint
        "INSERT INTO nothing VALUES (:text)",  # no such table
        "SELECT :text FROM",  # no SQL
        "SELECT :other",  # a parameter that is missing
    ],
)
def test_no_error_has_sql_or_its_parameters(database: Database, statement: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StorageError) as raised:
        database.now(lambda connection: connection.execute(text(statement), {"text": SECRET}))
    log = logging.getLogger("corolla.test")
    log.error("as a barrier logs it", exc_info=raised.value)
    for said in (str(raised.value), repr(raised.value), caplog.text):
        assert "4711" not in said
        assert "INSERT" not in said
        assert "SELECT" not in said


def test_a_locked_database_says_so_and_nothing_else(file: Path, database: Database) -> None:
    with locked(file), pytest.raises(StorageError, match=r"does not answer: database is locked$") as raised:
        database.now(lambda connection: connection.execute(text("DELETE FROM messages WHERE text = :text"), {"text": SECRET}))
    assert "4711" not in repr(raised.value)


def test_its_files_are_private(file: Path) -> None:
    before = os.umask(0)
    try:
        database = Database(str(file))
        database.now(lambda connection: connection.execute(text("DELETE FROM messages")))
        made = {each.name: stat.S_IMODE(each.stat().st_mode) for each in file.parent.iterdir()}
        database.close()
        file.chmod(0o644)  # as an earlier version left it
        Database(str(file)).close()
    finally:
        os.umask(before)
    assert set(made) >= {"g.sqlite", "g.sqlite-wal", "g.sqlite-shm"}
    assert set(made.values()) == {0o600}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_database_of_a_later_version_is_named(file: Path, database: Database) -> None:
    database.now(lambda connection: connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StorageError, match="bring Corolla up to date"):
        Database(str(file))


def test_what_was_not_saved_is_saved_when_the_lock_is_gone(file: Path, database: Database) -> None:
    conversations = Conversations(database)
    keeper = Keeper(conversations)

    async def work() -> dict[str, Any]:
        made = await conversations.create("", {})
        _, answer = await conversations.add_question("", made["id"], None, "hello", at_leaf=False)
        await keeper.start()
        running = asyncio.create_task(keeper.run())
        with locked(file):
            keeper.put(answer["id"], {"text": "a"})
            saved = keeper.end(answer["id"], {"text": "ab", "state": "done"})
            while keeper.failure is None:
                await asyncio.sleep(0.01)
            assert not saved.done()
            assert (await conversations.message("", answer["id"]))["text"] == ""  # who reads goes on
        async with asyncio.timeout(60):
            await saved
        assert keeper.failure is None
        running.cancel()
        return await conversations.message("", answer["id"])

    message = asyncio.run(work())
    assert (message["text"], message["state"]) == ("ab", "done")


def test_an_answer_goes_on_over_a_locked_database_and_tells(swarm: TinySwarm, file: Path) -> None:
    with running(swarm, file) as gateway, gateway.client() as client:
        conversation = new(client)
        with swarm.held("first") as release:
            answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "hello"}).json()["answer"]["id"]
            with locked(file) as lock, client.stream("GET", f"/api/ui/messages/{answer}/events") as stream:
                release()
                heard = ""
                for line in stream.iter_lines():
                    heard += f"{line}\n"
                    if "not saved yet" in line:
                        assert "event: delta" in heard
                        assert client.get("/api/ui/conversations").status_code == 200
                        lock.rollback()
        assert '"state":"done"' in heard
        assert events(client, answer)[-1][1]["message"]["state"] == "done"
        assert client.get("/readyz").status_code == 200


@pytest.fixture
def two(swarm: TinySwarm, file: Path) -> Iterator[tuple[Running, Running]]:
    with running(swarm, file) as first, running(swarm, file) as second:
        yield first, second


def test_two_gateways_respect_one_anothers_answers(two: tuple[Running, Running], swarm: TinySwarm, file: Path) -> None:
    first, second = two
    with first.client() as client, second.client() as other, swarm.held("first") as release:
        conversation = new(client)
        answer = client.post(f"/api/ui/conversations/{conversation}/messages", json={"text": "hello"}).json()["answer"]["id"]
        with running(swarm, file) as third, third.client() as newcomer:
            message = newcomer.get(f"/api/ui/conversations/{conversation}").json()["messages"][1]
            assert message["state"] == "writing"  # it is not this one's to end
        assert other.post(f"/api/ui/messages/{answer}/stop", json={}).status_code == 409
        assert other.post(f"/api/ui/messages/{answer}/resume", json={}).status_code == 409
        with other.stream("GET", f"/api/ui/messages/{answer}/events") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "event: snapshot"
            release()
            *_, last = [line for line in lines if line.startswith("data: ")]
        assert json.loads(last.removeprefix("data: "))["message"] == events(client, answer)[-1][1]["message"]


def test_what_a_dead_gateway_wrote_is_interrupted_after_its_lease(database: Database) -> None:
    dead, alive = Conversations(database), Conversations(database)

    async def work() -> list[str]:
        made = await dead.create("", {})
        _, answer = await dead.add_question("", made["id"], None, "hello", at_leaf=False)
        await dead.keep_lease()
        await alive.keep_lease()
        states = [(await alive.message("", answer["id"]))["state"]]
        database.now(lambda connection: connection.exec_driver_sql(f"UPDATE gateways SET seen = 0 WHERE id = '{dead.writer}'"))
        await alive.keep_lease()
        states.append((await alive.message("", answer["id"]))["state"])
        await dead.save({answer["id"]: {"text": "it lived after all", "state": "done"}})
        states.append((await alive.message("", answer["id"]))["state"])
        return states

    assert asyncio.run(work()) == ["writing", "interrupted", "done"]


def test_an_answer_that_another_gateway_took_over_is_not_overwritten(database: Database) -> None:
    first, second = Conversations(database), Conversations(database)

    async def work() -> str:
        made = await first.create("", {})
        _, answer = await first.add_question("", made["id"], None, "hello", at_leaf=False)
        await first.save({answer["id"]: {"state": "stopped"}})
        await second.reopen("", answer["id"])
        await first.save({answer["id"]: {"text": "late"}})
        return str((await second.message("", answer["id"]))["text"])

    assert asyncio.run(work()) == ""
