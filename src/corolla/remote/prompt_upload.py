"""Deep prompts as servers know them: sent to each once, under a name that tells their content, and named from then on.

Legend: B blocks, P soft tokens, E hidden.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from corolla.messages import Hop, WireMessage
from corolla.swarm.convert import from_prompt_part
from corolla.types import PromptName, PromptPart, Span

_REMEMBERED = 64  # of each server: while a prompt is trained, every step makes another one


class DeepPrompt:
    """The soft tokens [B, P, E] that are added at the inputs of the blocks from `start` on, in float32 and on the CPU."""

    def __init__(self, rows_BxPxE: torch.Tensor, start: int) -> None:
        self._rows = rows_BxPxE.detach().to("cpu", torch.float32).contiguous()
        self._start = start
        digest = hashlib.sha256(f"{start} {list(self._rows.shape)}".encode())
        digest.update(self._rows.numpy().data)
        self.name = PromptName(digest.hexdigest(), self.tokens, deep=True)

    @property
    def tokens(self) -> int:
        return self._rows.shape[1]

    def part(self, start: int, end: int) -> PromptPart:
        """What the server of the blocks `[start, end)` needs of it."""
        return PromptPart(self.name, Span(start, end), deep=self._rows[start - self._start : end - self._start])


class GivenPrompts:
    """Who has been sent which prompts. For any thread."""

    def __init__(self, send: Callable[[str, WireMessage], None]) -> None:
        self._send = send
        self._lock = threading.RLock()  # a peer may turn out to be gone while it is sent something
        self._sent: dict[str, OrderedDict[tuple[str, int, int], None]] = {}

    def give(self, prompt: DeepPrompt, hops: Iterable[Hop]) -> None:
        """Send the servers what they need of a prompt, unless they have been sent it. Raises `NetworkError` when the network is closed."""
        for hop in hops:
            key = prompt.name.name, hop.start, hop.end
            with self._lock:
                sent = self._sent.setdefault(hop.peer, OrderedDict())
                known = key in sent
                sent[key] = None
                sent.move_to_end(key)
                if len(sent) > _REMEMBERED:
                    sent.popitem(last=False)
                if not known:  # still locked: no other call may name the prompt before it is on its way
                    self._send(hop.peer, from_prompt_part(prompt.part(hop.start, hop.end)))

    def lose(self, peer: str) -> None:
        """The peer says that it lacks what it was sent, or is gone."""
        with self._lock:
            self._sent.pop(peer, None)
