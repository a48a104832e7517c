"""What an engine answers when a session's rows are computed: hidden states or a token, that it is cached, or that it failed."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterable

import msgspec
import torch

from corolla.barrier import barrier
from corolla.engine.batch import ScheduledSequence
from corolla.engine.counters import EngineCounters
from corolla.engine.page_pool import PagePool
from corolla.engine.sampler import Sampled
from corolla.engine.sequence import Deliver, Sequence
from corolla.engine.sessions import Sessions
from corolla.engine.speculation import Guess
from corolla.errors import CorollaError, ServerFault
from corolla.messages import Cached, Reply, Token
from corolla.types import Failed, FinishReason, Hidden


def tell(deliver: Deliver, reply: Reply) -> None:
    """Deliver a session's last reply. There is nobody to tell where that fails."""
    with barrier("a session's last reply"):
        deliver(reply)


class OutputProcessor:
    """Args: `context_length`, at which an answer ends; `guess`, what may follow a token."""

    def __init__(self, sessions: Sessions, pool: PagePool, counters: EngineCounters, context_length: int, guess: Guess) -> None:
        self._sessions, self._pool, self._counters = sessions, pool, counters
        self._context_length, self._guess = context_length, guess

    def reply(self, sequence: Sequence, work: ScheduledSequence, hidden: torch.Tensor, sampled: abc.Sequence[Sampled], drafts: int) -> None:
        """The work is computed: its rows left the last block as `hidden`. `sampled` are the tokens drawn after them, if any were
        wanted; `drafts` more may be guessed."""
        count = work.rows.count
        self._counters.rows += count
        sequence.used = self._counters.steps
        tokens = self._tokens(sequence, work, sampled)
        sequence.rejected = work.logits - len(tokens)
        self._pool.advance(sequence.table, count - sequence.rejected)
        if sequence.takes_hidden:
            assert sequence.hidden is not None, "rows were computed that nobody sent"
            sequence.hidden = sequence.hidden[count:]
        elif sequence.shares_prefixes:
            self._pool.publish(sequence.table, sequence.tokens, sequence.position)
        deliver = sequence.deliver
        assert deliver is not None, "an idle session was scheduled"
        if tokens:
            self._answer(sequence, tokens, drafts)
            return
        complete = sequence.pending == 0 and not sequence.more
        reply: Reply | None = None
        if sequence.gives_hidden:
            ids = tuple(sequence.tokens[work.rows.start : work.rows.end])
            reply = Hidden(
                sequence.session,
                sequence.generation,
                work.rows.start,
                hidden,
                ids,
                last=complete,
                drafts=sequence.drafts if complete else 0,
            )
        elif complete:
            reply = Cached(sequence.session, sequence.generation, sequence.position)
        if complete and sequence.settings is None:
            self._sessions.finish(sequence)
        elif sequence.pending == 0:
            self._sessions.pause(sequence)
        if reply is not None:
            deliver(reply)

    def fail(self, sequences: Iterable[Sequence], error: Exception) -> None:
        """The step broke: its sessions' caches cannot be trusted; their clients hold the history."""
        fault = error if isinstance(error, CorollaError) else ServerFault(f"the step failed: {error!r}")
        for sequence in sequences:
            if sequence.deliver is not None:
                tell(sequence.deliver, Failed(sequence.session, sequence.generation, fault))
            self._sessions.forget(sequence)

    def _tokens(self, sequence: Sequence, work: ScheduledSequence, sampled: abc.Sequence[Sampled]) -> list[Token]:
        """The tokens of a step, as far as the answer goes on: the first, and those that had been guessed."""
        settings = sequence.settings
        tokens: list[Token] = []
        for position, drawn in enumerate(sampled, work.rows.end - work.logits + 1):
            assert settings is not None, "a token was sampled for a step without settings"
            finish = None
            if drawn.token_id in settings.stop_token_ids:
                finish = FinishReason.STOP
            elif sequence.sampled + len(tokens) + 1 >= settings.max_tokens_to_generate or position + 1 >= self._context_length:
                finish = FinishReason.LENGTH
            more = finish is None and len(tokens) + 1 < len(sampled)
            tokens.append(
                Token(
                    sequence.session,
                    sequence.generation,
                    position,
                    drawn.token_id,
                    drawn.logprob,
                    drawn.top_logprobs,
                    finish,
                    more=more,
                )
            )
            if finish is not None:
                break
        return tokens

    def _answer(self, sequence: Sequence, tokens: abc.Sequence[Token], drafts: int) -> None:
        """Deliver a step's tokens. The last of them also becomes the next row to compute (the ring, in one process), with guesses of
        what follows it, unless the answer ends."""
        self._counters.sampled += len(tokens)
        self._counters.drafts_kept += len(tokens) - 1
        sequence.sampled += len(tokens)
        *before, last = tokens
        deliver = sequence.deliver
        assert deliver is not None, "an idle session was scheduled"
        assert sequence.settings is not None, "a token was sampled for a step without settings"
        for token in before:
            deliver(token)
        if last.finish is not None:
            self._sessions.finish(sequence)
        else:
            self._sessions.pause(sequence)  # without the guesses that were wrong
            left = sequence.settings.max_tokens_to_generate - sequence.sampled - 1
            room = self._context_length - last.position - 2
            if (most := min(drafts, left, room)) > 0:
                last = msgspec.structs.replace(last, drafts=self._guess(sequence.history, last.token_id, most)[:most])
            self._counters.drafted += len(last.drafts)
            if sequence.span.start == 0:
                sequence.tokens += (last.token_id, *last.drafts)
                sequence.drafts = len(last.drafts)
        deliver(last)
