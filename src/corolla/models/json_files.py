"""JSON that others wrote, read within bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST = 64 * 2**20  # bytes of a file; a large vocabulary's tokenizer.json has 20 MB


def parse_json(text: bytes | str) -> Any:
    """What a JSON text says. Raises `ValueError` for whatever is wrong with it, nesting that is too deep for Python too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, most: int = MOST) -> Any:
    """What a JSON file says. Raises `OSError` where it cannot be read, `ValueError` where it is no JSON or has more than `most` bytes."""
    with path.open("rb") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most} bytes")
    return parse_json(text)
