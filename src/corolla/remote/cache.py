"""An inference session in the place of transformers' cache: `generate` asks it how long it is, and reorders beams in it."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from corolla.remote.session import InferenceSession


class RemoteCache(Cache):
    """What `past_key_values` is for a distributed model; it holds no tensors, the servers do."""

    def __init__(self, session: InferenceSession) -> None:
        super().__init__(layers=[])
        self.session = session

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, soft tokens left out."""
        return max(0, self.session.position - self.session.prefix)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """See `InferenceSession.reorder`."""
        self.session.reorder(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See `InferenceSession.reorder`."""
        self.session.reorder(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence so many times, the copies side by side."""
        self.session.reorder([index for index in range(self.session.sequences) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Go back by so many columns; transformers names them as a negative number."""
        self.session.position -= abs(tokens_to_remove)
