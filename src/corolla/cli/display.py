"""An answer on the terminal while it is written, with its speed below."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from corolla.client.completion import CompletionResult

_REFRESH = 1 / 12  # seconds between two pictures


class AnswerDisplay:
    """Finished rows are printed for good; only the row being written and the speed are drawn again and again.

    So an answer of any length scrolls as usual and stays in the terminal's history.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._row = ""
        self._began = False
        self._tokens = 0
        self._first: float | None = None
        self._drawn = 0.0
        self._status = "reading..."

    def __enter__(self) -> AnswerDisplay:
        self._live.start()
        self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._commit()
            self._status = ""
            self._draw()
        self._live.stop()

    def add(self, text: str, tokens: int) -> None:
        """Show `text`, the work of so many `tokens`."""
        now = time.perf_counter()
        self._tokens += tokens
        self._first = self._first or now
        if not self._began:
            text = text.lstrip()
            self._began = bool(text)
        self._row += text
        if now - self._drawn >= _REFRESH:
            self._commit()
            elapsed = now - self._first
            self._status = f"{(self._tokens - 1) / elapsed:.1f} tokens/s" if elapsed else ""
            self._draw()

    def finish(self, result: CompletionResult | None, ending: str) -> None:
        """The last picture: the whole answer and its figures."""
        self._row = self._row.rstrip()
        self._commit()
        figures = []
        if result is not None:
            figures.append(f"{len(result.token_ids)} tokens")
            if result.timings.tokens_per_s is not None:
                figures.append(f"{result.timings.tokens_per_s:.1f} tokens/s")
            if result.timings.first_token_s is not None:
                figures.append(f"first after {result.timings.first_token_s:.2f} s")
        self._status = ", ".join(filter(None, [*figures, ending]))
        self._draw()

    def _commit(self) -> None:
        """Print every row that can no longer change."""
        *lines, last = self._row.split("\n")
        rows = Text(last).wrap(self._console, self._console.width)
        for line in [*map(Text, lines), *rows[:-1]]:
            self._live.console.print(line)
        blanks = last[len(last.rstrip()) :]  # wrapping drops those that overhang, and the next word needs them
        self._row = (rows[-1].plain.rstrip() if rows else "") + blanks

    def _draw(self) -> None:
        self._drawn = time.perf_counter()
        parts = [Text(self._row)] if self._row else []
        self._live.update(Group(*parts, Text(self._status, style="dim")), refresh=True)
