"""LoRA adapters on the command line: those that a server holds, and the one that a conversation has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corolla.errors import AdapterError, InvalidSetting

if TYPE_CHECKING:
    from corolla.client.discovery import Joined
    from corolla.models.adapters import Adapter
    from corolla.server.embedded import Embedded


def named_directories(given: Sequence[str]) -> dict[str, Path]:
    """`NAME=DIR` or `DIR`, which has its own name, as directories by name. Raises `InvalidSetting` for a name that comes twice."""
    named: dict[str, Path] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        path = Path(directory if equals else text)
        name = name if equals else path.resolve().name
        if name in named:
            raise InvalidSetting("adapters", f"two of them are called {name!r}: name one of them otherwise, as in {name}-2={path}")
        named[name] = path
    return named


def chosen_adapter(given: str | None, opened: Embedded | Joined) -> Adapter | str | None:
    """What a session takes for `--adapter`: the adapter in a directory, or the digest of one that the servers of a swarm hold.

    Raises `AdapterError` when there is none, and for one that is damaged or another model's.
    """
    if given is None:
        return None
    if Path(given).is_dir():
        from corolla.models.adapters import load_adapter
        from corolla.models.checkpoint import read_config
        from corolla.models.families import architecture

        return load_adapter(Path(given), architecture(read_config(opened.directory)))
    from corolla.client.discovery import Joined

    if isinstance(opened, Joined):
        return opened.adapter(given)
    raise AdapterError(f"there is no directory {given!r}; the name of an adapter says something only to the servers of a swarm (--peers)")
