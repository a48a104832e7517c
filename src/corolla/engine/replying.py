"""What an engine answers when a session's rows are computed: hidden states or a token, that it is cached, or that it failed."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from corolla.engine.counters import Counters
from corolla.engine.pages import PagePool
from corolla.engine.sampler import Sampled
from corolla.engine.sequence import Conversation
from corolla.engine.sessions import Sessions
from corolla.engine.work import Work
from corolla.errors import CorollaError, ServerFault
from corolla.types import Cached, Failed, FinishReason, Hidden, Reply, Token


class Replying:
    """Args: `context_length`, at which an answer ends."""

    def __init__(self, sessions: Sessions, pool: PagePool, counters: Counters, context_length: int) -> None:
        self._sessions, self._pool, self._counters, self._context_length = sessions, pool, counters, context_length

    def reply(self, conversation: Conversation, work: Work, hidden: torch.Tensor, sampled: Sampled | None) -> None:
        """The work is computed: its rows left the last block as `hidden`, and a token was drawn after them if one was wanted."""
        count = work.rows.count
        self._counters.rows += count
        conversation.used = self._counters.steps
        self._pool.advance(conversation.table, count)
        if conversation.takes_hidden:
            assert conversation.hidden is not None, "rows were computed that nobody sent"
            conversation.hidden = conversation.hidden[count:]
        elif conversation.shares_prefixes:
            self._pool.publish(conversation.table, conversation.tokens, conversation.position)
        deliver = conversation.deliver
        assert deliver is not None, "an idle session was scheduled"
        if sampled is not None:
            deliver(self._token(conversation, sampled))
            return
        complete = conversation.pending == 0 and not conversation.more
        reply: Reply | None = None
        if conversation.gives_hidden:
            tokens = tuple(conversation.tokens[work.rows.start : work.rows.end])
            reply = Hidden(conversation.session, conversation.generation, work.rows.start, hidden, tokens, last=complete)
        elif complete:
            reply = Cached(conversation.session, conversation.generation, conversation.position)
        if complete and conversation.settings is None:
            self._sessions.rest(conversation)
        elif conversation.pending == 0:
            self._sessions.wait(conversation)
        if reply is not None:
            deliver(reply)

    def fail(self, conversations: Iterable[Conversation], error: BaseException) -> None:
        """The step broke: its sessions' caches cannot be trusted; their clients hold the history."""
        fault = error if isinstance(error, CorollaError) else ServerFault(f"the forward failed: {error}")
        for conversation in conversations:
            deliver = conversation.deliver
            self._sessions.forget(conversation)
            if deliver is not None:
                deliver(Failed(conversation.session, conversation.generation, fault))

    def _token(self, conversation: Conversation, sampled: Sampled) -> Token:
        """The sampled token, which also becomes the next row to compute (the ring, in one process) unless the answer ends."""
        settings = conversation.settings
        assert settings is not None, "a token was sampled for a step without settings"
        self._counters.sampled += 1
        conversation.sampled += 1
        position = conversation.position
        finish = None
        if sampled.token_id in settings.stop_token_ids:
            finish = FinishReason.STOP
        elif conversation.sampled >= settings.max_tokens_to_generate or position + 1 >= self._context_length:
            finish = FinishReason.LENGTH
        token = Token(
            conversation.session,
            conversation.generation,
            position,
            sampled.token_id,
            sampled.logprob,
            sampled.top_logprobs,
            finish,
        )
        if finish is None and conversation.span.start == 0:
            conversation.tokens.append(sampled.token_id)
        elif finish is None:
            self._sessions.wait(conversation)
        else:
            self._sessions.rest(conversation)
        return token
