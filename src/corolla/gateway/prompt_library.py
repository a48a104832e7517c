"""The soft prompts at hand: the directories below one that `--prompts` names, with what their training wrote down."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corolla.errors import CorollaError, InvalidSetting, PromptError
from corolla.gateway.model_registry import Models, ServedModel

if TYPE_CHECKING:
    from corolla.models.prompts import SoftPrompt

_CONFIG, _WEIGHTS, _RECORD = "adapter_config.json", "adapter_model.safetensors", "tuning.json"


@dataclass(frozen=True, slots=True)
class Found:
    """One directory: the prompt and its model, or the `problem` with them; a run that has no prompt yet has neither."""

    id: str
    model: str | None
    tokens: int | None
    deep: bool
    problem: str | None
    tuning: dict[str, Any] | None


class PromptLibrary:
    """Looks into `directory` whenever it is asked, and loads what has changed. For any thread."""

    def __init__(self, directory: Path | None, models: Models) -> None:
        self._directory, self._models = directory, models
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[tuple[float, ...], SoftPrompt | None, str | None, str | None]] = {}  # stamps, prompt, model, problem

    def found(self) -> list[Found]:
        """All of them, by name."""
        with self._lock:
            return [self._look(directory) for directory in self._directories()]

    def get(self, name: str | None, model: ServedModel) -> SoftPrompt | None:
        """The prompt of that name, None without a name. Raises `InvalidSetting` where there is none, or it is another model's."""
        if name is None:
            return None
        with self._lock:
            directory = next((each for each in self._directories() if each.name == name), None)
            if directory is None:
                raise InvalidSetting("prompt", f"there is no soft prompt {name!r} here")
            _, prompt, owner, problem = self._load(directory)
        if prompt is None or owner != model.name:
            raise InvalidSetting("prompt", problem or f"{name} is no prompt of model {model.name}")
        return prompt

    def _directories(self) -> list[Path]:
        if self._directory is None or not self._directory.is_dir():
            return []
        candidates = [self._directory, *sorted(path for path in self._directory.iterdir() if path.is_dir())]
        return [path for path in candidates if (path / _CONFIG).is_file() or (path / _RECORD).is_file()]

    def _look(self, directory: Path) -> Found:
        _, prompt, model, problem = self._load(directory)
        tuning: dict[str, Any] | None = None
        try:
            tuning = json.loads((directory / _RECORD).read_bytes(), parse_constant=lambda _: None)  # a loss may be no number
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            problem = problem or f"its {_RECORD} cannot be read: {error}"
        tokens = None if prompt is None else len(prompt)
        deep = prompt is not None and prompt.deep is not None
        return Found(directory.name, model, tokens, deep, problem, tuning if isinstance(tuning, dict) else None)

    def _load(self, directory: Path) -> tuple[tuple[float, ...], SoftPrompt | None, str | None, str | None]:
        files = [directory / _CONFIG, directory / _WEIGHTS]
        stamps = tuple(file.stat().st_mtime for file in files if file.is_file())
        known = self._loaded.get(directory.name)
        if known is None or known[0] != stamps:
            known = self._loaded[directory.name] = (stamps, *self._read(directory)) if stamps else (stamps, None, None, None)
        return known

    def _read(self, directory: Path) -> tuple[SoftPrompt | None, str | None, str | None]:
        from corolla.models.checkpoint import read_config
        from corolla.models.families import architecture
        from corolla.models.prompts import load_prompt

        problem = None
        for model in self._models:
            try:
                return load_prompt(directory, architecture(read_config(model.directory))), model.name, None
            except PromptError as error:
                problem = problem or str(error)
            except CorollaError as error:
                problem = str(error)
        return None, None, problem
