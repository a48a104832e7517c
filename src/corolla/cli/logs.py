"""Logs as lines of `key=value` on standard error (logfmt): for people, `grep` and whatever collects a service's logs."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import time
from enum import StrEnum
from typing import TextIO

from corolla.errors import InvalidSetting

_NAMES = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error", logging.CRITICAL: "critical"}
# What every record has, and what only says when hivemind's daemon wrote it.
_OWN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName", "origin_created"}
_BARE = re.compile(r"[^\s\"=]+")
_HIVEMIND = ("hivemind.dht", "hivemind.p2p")
_NOISE = "use of closed network connection"  # libp2p's daemon calls it an error whenever it ends


class LogLevel(StrEnum):
    """The least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Logfmt(logging.Formatter):
    """One line a record: time (UTC), level, logger, message, then whatever `extra={...}` the record carries, as session and peer."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": _NAMES.get(record.levelno, record.levelno),
            "logger": record.name,
            "message": record.getMessage(),
            **{key: value for key, value in record.__dict__.items() if key not in _OWN},
        }
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        return " ".join(f"{key}={_value(value)}" for key, value in fields.items())


class _StandardError(logging.StreamHandler):
    """Writes to what standard error is at that moment, for a progress bar puts something else in its place."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def set_up(level: LogLevel, *, swarm: bool) -> None:
    """Log to standard error from now on, in this process and those that it forks.

    hivemind's own loggers stay at warning unless debug is asked for; `swarm` says whether it is going to be imported. Raises
    `InvalidSetting` where it is not installed.
    """
    handler = _StandardError()
    handler.setFormatter(Logfmt())
    handler.addFilter(lambda record: level is LogLevel.DEBUG or _NOISE not in record.getMessage())
    root = logging.getLogger()
    root.handlers = [handler]
    logging.getLogger("corolla").setLevel(level.upper())
    if swarm:
        if importlib.util.find_spec("hivemind") is None:
            raise InvalidSetting("swarm", "hivemind, which carries it, is not installed: pip install hivemind (there is none for Windows)")
        from hivemind.utils.logging import use_hivemind_log_handler

        use_hivemind_log_handler("nowhere")  # its records come to the handler above
        for name in _HIVEMIND:
            logging.getLogger(name).setLevel(logging.DEBUG if level is LogLevel.DEBUG else logging.WARNING)


def _value(value: object) -> str:
    """As it is where that is unambiguous, else as a JSON string: a line stays a line, whatever a peer's name contains."""
    text = str(value)
    if _BARE.fullmatch(text) and text.isprintable():
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
