"""What a phase of a recipe is trained on: dialogues rendered and packed here, or sequences that `corolla prepare` has packed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from corolla.chat.templates import Template, Turn
from corolla.data.dataset import PackedDataset
from corolla.data.examples import Example, Place
from corolla.data.hdf5 import SequenceFile
from corolla.data.layout import METADATA, TOKENIZER, part_files, read_metadata
from corolla.data.packing import PackingSettings, pack, shuffled
from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.data.render import Renderer, RenderSettings
from corolla.data.sampling import is_held_out, sampled
from corolla.data.saving import SUMS, sha256
from corolla.data.tokens import Kind, Tokens, TrainingTokenizer, count
from corolla.errors import DataError, InvalidSetting
from corolla.tuning.recipe import Phase, Recipe


@dataclass(frozen=True, slots=True)
class PhaseSource:
    """A file, a directory or a dataset of the hub; `label` is what a recipe's equal shares call it.

    It is for one `phase` (from 1), or with None for every phase that has none of its own.
    """

    place: str
    phase: int | None = None
    label: str | None = None


def parse_source(text: str, recipe: Recipe) -> PhaseSource:
    """SOURCE, N=SOURCE for the phase of that number, or LABEL=SOURCE for one of the recipe's equal shares.

    Raises `InvalidSetting` for a phase or a label that the recipe has not.
    """
    label, separator, place = text.partition("=")
    if not separator or Path(text).exists():
        return PhaseSource(text)
    if label.isdecimal():
        if not 1 <= int(label) <= len(recipe.phases):
            raise InvalidSetting("data", f"{text!r}: the recipe {recipe.name} has {len(recipe.phases)} phases, from 1")
        return PhaseSource(place, phase=int(label))
    if label not in recipe.equal_shares:
        known = ", ".join(recipe.equal_shares) or "none"
        raise InvalidSetting("data", f"{text!r}: {label!r} is neither a phase nor one of the recipe's equal shares ({known})")
    return PhaseSource(place, label=label)


@dataclass(frozen=True, slots=True)
class PhaseData:
    """Packed sequences, and those held out; `described` is what is written down about them."""

    training: list[Tokens]
    held_out: list[Tokens]
    max_length: int
    described: dict[str, Any]


@dataclass(slots=True)
class _Found:
    """Articles and whole sequences by the share that they belong to; dialogues' articles are yet to be packed."""

    articles: dict[str, list[Tokens]] = field(default_factory=dict)
    sequences: dict[str, list[Tokens]] = field(default_factory=dict)
    held_out_articles: list[Tokens] = field(default_factory=list)
    held_out_sequences: list[Tokens] = field(default_factory=list)


