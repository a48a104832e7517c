"""The naive executor: one session, stock transformers, contiguous cache. Slow, plain, and what the engine is tested against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


class Reference:
    """A whole stock model and one session's cache.

    Raises what transformers raises: it is for tests, benchmarks and doubts, not for serving.
    """

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True).eval()
        self._cache = None

    @torch.inference_mode()
    def forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits [tokens, vocabulary] of the next tokens of the session."""
        out = self.model(torch.tensor([list(token_ids)]), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        return out.logits[0]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after a prompt, one by one, in a fresh session."""
        self._cache = None
        tokens = [int(self.forward(prompt)[-1].argmax())]
        while len(tokens) < count:
            tokens.append(int(self.forward(tokens[-1:])[-1].argmax()))
        return tokens
