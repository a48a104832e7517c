"""Conversations kept in the database: trees of messages, in which nothing that is done is ever changed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, insert, or_, select, update

from corolla.errors import CallerError, Conflict
from corolla.gateway.database import Database, conversations, gateways, messages
from corolla.gateway.fair_queue import FairQueue, QueueConfig

SETTABLE = ("title", "model", "system", "template", "prompt", "settings", "leaf")
ENDED = ("done", "stopped", "interrupted", "failed")
MOST_MESSAGES = 10_000  # of an imported conversation
LEASE_SECONDS = 15.0
_SEARCHES = QueueConfig(streams=2, waiting=64, waiting_of_one=8, retry_after=1.0)
_PAGE = 100  # messages
_AROUND_A_HIT = 60  # characters before and after what was searched for
_TITLE = 60  # characters


class NotFound(CallerError):
    """No such thing, or not the caller's."""

    status = 404

    def __init__(self, what: str) -> None:
        super().__init__(f"there is no such {what}, or it is not yours")


class Conversations:
    """All of them; every operation names the `owner` whose they are. Raises `NotFound` for another's, and `StorageError`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._searching = FairQueue(_SEARCHES)
        self.writer = uuid.uuid4().hex  # this gateway's name in the database

    @property
    def searches(self) -> int:
        """Under way."""
        return self._searching.active

    async def search(self, owner: str, query: str, limit: int, before: str | None) -> dict[str, Any]:
        """Titles and messages that contain `query`, the latest first; `before` is the last answer's `next`. Raises `Busy`."""
        found = select(conversations).where(conversations.c.owner == owner)
        if query:
            inside = exists().where(messages.c.conversation == conversations.c.id, messages.c.text.icontains(query, autoescape=True))
            found = found.where(or_(conversations.c.title.icontains(query, autoescape=True), inside))
        if before:
            when, _, last = before.partition("_")
            try:
                moment = float(when)
            except ValueError:
                raise CallerError(f"before: {before!r} is no answer's `next`") from None
            later = and_(conversations.c.updated == moment, conversations.c.id < last)
            found = found.where(or_(conversations.c.updated < moment, later))
        found = found.order_by(conversations.c.updated.desc(), conversations.c.id.desc()).limit(limit + 1)

        def work(connection: Connection) -> dict[str, Any]:
            rows = connection.execute(found).all()
            shown = rows[:limit]
            entries = [
                {
                    "id": row.id,
                    "title": row.title,
                    "model": row.model,
                    "created": iso(row.created),
                    "updated": iso(row.updated),
                    "found": None,
                }
                for row in shown
            ]
            for entry in entries if query else ():
                hit = select(messages.c.text).where(
                    messages.c.conversation == entry["id"], messages.c.text.icontains(query, autoescape=True)
                )
                text = connection.execute(hit.order_by(messages.c.number.desc()).limit(1)).scalar_one_or_none()
                entry["found"] = None if text is None else _around(text, query)
            more = len(rows) > limit
            return {"conversations": entries, "next": f"{shown[-1].updated!r}_{shown[-1].id}" if more else None}

        if not query:
            return await self._database.read(work)
        async with self._searching.place(owner):  # every message is read for it
            return await self._database.read(work)

    async def create(self, owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """A conversation without messages."""
        now = time.time()
        row = {
            "id": uuid.uuid4().hex,
            "owner": owner,
            "title": "",
            "settings": {},
            "created": now,
            "updated": now,
            **{name: values[name] for name in SETTABLE if name in values and name != "leaf"},
        }

        def work(connection: Connection) -> dict[str, Any]:
            connection.execute(insert(conversations).values(row))
            return _shown_conversation(_row(connection, owner, str(row["id"])))

        return await self._database.write(work)

    async def get(self, owner: str, conversation: str) -> dict[str, Any]:
        """A conversation as the page gets it, without its messages."""
        return await self._database.read(lambda connection: _shown_conversation(_row(connection, owner, conversation)))

    async def pages(self, conversation: str) -> AsyncIterator[list[dict[str, Any]]]:
        """Its messages in the order they were written, some at a time: all of them may be many megabytes."""
        last = 0
        while True:
            found = select(messages).where(messages.c.conversation == conversation, messages.c.number > last)
            rows = await self._database.read(
                lambda connection, found=found: connection.execute(found.order_by(messages.c.number).limit(_PAGE)).all()  # type: ignore[misc]
            )
            yield [shown_message(row) for row in rows]
            if len(rows) < _PAGE:
                return
            last = rows[-1].number

    async def change(self, owner: str, conversation: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Change what is `SETTABLE`."""

        def work(connection: Connection) -> None:
            _row(connection, owner, conversation)
            if values.get("leaf") is not None:
                _message_of(connection, conversation, values["leaf"])
            if values:
                connection.execute(update(conversations).where(conversations.c.id == conversation).values(dict(values)))

        await self._database.write(work)
        return await self.get(owner, conversation)

    async def delete(self, owner: str, conversation: str) -> list[str]:
        """Delete it with all its messages; returns their ids."""

        def work(connection: Connection) -> list[str]:
            _row(connection, owner, conversation)
            ids = list(connection.execute(select(messages.c.id).where(messages.c.conversation == conversation)).scalars())
            connection.execute(delete(messages).where(messages.c.conversation == conversation))
            connection.execute(delete(conversations).where(conversations.c.id == conversation))
            return ids

        return await self._database.write(work)

    async def import_one(self, owner: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """A conversation with its messages, under new ids; returned as `get` does. Raises `CallerError` for what is none."""
        rows, ids = await asyncio.to_thread(_imported, content["messages"])
        created = await self.create(owner, {name: content[name] for name in SETTABLE if content.get(name) is not None})
        leaf = ids.get(content.get("leaf") or "", rows[-1]["id"] if rows else None)

        def work(connection: Connection) -> None:
            if rows:
                connection.execute(insert(messages), [{**row, "conversation": created["id"]} for row in rows])
            connection.execute(update(conversations).where(conversations.c.id == created["id"]).values(leaf=leaf))

        await self._database.write(work)
        return {**created, "leaf": leaf}

    async def add_question(
        self, owner: str, conversation: str, parent: str | None, text: str, *, at_leaf: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A question and the answer that is going to be written; `at_leaf` puts it where the conversation stands."""

        def work(connection: Connection) -> tuple[dict[str, Any], dict[str, Any]]:
            row = _row(connection, owner, conversation)
            after = row.leaf if at_leaf else parent
            if after is not None:
                above = _message_of(connection, conversation, after)
                if above.role != "assistant":
                    raise Conflict("a question follows an answer: name an answer as its parent, or none")
                if above.state == "writing":
                    raise Conflict("the answer before it is still being written: wait for it, or stop it")
            question = _add(connection, conversation, after, "user", text, "done", None)
            answer = self._begin(connection, conversation, question["id"])
            title = row.title or _title(text)
            connection.execute(
                update(conversations).where(conversations.c.id == conversation).values(leaf=answer["id"], title=title, updated=time.time())
            )
            return question, answer

        return await self._database.write(work)

    async def add_answer(self, owner: str, message: str) -> tuple[str, dict[str, Any]]:
        """Another answer to a question, or beside an answer; returns the conversation's id and the answer."""

        def work(connection: Connection) -> tuple[str, dict[str, Any]]:
            row = _message(connection, owner, message)
            question = row.id if row.role == "user" else row.parent
            if question is None:
                raise Conflict("this answer stands at the beginning and answers no question")
            answer = self._begin(connection, row.conversation, question)
            connection.execute(
                update(conversations).where(conversations.c.id == row.conversation).values(leaf=answer["id"], updated=time.time())
            )
            return row.conversation, answer

        return await self._database.write(work)

    async def reopen(self, owner: str, message: str) -> tuple[str, dict[str, Any]]:
        """An answer that ended before its end is being written again. Raises `Conflict` for another."""

        def work(connection: Connection) -> tuple[str, dict[str, Any]]:
            row = _message(connection, owner, message)
            ended = ("interrupted", "stopped", "failed")
            changed = connection.execute(
                update(messages)
                .where(messages.c.id == message, messages.c.role == "assistant", messages.c.state.in_(ended))
                .values(state="writing", error=None, writer=self.writer)
            )
            if not changed.rowcount:
                raise Conflict("only an answer that was interrupted, stopped or failed can go on")
            connection.execute(
                update(conversations).where(conversations.c.id == row.conversation).values(leaf=message, updated=time.time())
            )
            return row.conversation, {**shown_message(row), "state": "writing", "error": None}

        return await self._database.write(work)

    async def message(self, owner: str, message: str) -> dict[str, Any]:
        """One message."""
        return await self._database.read(lambda connection: shown_message(_message(connection, owner, message)))

    async def check_writer(self, owner: str, message: str) -> None:
        """Raises `Conflict` where another gateway writes that answer."""
        row = await self._database.read(lambda connection: _message(connection, owner, message))
        if row.state == "writing" and row.writer != self.writer:
            raise Conflict("another gateway on the same database writes this answer: stop it there")

    async def branch(self, owner: str, conversation: str, message: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The conversation, and its messages from the beginning up to the one before `message`."""

        def work(connection: Connection) -> tuple[dict[str, Any], list[dict[str, Any]]]:
            row = _row(connection, owner, conversation)
            parent = _message_of(connection, conversation, message).parent
            path = select(messages).where(messages.c.id == parent, messages.c.conversation == conversation).cte("path", recursive=True)
            path = path.union(select(messages).where(messages.c.id == path.c.parent, messages.c.conversation == conversation))
            above = connection.execute(select(path).order_by(path.c.number)).all()  # a parent was written before what follows it
            return _shown_conversation(row), [shown_message(each) for each in above]

        return await self._database.read(work)

    async def save(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """What has come so far of answers that this gateway writes, or their end, by the message. All of them or none."""

        def work(connection: Connection) -> None:
            for message, values in answers.items():
                connection.execute(update(messages).where(messages.c.id == message, messages.c.writer == self.writer).values(dict(values)))

        await self._database.write(work)

    async def keep_lease(self) -> None:
        """This gateway lives. What was being written by one that was not seen for `LEASE_SECONDS` is interrupted."""

        def work(connection: Connection) -> None:
            now = time.time()
            if not connection.execute(update(gateways).where(gateways.c.id == self.writer).values(seen=now)).rowcount:
                connection.execute(insert(gateways).values(id=self.writer, seen=now))
            connection.execute(delete(gateways).where(gateways.c.seen < now - LEASE_SECONDS))
            _interrupt(connection, or_(messages.c.writer.is_(None), messages.c.writer.not_in(select(gateways.c.id))))

        await self._database.write(work)

    async def leave(self) -> None:
        """This gateway writes nothing any more."""

        def work(connection: Connection) -> None:
            connection.execute(delete(gateways).where(gateways.c.id == self.writer))
            _interrupt(connection, messages.c.writer == self.writer)

        await self._database.write(work)

    def _begin(self, connection: Connection, conversation: str, parent: str) -> dict[str, Any]:
        return _add(connection, conversation, parent, "assistant", "", "writing", self.writer)


def iso(moment: float) -> str:
    """A unix time in ISO 8601, UTC."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def shown_message(row: Row[Any]) -> dict[str, Any]:
    """A message as docs/api.md describes it."""
    return {
        "id": row.id,
        "parent": row.parent,
        "role": row.role,
        "text": row.text,
        "state": row.state,
        "created": iso(row.created),
        "finish": row.finish,
        "stats": row.stats,
        "error": row.error,
        "notices": row.notices,
    }


def _shown_conversation(row: Row[Any]) -> dict[str, Any]:
    names = ("id", "title", "model", "system", "template", "prompt", "settings", "leaf")
    return {**{name: getattr(row, name) for name in names}, "created": iso(row.created), "updated": iso(row.updated)}


def _row(connection: Connection, owner: str, conversation: str) -> Row[Any]:
    row = connection.execute(select(conversations).where(conversations.c.id == conversation, conversations.c.owner == owner)).one_or_none()
    if row is None:
        raise NotFound("conversation")
    return row


def _message(connection: Connection, owner: str, message: str) -> Row[Any]:
    found = select(messages).join(conversations, conversations.c.id == messages.c.conversation)
    row = connection.execute(found.where(messages.c.id == message, conversations.c.owner == owner)).one_or_none()
    if row is None:
        raise NotFound("message")
    return row


def _message_of(connection: Connection, conversation: str, message: str) -> Row[Any]:
    row = connection.execute(select(messages).where(messages.c.id == message, messages.c.conversation == conversation)).one_or_none()
    if row is None:
        raise NotFound("message")
    return row


def _interrupt(connection: Connection, which: ColumnElement[bool]) -> None:
    connection.execute(update(messages).where(messages.c.state == "writing", which).values(state="interrupted"))


def _add(
    connection: Connection, conversation: str, parent: str | None, role: str, text: str, state: str, writer: str | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": uuid.uuid4().hex,
        "conversation": conversation,
        "parent": parent,
        "role": role,
        "text": text,
        "state": state,
        "notices": [],
        "created": time.time(),
        "writer": writer,
    }
    connection.execute(insert(messages).values(row))
    return shown_message(connection.execute(select(messages).where(messages.c.id == row["id"])).one())


def _title(question: str) -> str:
    words = " ".join(question.split())
    return words if len(words) <= _TITLE else words[: _TITLE - 1].rsplit(" ", 1)[0] + "…"


def _around(text: str, query: str) -> str:
    at = max(0, text.lower().find(query.lower()))
    first, last = max(0, at - _AROUND_A_HIT), at + len(query) + _AROUND_A_HIT
    return ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")


def _imported(given: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of `messages`, and their new ids by those they were given. Raises `CallerError`."""
    ids = {message["id"]: uuid.uuid4().hex for message in given}
    if len(ids) != len(given) or len(given) > MOST_MESSAGES:
        raise CallerError(f"messages: each needs an id of its own, and there are at most {MOST_MESSAGES}")
    now = time.time()
    rows = []
    seen: set[str] = set()
    for message in given:
        parent = message.get("parent")
        if parent is not None and parent not in seen:
            raise CallerError(f"messages: the parent {parent!r} of {message['id']!r} does not come before it")
        seen.add(message["id"])
        state = message.get("state") or "done"
        rows.append(
            {
                "id": ids[message["id"]],
                "parent": None if parent is None else ids[parent],
                "role": message["role"],
                "text": message["text"],
                "state": state if state in ENDED else "interrupted",
                "finish": message.get("finish"),
                "stats": message.get("stats"),
                "error": message.get("error"),
                "notices": list(message.get("notices") or []),
                "created": now,
            }
        )
    return rows, ids


def turns(path: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(role, text) of a branch's messages, without answers that are empty."""
    return [(message["role"], message["text"]) for message in path if message["role"] == "user" or message["text"]]
