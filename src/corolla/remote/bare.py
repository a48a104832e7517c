"""A model without its head: embeddings, soft prompts and the final norm here, the blocks elsewhere.

Legend: S sequences, N columns, P soft tokens, E hidden, B blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from corolla.errors import InvalidSetting
from corolla.models.families import architecture
from corolla.remote.base import Distributed
from corolla.remote.cache import RemoteCache
from corolla.remote.prompts import SoftPrompts
from corolla.remote.sequential import RemoteSequential


class DistributedModel(Distributed):
    """A base model, without a head, mixed into transformers' class of its family."""

    prompts: SoftPrompts | None

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            super().__init__(config)
        with torch.device("cpu"):  # its rotations are numbers
            self._names = names = architecture(config).names
        for name in [name for name, _ in self.named_children()]:
            if name not in (names.embedding, names.embedding_norm, names.final_norm):
                delattr(self, name)  # what blocks need, the servers have
        embedding: Any = self.get_input_embeddings()
        if hasattr(embedding, "embed_scale"):  # Gemma's, which is in no checkpoint
            embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device="cpu")
        self.prompts = None

    @property
    def blocks(self) -> RemoteSequential:
        """All of the model's blocks."""
        blocks: RemoteSequential = getattr(self, self._names.blocks)
        return blocks

    def entering(self, embeddings: torch.Tensor) -> torch.Tensor:
        """What enters the first block, of what the embedding gives [S, N, E]."""
        norm = self._names.embedding_norm
        return embeddings if norm is None else getattr(self, norm)(embeddings)

    def leaving(self, hidden: torch.Tensor) -> torch.Tensor:
        """What enters the head, of what leaves the last block [S, N, E]: the final norm."""
        normed: torch.Tensor = getattr(self, self._names.final_norm)(hidden)
        return normed

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RemoteCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        soft_outputs: bool = False,
        **ignored: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As transformers', with `past_key_values` a `RemoteCache`. Positions count the columns that are no padding, as the
        attention mask [S, N] says: other `position_ids` are refused.

        Soft prompts stand in front of a new session, and of every input without one; the output leaves them out,
        unless `soft_outputs` asks for their rows too: the last of them predicts the first token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidSetting("input_ids", "give them or inputs_embeds, and not both")
        if past_key_values is not None and not isinstance(past_key_values, RemoteCache):
            raise InvalidSetting("past_key_values", "caches lie at the servers: generate with model.generate(..., session=...)")
        embeddings = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        _check_positions(position_ids, attention_mask, past_key_values, embeddings.shape[1])
        session = None if past_key_values is None else past_key_values.session
        if session is not None and attention_mask is not None:
            attention_mask = attention_mask[:, -embeddings.shape[1] :]
        if past_key_values is not None and session is not None and 0 < session.sequences < len(embeddings):
            past_key_values.batch_repeat_interleave(len(embeddings) // session.sequences)  # beams begin
        width, deep = 0, None if self.prompts is None else self.prompts.deep
        if self.prompts is not None and (session is None or not session.position):
            width = len(self.prompts)
            soft = self.prompts.tokens.to(embeddings).expand(len(embeddings), -1, -1)
            embeddings = torch.cat([soft, embeddings], 1)
            if attention_mask is not None:
                attention_mask = torch.cat([attention_mask.new_ones(len(embeddings), width), attention_mask], 1)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden = self.entering(embeddings)
        between: list[torch.Tensor] = []
        if session is not None:
            if output_hidden_states:
                raise InvalidSetting("output_hidden_states", "a session gives the last block's only: pass use_cache=False for all of them")
            hidden = session.step(hidden, attention_mask)
        elif output_hidden_states:
            for index, block in enumerate(self.blocks):
                between.append(hidden)
                hidden = block(hidden, prompts=None if deep is None else deep[index : index + 1], attention_mask=attention_mask)
        else:
            hidden = self.blocks(hidden, prompts=deep, attention_mask=attention_mask)
        hidden = self.leaving(hidden)[:, 0 if soft_outputs else width :]
        states = (*(each[:, width:] for each in between), hidden) if output_hidden_states else None
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=states)


def _check_positions(positions: torch.Tensor | None, mask: torch.Tensor | None, cache: RemoteCache | None, columns: int) -> None:
    """Raises `InvalidSetting` for positions that do not count the columns that are no padding."""
    if positions is None:
        return
    past = 0 if cache is None else cache.get_seq_length()
    if mask is None:
        right = positions == torch.arange(past, past + columns, device=positions.device)
    else:
        kept = mask.to(positions.device)
        right = (positions == (kept.long().cumsum(1) - 1)[:, -columns:]) | (kept[:, -columns:] == 0)
    if not bool(right.all()):
        raise InvalidSetting("position_ids", "blocks count positions by the attention mask: leave position_ids out")
