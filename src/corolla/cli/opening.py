"""A model opened for a command, with progress shown until it is ready."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corolla.cli.progress import showing_progress

if TYPE_CHECKING:
    from corolla.client.discovery import Joined
    from corolla.models.prompts import SoftPrompt
    from corolla.server.embedded import Embedded

SECRET_VARIABLE = "COROLLA_SECRET"  # of the environment, which other users of a machine cannot see


@contextmanager
def opened(
    model: str, *, peers: Sequence[str] | None, secret: str | None, timed: bool = False, **machine: Any
) -> Iterator[Embedded | Joined]:
    """The model of a swarm where `peers` are named, else in this process; the bars are gone before the block begins.

    `timed` asks a swarm for each token's timings.
    `machine` is what `server.embedded.open_model` takes; a swarm's servers decide that for themselves.
    """
    with ExitStack() as stack:
        with showing_progress() as progress:
            if peers:
                from corolla.cli.addresses import check_addresses
                from corolla.client.discovery import join_swarm
                from corolla.models.catalog import resolve
                from corolla.swarm.peer import PeerConfig

                joined = check_addresses(peers)
                directory = resolve(model, weights=False, progress=progress)
                config = PeerConfig(initial_peers=joined, secret=secret_bytes(secret), client_mode=True)
                entered: Embedded | Joined = stack.enter_context(join_swarm(directory, config, timed=timed))
            else:
                from corolla.server.embedded import open_model

                entered = stack.enter_context(open_model(model, progress=progress, **machine))
        yield entered


def soft_prompt(directory: Path | None, model: Path) -> SoftPrompt | None:
    """The soft prompt in `directory`, if one is named, for the model whose config lies in `model`.

    Raises `PromptError` for one that is damaged, or another model's.
    """
    if directory is None:
        return None
    from corolla.models.checkpoint import read_config
    from corolla.models.families import architecture
    from corolla.models.prompts import load_prompt

    return load_prompt(directory, architecture(read_config(model)))


def secret_bytes(secret: str | None) -> bytes | None:
    """What peers prove that they know; an empty text is a mistake that `Handshake` names."""
    return None if secret is None else secret.encode()
