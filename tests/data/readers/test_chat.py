"""Chat turns, by either names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data.readers.writing import a, one, q


@pytest.mark.parametrize(
    "value",
    [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
            ]
        },
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    ],
)
def test_chat_turns(tmp_path: Path, value: Any) -> None:
    example = one(tmp_path, value)
    assert (example.system, example.turns) == ("Be kind.", (q("Hi"), a("Hello")))
