"""From a stream of tokens to a stream of text: incremental decoding and stop sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 6  # tokens before the first one that decide on its leading space; more change nothing
_INCOMPLETE = "\ufffd"  # what decoders put for bytes that are no whole character (yet)


class Detokenizer:
    """Decodes token by token so that the pieces join to the text of all of them.

    A piece is the difference of two decodings that start at the same earlier token, because decoders treat the first token
    of a text differently (a leading space is dropped). Bytes of an incomplete character are held back.
    `context` are the tokens before the first one (only the last few count).
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        start = max(0, len(context) - _CONTEXT)
        while start and decode(context[start:]).startswith(_INCOMPLETE):
            start -= 1  # a window must not begin inside a character
        self._tokens = list(context[start:])
        self._read = len(self._tokens)  # tokens whose text is out

    @property
    def settled(self) -> bool:
        """Whether nothing is held back."""
        return self._read == len(self._tokens)

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._tokens.append(token_id)
        piece = self._pending()
        if piece.endswith(_INCOMPLETE):
            return ""
        self._settle(piece)
        return piece

    def flush(self) -> str:
        """What is held back, at the end of the text: an incomplete character is U+FFFD."""
        piece = self._pending()
        self._settle(piece)
        return piece

    def _pending(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._read])) :]

    def _settle(self, piece: str) -> None:
        if piece:  # the window begins where a piece began; tokens without text (special ones) cannot open it
            del self._tokens[: self._read]
        self._read = len(self._tokens)


class StopMatcher:
    """Lets text through up to the earliest stop sequence, wherever the pieces are cut.

    Text that may yet become a stop sequence is held back. `stopped` tells that one was found; it and what follows never come out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that can no longer belong to a stop sequence."""
        if self.stopped:
            return ""
        self._held += text
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=len(self._held))
        maybe = min(map(self._partial, self._stops), default=len(self._held))
        # A match waits as long as a stop sequence that begins before it is still possible.
        self.stopped = found < len(self._held) and found <= maybe
        return self._release(min(found, maybe))

    def flush(self) -> str:
        """At the end of the text: what was held back and became no stop sequence."""
        found = min((at for stop in self._stops if (at := self._held.find(stop)) >= 0), default=len(self._held))
        self.stopped = self.stopped or found < len(self._held)
        piece = self._release(found)
        self._held = ""
        return piece

    def _partial(self, stop: str) -> int:
        """Where the held text ends in the beginning of `stop`; the length of the held text if nowhere."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return len(self._held) - length
        return len(self._held)

    def _release(self, end: int) -> str:
        piece, self._held = self._held[:end], "" if self.stopped else self._held[end:]
        return piece
