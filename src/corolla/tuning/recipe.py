"""Recipes: every setting of a fine-tuning that shapes its result, as a small YAML file to read, copy and change.

The named ones lie in `recipes/` beside this file. What is not in a recipe (how many sequences are computed at a time, how often the
model is saved) does not change what is learned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from corolla.chat.templates import template_named
from corolla.data.packing import Packing
from corolla.data.render import Loss, Truncation
from corolla.errors import InvalidSetting

RECIPES = Path(__file__).parent / "recipes"

Schedule = Literal["constant", "one-cycle", "cosine"]
Precision = Literal["bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One training with an optimizer and a schedule of its own, which begins with the model that the phase before made.

    `samples` is the most examples that are taken of each source. `loss` and `learning_rate` stand for the recipe's where they are given.
    Raises `InvalidSetting`.
    """

    name: str = "training"
    epochs: float = 1.0
    samples: int | None = None
    loss: Loss | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        _check("phases: epochs", self.epochs > 0, f"{self.epochs:g} epochs train nothing; give more than 0")
        _check("phases: samples", self.samples is None or self.samples > 0, f"{self.samples} examples train nothing; give at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What is trained on, and how. Raises `InvalidSetting` for a value outside its range.

    One step of the optimizer sees `batch * accumulation` sequences, and its loss is the mean over all their trained tokens,
    so how they are divided among devices and forwards changes nothing but rounding.
    """

    name: str
    about: str = ""

    template: str | None = None  # None is the model's own, or its family's
    max_length: int = 1024  # of a sequence, in tokens
    packing: Packing = "greedy"
    truncation: Truncation = "right"
    loss: Loss = "answers"
    equal_shares: tuple[str, ...] = ()  # of these categories or labels of sources as many tokens each
    held_out: float = 0.02  # the share of dialogues that is evaluated on instead

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    amsgrad: bool = False
    weight_decay: float = 0.0  # on matrices; biases and norms have none
    clip: float | None = 1.0  # the largest norm of a step's gradients
    label_smoothing: float = 0.0
    schedule: Schedule = "cosine"
    warmup: float = 0.0  # the share of steps in which the learning rate rises
    div_factor: float = 25.0  # one-cycle begins at learning_rate / div_factor
    final_div_factor: float = 1e4  # and ends at its beginning / final_div_factor
    end_ratio: float = 0.0  # cosine ends at learning_rate * end_ratio

    batch: int = 8
    accumulation: int = 1
    dtype: Precision = "bfloat16"  # of the computation; weights and optimizer are float32
    seed: int = 0
    phases: tuple[Phase, ...] = field(default_factory=lambda: (Phase(),))

    def __post_init__(self) -> None:
        if self.template is not None:
            template_named(self.template)
        _check("max_length", self.max_length >= 8, f"{self.max_length} tokens are too few; give at least 8")
        _check("held_out", 0 <= self.held_out < 1, f"{self.held_out:g} is no share of the data; give one from 0 to below 1")
        _check("label_smoothing", 0 <= self.label_smoothing < 1, f"{self.label_smoothing:g} is not in [0, 1)")
        _check("warmup", 0 <= self.warmup < 1, f"{self.warmup:g} is no share of the steps; give one from 0 to below 1")
        _check("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "give two numbers in [0, 1)")
        _check("clip", self.clip is None or self.clip > 0, "give a number above 0, or null for none")
        for name in ("learning_rate", "div_factor", "final_div_factor", "eps"):
            _check(name, getattr(self, name) > 0, f"{getattr(self, name):g} is not above 0")
        for name in ("weight_decay", "end_ratio", "seed"):
            _check(name, getattr(self, name) >= 0, f"{getattr(self, name):g} is below 0")
        for name in ("batch", "accumulation"):
            _check(name, getattr(self, name) > 0, f"{getattr(self, name)} is not above 0")
        _check("phases", bool(self.phases), "a recipe has at least one")

    @property
    def global_batch(self) -> int:
        """How many sequences one step of the optimizer sees."""
        return self.batch * self.accumulation

    def for_phase(self, index: int) -> Recipe:
        """The recipe with what its phase `index`, from 0, has of its own."""
        phase = self.phases[index]
        own = {"learning_rate": phase.learning_rate, "loss": phase.loss}
        return dataclasses.replace(self, **{name: value for name, value in own.items() if value is not None})  # type: ignore[arg-type]

    def dump(self) -> str:
        """The whole recipe as YAML that `load_recipe` reads."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self)), sort_keys=False, allow_unicode=True, width=100)


def names() -> list[str]:
    """The recipes that come with Corolla."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that file, with `changes` as "key=value" (a value as YAML has it).

    Raises `InvalidSetting` for one that is missing, damaged, or has a key or a value that there is not.
    """
    file = RECIPES / f"{name}.yaml"
    if name not in names():
        file = Path(name)
        _check("recipe", file.is_file(), f"there is no {name!r}: name a file, or one of {', '.join(names())}")
    content = _parsed("recipe", file.read_text(encoding="utf-8", errors="replace"), str(file))
    _check("recipe", isinstance(content, dict), f"{file} holds no settings: copy one of {', '.join(names())} and change it")
    for change in changes:
        key, separator, value = change.partition("=")
        _check("set", bool(separator), f"{change!r} is no KEY=VALUE, as in learning_rate=1e-4")
        content[key.strip()] = _parsed("set", value, change)
    return _recipe({"name": file.stem, **content})


def _recipe(content: Mapping[str, Any]) -> Recipe:
    _check_keys(Recipe, content)
    phases = content.get("phases")
    for phase in phases if isinstance(phases, list) else ():
        if isinstance(phase, dict):
            _check_keys(Phase, phase)
    try:
        return msgspec.convert(content, Recipe, strict=False)  # not strict: YAML takes 1e-5 for a text
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at ")
        raise InvalidSetting(place.strip("`$.") or "recipe", problem) from None


def _check_keys(kind: type[Recipe] | type[Phase], content: Mapping[str, Any]) -> None:
    known = [entry.name for entry in dataclasses.fields(kind)]
    for key in content:
        _check(str(key), key in known, f"a {kind.__name__.lower()} has no such setting; it has {', '.join(known)}")


def _parsed(setting: str, text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidSetting(setting, f"{where} is no YAML ({' '.join(str(error).split())})") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _check(setting: str, right: bool, problem: str) -> None:
    if not right:
        raise InvalidSetting(setting, problem)
