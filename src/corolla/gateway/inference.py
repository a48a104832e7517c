"""The inference settings that BLOOMChat documents, with their ranges and explanations, as the page shows them."""

from __future__ import annotations

from typing import Any

from corolla.gateway.message_runs import CHAT_DEFAULTS
from corolla.types import GenerationSettings

_DEFAULTS = GenerationSettings()


def _setting(name: str, label: str, kind: str, about: str, **more: Any) -> dict[str, Any]:
    default = more.pop("default", getattr(_DEFAULTS, name))
    default = list(default) if isinstance(default, tuple) else default
    bounds = {"minimum": None, "maximum": None, "exclusive_minimum": False, "step": None, **more}
    return {
        "name": name,
        "label": label,
        "type": kind,
        "about": about,
        **bounds,
        "default": default,
        "chat_default": CHAT_DEFAULTS.get(name, default),
    }


SETTINGS: list[dict[str, Any]] = [
    _setting(
        "max_tokens_to_generate",
        "Most tokens",
        "integer",
        "The longest an answer may get, in tokens (about three quarters of a word each).",
        minimum=1,
        step=1,
    ),
    _setting(
        "do_sample", "Sample", "boolean", "Draw each token by its probability. Off: always the likeliest one, the same answer every time."
    ),
    _setting(
        "temperature",
        "Temperature",
        "number",
        "How far sampling strays from the likeliest tokens: low is focused, 1 is the model's own distribution.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=1.0,
        step=0.05,
    ),
    _setting("top_k", "Top k", "integer", "Draw from this many likeliest tokens only. Not set: from all of them.", minimum=1, step=1),
    _setting(
        "top_p",
        "Top p",
        "number",
        "Draw from the likeliest tokens whose probabilities add up to this. 1: from all of them.",
        minimum=0.0,
        exclusive_minimum=True,
        maximum=1.0,
        step=0.01,
    ),
    _setting(
        "repetition_penalty",
        "Repetition penalty",
        "number",
        "Makes tokens that occurred already less likely. 1: no penalty.",
        minimum=1.0,
        maximum=2.0,
        step=0.05,
    ),
    _setting(
        "top_logprobs",
        "Top log-probabilities",
        "integer",
        "Report this many likeliest alternatives for each token.",
        minimum=0,
        maximum=20,
        step=1,
    ),
    _setting(
        "seed", "Seed", "integer", "The same seed draws the same answer. Not set: another one each time.", minimum=0, step=1, default=None
    ),
    _setting("stop_sequences", "Stop sequences", "list", "The answer ends before the first of these texts that it comes to."),
]
