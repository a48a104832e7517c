from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from corolla.cli.logs import Logfmt, LogLevel, set_up


def line(message: str, *args: object, **extra: object) -> str:
    record = logging.makeLogRecord(
        {"name": "corolla.test", "levelno": logging.WARNING, "msg": message, "args": args, "created": 0.5, **extra}
    )
    record.msecs = 500
    return Logfmt().format(record)


def test_a_line_has_time_level_logger_message_and_the_extras() -> None:
    expected = 'time=1970-01-01T00:00:00.500Z level=warning logger=corolla.test message="server is left for 10 s" session=s1 peer=Qm1'
    assert line("server is left for %d s", 10, session="s1", peer="Qm1") == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a b", '"a b"'),
        ('"', r'"\""'),
        ("a=b", '"a=b"'),
        ("a\nlevel=error", r'"a\nlevel=error"'),
        ("", '""'),
        ("\x1b[31m", r'"\u001b[31m"'),
        (3, "3"),
        ("é", "é"),
        ("\x9b1m", r'"\u009b1m"'),
    ],
)
def test_a_value_stays_one_value_on_one_line(value: object, shown: str) -> None:
    assert line("m", peer=value).endswith(f" message=m peer={shown}")


def test_an_exception_is_part_of_its_line() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        text = line("failed", exc_info=sys.exc_info())
    assert "\n" not in text
    assert 'ValueError: bad"' in text


def test_lines_go_to_what_standard_error_is_then(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(LogLevel.INFO, swarm=False)
    monkeypatch.setattr("sys.stderr", stream := io.StringIO())
    logging.getLogger("corolla.test").info("here", extra={"session": "s1"})
    assert stream.getvalue().endswith(" level=info logger=corolla.test message=here session=s1\n")


@pytest.mark.parametrize(
    ("level", "seen"), [(LogLevel.WARNING, ["b", "d"]), (LogLevel.INFO, ["a", "b", "d"]), (LogLevel.DEBUG, ["a", "b", "c", "d"])]
)
def test_hiveminds_loggers_speak_in_the_same_form_and_only_warn(level: LogLevel, seen: list[str]) -> None:
    code = (
        "import logging; from corolla.cli.logs import LogLevel, set_up\n"
        f"set_up(LogLevel({level.value!r}), swarm=True)\n"
        "logging.getLogger('hivemind').setLevel('WARNING')\n"
        "logging.getLogger('corolla.a').info('a'); logging.getLogger('corolla.b').warning('b')\n"
        "logging.getLogger('hivemind.dht.dht').debug('c'); logging.getLogger('hivemind.p2p.x').warning('d')\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if "message=" in line]
    assert [line.rpartition("message=")[2] for line in lines] == seen
