"""Which models there are and where their files lie: aliases, directories and the hub, and what is already here.

Nothing here imports torch or transformers: `corolla models` answers at once.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corolla.errors import CheckpointError, ModelNotFound, StorageError
from corolla.models import smollm2
from corolla.models.checkpoint import Progress, verify
from corolla.models.json_files import read_json

CACHE_VARIABLE = "COROLLA_CACHE"
DEFAULT = "smollm2"


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for a model that Corolla itself knows how to get; `nbytes` is its size in the cache."""

    description: str
    nbytes: int
    fetch: Callable[[Path, Progress | None], Path]  # (directory of models, progress) -> the model's directory


ALIASES = {
    DEFAULT: Alias("SmolLM2-135M-Instruct, chats on any machine", smollm2.MODEL_BYTES, smollm2.fetch),
}


@dataclass(frozen=True, slots=True)
class InstalledModel:
    """A model whose files are on this machine, as its config.json describes it (None: not said there)."""

    name: str
    directory: Path
    nbytes: int
    family: str | None
    blocks: int | None
    dtype: str | None


# `*` of the hub's patterns matches `/` too, so folders (other formats, original weights) are left out by name.
_DESCRIPTION = ["*.json", "*.jinja", "*.txt", "*.model"]  # config, generation config, tokenizer and chat template
_WEIGHTS = ["*.safetensors"]
_UNWANTED = ["*/*", "consolidated*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


def cache_directory() -> Path:
    """Where Corolla keeps what it made: $COROLLA_CACHE, else $XDG_CACHE_HOME/corolla, else ~/.cache/corolla."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "corolla"
    return Path.home() / ".cache" / "corolla"


def models_directory() -> Path:
    """Where the models lie that aliases stand for."""
    return cache_directory() / "models"


def resolve(name: str, *, weights: bool = True, progress: Progress | None = None, revision: str | None = None) -> Path:
    """The directory of the model called `name`: an alias, else a local directory, else a hub id ORG/NAME.

    What is not here yet is fetched: an alias into Corolla's cache, a hub id (at `revision`: a branch, tag or commit) into the
    hub's, where a download that broke off goes on. A directory with a SHA256SUMS is checked against it.

    Without `weights`, for a client of a swarm, a hub id's config, tokenizer and chat template alone are fetched, and a local
    directory needs no more; an alias comes whole, for its tokenizer is part of the one file that it is made from.
    Raises `ModelNotFound`, `CheckpointError` or `StorageError`.
    """
    if name in ALIASES:
        directory = ALIASES[name].fetch(models_directory(), progress)
        if weights:
            verify(directory)  # 0.2 s for the default model: less than a bar is worth
        return directory
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelNotFound(f"{directory} is no model's directory: it holds no config.json")
        if weights:
            verify(directory, progress)
        return directory
    if not _HUB_ID.fullmatch(name):
        raise ModelNotFound(
            f"there is no model {name!r}: give a model's local directory, a hub id as ORG/NAME, or one of the aliases: {', '.join(ALIASES)}"
        )
    return _from_hub(name, revision, weights=weights)


def installed() -> list[InstalledModel]:
    """The models in Corolla's cache and, of those in the hub's cache, the ones with safetensors; sorted by name."""
    directories = {directory.name: directory for directory in models_directory().glob("[!.]*") if directory.is_dir()}
    return sorted((describe(name, path) for name, path in (directories | _in_hub_cache()).items()), key=lambda model: model.name)


def _from_hub(name: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    otherwise = f"name a model's local directory or one of the aliases: {', '.join(ALIASES)}"
    wanted, unwanted = (_DESCRIPTION + _WEIGHTS, _UNWANTED) if weights else (_DESCRIPTION, [*_UNWANTED, "*.index.json"])
    try:
        directory = Path(
            snapshot_download(name, revision=revision, cache_dir=constants.HF_HUB_CACHE, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    except GatedRepoError as error:
        raise ModelNotFound(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(f"the hub has no model {name}, or it is private (then log in with `hf auth login`); or {otherwise}") from error
    except RevisionNotFoundError as error:
        raise ModelNotFound(f"{name} has no revision {revision}: give a branch, tag or commit of it") from error
    except HFValidationError as error:
        raise ModelNotFound(f"{name!r} is no hub id: give ORG/NAME, or {otherwise}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelNotFound(
            f"{name} is not in the hub's cache and the hub cannot be reached: connect to a network, or {otherwise}"
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFound(f"the hub would not give {name} ({str(error).splitlines()[0]}): try again later, or {otherwise}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"the disk is full: {name} does not fit into the hub's cache; make room, or set HF_HOME to a larger disk"
            ) from error
        raise
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{name} on the hub has no config.json, so it is no model that transformers knows: look for another copy of it")
    if weights and not any(directory.glob("*.safetensors")):
        raise CheckpointError(f"{name} has no safetensors on the hub, and pickled weights are never read: look for a converted copy of it")
    return directory


def _in_hub_cache() -> dict[str, Path]:
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return {}
    found = {}
    for repository in repositories:
        if repository.repo_type == "model" and repository.revisions:
            newest = max(repository.revisions, key=lambda revision: revision.last_modified).snapshot_path
            if any(newest.glob("*.safetensors")):
                found[repository.repo_id] = newest
    return found


def describe(name: str, directory: Path) -> InstalledModel:
    """What the files in a model's directory say of it."""
    try:
        config = read_json(directory / "config.json")
    except (OSError, ValueError):  # listed all the same: who wants to run it is told what is wrong
        config = {}
    if not isinstance(config, dict):
        config = {}
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    return InstalledModel(
        name=name,
        directory=directory,
        nbytes=sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        family=config.get("model_type"),
        blocks=_first(text, "num_hidden_layers", "n_layer", "num_layers", "n_layers"),
        dtype=_first(text, "dtype", "torch_dtype"),
    )


def _first(config: Any, *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)
