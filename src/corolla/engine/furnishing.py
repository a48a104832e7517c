"""What a session's rows need beside themselves in a step: the rows of its soft prompt, and its adapter."""

from __future__ import annotations

from dataclasses import replace

from corolla.engine.adapters import AdapterStore
from corolla.engine.batch import ScheduledSequence
from corolla.engine.prompts import PromptStore, rows_of
from corolla.engine.sequence import Conversation
from corolla.errors import AdapterNeeded, PromptNeeded


def furnished(work: ScheduledSequence, conversation: Conversation, prompts: PromptStore, adapters: AdapterStore) -> ScheduledSequence:
    """Raises `PromptNeeded` or `AdapterNeeded` where one was forgotten since the step was admitted."""
    name = conversation.prompt
    if name is not None and conversation.needs_prompt:
        part = prompts.find(conversation.client, name, conversation.span, with_input=conversation.puts_in)
        if part is None:
            raise PromptNeeded
        work = replace(work, prompt=rows_of(part, work.rows.start, work.rows.count))
    if conversation.adapter:
        adapter = adapters.find(conversation.adapter, conversation.span)
        if adapter is None:
            raise AdapterNeeded
        work = replace(work, adapter=adapter)
    return work