class Loader:
    """Loads phases' data for one model and recipe.

    Raises `CallerError` for a tokenizer without an end token, or a template that ends no answer with one.
    """

    def __init__(self, recipe: Recipe, tokenizer: TrainingTokenizer, template: Template, vocabulary: int, problems: Problems) -> None:
        self._recipe = recipe
        self._vocabulary = vocabulary  # of the model, in tokens
        self._tokenizer = tokenizer
        self._template = template
        self._problems = problems
        probe = (Turn("user", "a"), Turn("assistant", "b"))
        list(Renderer(tokenizer, template).render(Example(turns=probe, place=Place("a dialogue", 1))))

    def load(self, number: int, sources: Sequence[PhaseSource], *, format: str | None = None, split: str = "train") -> PhaseData:
        """The data of phase `number`, from 1, of those of `sources` that are of this phase.

        Raises `DataError` for a source that is missing, damaged, made by another tokenizer, or leaves nothing to train on, and
        `InvalidSetting` for what recipe and data do not agree on.
        """
        phase = self._recipe.phases[number - 1]
        own = [source for source in sources if source.phase == number] or [source for source in sources if source.phase is None]
        if not own:
            raise InvalidSetting(
                "data", f"phase {number} of the recipe {self._recipe.name} ({phase.name}) has none: give --data {number}=SOURCE"
            )
        found, lengths, described = _Found(), set(), []
        for source in own:
            path = Path(source.place)
            if _is_prepared(path):
                lengths.add(self._prepared(path, source, found))
            else:
                self._dialogues(source, phase, found, format, split)
                lengths.add(self._recipe.max_length)
            described.append({"source": source.place, "label": source.label, "sha256": _hash(path)})
        shares = self._shares(found)
        max_length = max(lengths)
        training = shuffled([*self._packed(shuffled(shares[0], self._recipe.seed)), *shares[1]], self._recipe.seed)
        held_out = [*self._packed(found.held_out_articles), *found.held_out_sequences]
        if not training:
            raise DataError(f"phase {number} has nothing to train on: {', '.join(source.place for source in own)} hold no answer that fits")
        return PhaseData(
            training, held_out, max_length, {"sources": described, "training": _described(training), "held_out": _described(held_out)}
        )

    def _dialogues(self, source: PhaseSource, phase: Phase, found: _Found, format: str | None, split: str) -> None:
        recipe = self._recipe
        # A cut article has no end, which packing in full needs.
        length = None if recipe.packing == "full" else recipe.max_length
        settings = RenderSettings(max_length=length, truncation=recipe.truncation, loss=phase.loss or recipe.loss)
        renderer = Renderer(self._tokenizer, self._template, settings)
        held_out: list[Example] = []

        def to_train_on() -> Iterator[Example]:
            for example in read(source.place, self._problems, format=format, split=split):
                if is_held_out(example, recipe.held_out, recipe.seed):
                    held_out.append(example)
                else:
                    yield example

        training = to_train_on() if phase.samples is None else sampled(to_train_on(), phase.samples, recipe.seed)
        for example in training:
            share = example.category if example.category in recipe.equal_shares else source.label
            found.articles.setdefault(share or "", []).extend(renderer.render_all([example], self._problems))
        # What is evaluated on is the same in every phase, whatever the phase is trained on.
        found.held_out_articles += Renderer(
            self._tokenizer, self._template, RenderSettings(max_length=length, truncation=recipe.truncation, loss=recipe.loss)
        ).render_all(held_out, self._problems)

    def _prepared(self, path: Path, source: PhaseSource, found: _Found) -> int:
        """Returns the length of its sequences."""
        if path.is_dir():
            self._check_metadata(path)
            verified = (path / SUMS).is_file()
            with PackedDataset(path, "train", verify=verified) as data:
                training, length = list(data.sequences()), data.max_length
            held_out = []
            if part_files(path, "dev"):
                with PackedDataset(path, "dev", verify=False) as data:
                    held_out = list(data.sequences())
        else:
            with SequenceFile(path) as file:
                training, length, held_out = list(file), file.max_length, []
        largest = max((int(sequence.input_ids.max()) for sequence in training), default=0)
        if largest >= self._vocabulary:
            raise DataError(
                f"{path} holds token {largest}, which the model's vocabulary lacks: prepare the data with this model's tokenizer"
            )
        if not held_out:
            kept = int(len(training) * self._recipe.held_out)
            mixed = shuffled(training, self._recipe.seed)
            training, held_out = mixed[kept:], mixed[:kept]
        found.sequences.setdefault(source.label or "", []).extend(training)
        found.held_out_sequences += held_out
        return length

    def _check_metadata(self, path: Path) -> None:
        own = path / TOKENIZER / "tokenizer.json"
        if own.exists() and _vocabulary(own) != _vocabulary(self._tokenizer.directory / "tokenizer.json"):
            raise DataError(f"{path} was made by another tokenizer than the model's: prepare it again with --tokenizer and this model")
        template = read_metadata(path).get("template") if (path / METADATA).exists() else None
        if isinstance(template, str) and template != self._template.name:
            raise InvalidSetting(
                "template",
                f"{path} was prepared with {template!r} and the recipe has {self._template.name!r}: give --set template={template}",
            )

    def _shares(self, found: _Found) -> tuple[list[Tokens], list[Tokens]]:
        """All articles and sequences, or of the recipe's equal shares as many tokens each."""
        names = self._recipe.equal_shares
        if not names:
            return _flat(found.articles), _flat(found.sequences)
        sizes = {name: sum(map(len, [*found.articles.get(name, []), *found.sequences.get(name, [])])) for name in names}
        for name, size in sizes.items():
            if not size:
                raise InvalidSetting(
                    "equal_shares",
                    f"the recipe wants {', '.join(names)} in equal shares and there is no {name}: "
                    f"give --data {name}=SOURCE, or --set equal_shares=[]",
                )
        limit = min(sizes.values())
        articles: list[Tokens] = []
        sequences: list[Tokens] = []
        for name in names:
            room = limit
            for kept, given in ((articles, found.articles), (sequences, found.sequences)):
                for entry in shuffled(given.get(name, []), self._recipe.seed):
                    if len(entry) <= room:
                        kept.append(entry)
                        room -= len(entry)
        return articles, sequences

    def _packed(self, articles: Sequence[Tokens]) -> Iterator[Tokens]:
        settings = PackingSettings(max_length=self._recipe.max_length, pad_id=self._tokenizer.end_id, packing=self._recipe.packing)
        return pack(articles, settings)


def _is_prepared(path: Path) -> bool:
    return path.suffix == ".hdf5" or (path.is_dir() and bool((path / METADATA).exists() or part_files(path, "train")))


def _flat(groups: dict[str, list[Tokens]]) -> list[Tokens]:
    return [entry for entries in groups.values() for entry in entries]


def _vocabulary(file: Path) -> Any:
    content = json.loads(file.read_text(encoding="utf-8"))
    return content.get("model"), content.get("added_tokens")


def _hash(path: Path) -> str | None:
    """SHA-256 of a file, of a prepared directory's sums, or of those of a directory's files; None for a dataset of the hub."""
    if path.is_file():
        return sha256(path)
    if (path / SUMS).is_file():
        return sha256(path / SUMS)
    if not path.is_dir():
        return None
    hashed = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            hashed.update(f"{sha256(file)}  {file.relative_to(path).as_posix()}\n".encode())
    return hashed.hexdigest()


def _described(sequences: Sequence[Tokens]) -> dict[str, Any]:
    hashed = hashlib.sha256()
    for sequence in sequences:
        hashed.update(np.stack([sequence.input_ids, sequence.labels]).astype("<i4").tobytes())
    tokens = sum(len(sequence) - count(sequence, Kind.PADDING) for sequence in sequences)
    trained = sum(int(sequence.trained.sum()) for sequence in sequences)
    return {"sequences": len(sequences), "tokens": tokens, "trained_tokens": trained, "digest": hashed.hexdigest()}
