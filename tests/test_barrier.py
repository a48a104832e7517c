"""Barriers catch what nobody expected, once, loudly, and let interruptions pass."""

from __future__ import annotations

import asyncio
import logging

import pytest

from corolla.barrier import barrier, unexpected


def test_an_error_is_logged_counted_and_handed_on(caplog: pytest.LogCaptureFixture) -> None:
    before, came = unexpected["a test"], []
    with caplog.at_level(logging.ERROR), barrier("a test", came.append):
        raise IndexError("beyond")
    assert unexpected["a test"] == before + 1
    assert [type(error) for error in came] == [IndexError]
    assert "a test" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("passing", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_interruptions_pass(passing: type[BaseException]) -> None:
    with pytest.raises(passing), barrier("a test"):
        raise passing
