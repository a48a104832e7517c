"""Answers are saved as they come: all that changed in one transaction, and again where the database does not answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from corolla.barrier import barrier
from corolla.errors import CorollaError, StorageError
from corolla.gateway.conversations import LEASE_SECONDS, Conversations

EVERY = 1.0  # seconds between two savings of an answer that goes on
_LONGEST_PAUSE = 8.0  # seconds, where the database does not answer
_MOST_UNSAVED = 10_000  # messages
_FAREWELL = 5.0  # seconds for the last ones when the gateway ends
log = logging.getLogger(__name__)


class Keeper:
    """Saves what it is given, the latest of each message. For one event loop; `run` is its task."""

    def __init__(self, conversations: Conversations) -> None:
        self._conversations = conversations
        self._unsaved: dict[str, dict[str, Any]] = {}
        self._saving: dict[str, asyncio.Future[None]] = {}  # who waits for an answer's end to be saved
        self._hurry = asyncio.Event()
        self._lease = 0.0
        self._pause = EVERY
        self.failure: str | None = None  # why the last attempt came to nothing

    def put(self, message: str, values: Mapping[str, Any]) -> None:
        """To be saved soon."""
        self._unsaved.setdefault(message, {}).update(values)
        if len(self._unsaved) > _MOST_UNSAVED:
            lost = next(iter(self._unsaved))
            del self._unsaved[lost]
            log.error("an answer is not saved, for the database does not answer", extra={"conversation_message": lost})

    def end(self, message: str, values: Mapping[str, Any]) -> asyncio.Future[None]:
        """To be saved at once; the future is done when it is. Cancelling it changes nothing."""
        self.put(message, values)
        self._hurry.set()
        return self._saving.setdefault(message, asyncio.get_running_loop().create_future())

    async def start(self) -> None:
        """Take the place of gateways that are gone. Raises `StorageError`."""
        await self._conversations.keep_lease()

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if self.failure is None:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), EVERY)
            else:
                self._pause = min(2 * self._pause, _LONGEST_PAUSE)
                await asyncio.sleep(self._pause)
            self._hurry.clear()
            with barrier("saving answers"):
                await self._save(lease=loop.time() > self._lease)

    async def close(self) -> None:
        """Save what is left, if the database answers soon."""
        with barrier("saving answers"), suppress(TimeoutError, StorageError):
            async with asyncio.timeout(_FAREWELL):
                await self._save(lease=False)
                await self._conversations.leave()

    async def _save(self, *, lease: bool) -> None:
        taken, self._unsaved = self._unsaved, {}
        try:
            if taken:
                await self._conversations.save(taken)
            if lease:
                await self._conversations.keep_lease()
                self._lease = asyncio.get_running_loop().time() + LEASE_SECONDS / 3
        except StorageError as error:
            self._unsaved = taken | {message: taken.get(message, {}) | values for message, values in self._unsaved.items()}
            if self.failure is None:
                log.warning("what comes is not saved until the database answers again: %s", error)
            self.failure = str(error)
            return
        if self.failure is not None:
            log.warning("the database answers again: all is saved")
        self.failure, self._pause = None, EVERY
        for message in taken.keys() & self._saving.keys():
            saved = self._saving.pop(message)
            if not saved.done():
                saved.set_result(None)


def lasting(error: CorollaError) -> str:
    """An error's sentence as it can be kept: a tokenizer's or a peer's words may be no valid Unicode."""
    return str(error).encode("utf-8", "replace").decode()
