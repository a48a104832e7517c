"""From inputs to a directory of packed sequences: `corolla prepare`.

Three passes, each a stream: examples are read, filtered and given to workers, which write chunks of articles; the chunks' articles are
put in their order; they are packed into sequences and these compressed into files. A run that was killed goes on with the chunks
that are there. Nothing depends on how many workers there are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import corolla
from corolla.chat.templates import template_named
from corolla.data.chunks import Summary
from corolla.data.deduplication import Deduplication, Duplicates
from corolla.data.description import config_class, read_metrics, tokenizer_sums, write_description
from corolla.data.examples import Example
from corolla.data.layout import PARTS, Part
from corolla.data.metrics import PackingMetrics
from corolla.data.output_lock import Claim, claimed
from corolla.data.packing import Packing, PackingSettings
from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.data.render import Renderer, RenderSettings
from corolla.data.shuffling import in_order
from corolla.data.sources import Source, sources_of, total_lines, watched
from corolla.data.tokenizing import DialogueRendering, tokenize
from corolla.data.tokens import TrainingTokenizer
from corolla.data.writing import Chunks, packed, part_writer, with_training
from corolla.errors import DataError, InvalidSetting

if TYPE_CHECKING:
    from corolla.models.checkpoint import Progress


_MOST_FILES = 256  # all are open at once


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareSettings:
    """What is prepared from what, and how.

    `inputs` are as `read` takes them, `tokenizer` a directory. `render.max_length` counts for nothing: it is `max_length`, or none for
    packing in full. `dev` and `test` are the shares held out. `categories` numbers the examples' categories: by a mapping, or (`auto`) in
    the order of their names. `files` is the number of files for each part. `keep_prompt_only` keeps sequences, and articles, of which
    nothing is trained on. Raises `InvalidSetting` for a value outside its range.
    """

    inputs: tuple[str, ...]
    tokenizer: Path
    template: str = "bloomchat"
    max_length: int = 2048
    packing: Packing = "greedy"
    render: RenderSettings = field(default_factory=RenderSettings)
    seed: int = 0
    shuffle: bool = True
    dev: float = 0.0
    test: float = 0.0
    files: Mapping[Part, int] = field(default_factory=dict)
    categories: Mapping[str, int] | Literal["auto"] | None = None
    duplicates: Duplicates = "keep"
    similarity: float = 0.8
    keep_prompt_only: bool = False
    format: str | None = None
    split: str = "train"
    strict: bool = False
    workers: int | None = None  # all cores

    def __post_init__(self) -> None:
        if not self.inputs:
            raise InvalidSetting("input", "there is none; name a file, a directory or a dataset of the hub")
        for name, share in (("dev", self.dev), ("test", self.test)):
            if not 0 <= share < 1 or self.dev + self.test >= 1:
                raise InvalidSetting(name, f"{share:g} leaves nothing to train on; give a share from 0 to below 1, as in 0.05")
        if not 0 <= self.seed < 2**63:
            raise InvalidSetting("seed", f"{self.seed} is not from 0 to 2**63 - 1")
        for part, count in self.files.items():
            if not 1 <= count <= (1 if part == "test" else _MOST_FILES):
                raise InvalidSetting(f"{part}-files", f"{count} is no number of files for it; give 1 to {_MOST_FILES}, and 1 for test")
        if self.workers is not None and self.workers < 1:
            raise InvalidSetting("workers", f"{self.workers} do no work; give at least 1")

    @property
    def rendering(self) -> RenderSettings:
        """How examples become articles."""
        longest = None if self.packing == "full" else self.max_length
        return replace(self.render, max_length=longest, keep_untrained=self.keep_prompt_only)

    @property
    def processes(self) -> int:
        """How many work at once."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def plan(self, sources: Sequence[Source], tokenizer: Mapping[str, str]) -> dict[str, Any]:
        """What decides the chunks and their order: a run can go on where this is the same."""
        named = {name: value for name, value in asdict(replace(self, files={})).items() if name not in _NOT_PLANNED}
        return named | {
            "render": asdict(self.rendering),
            "sources": [[each.name, each.sha256] for each in sources],
            "tokenizer": dict(tokenizer),
        }


_NOT_PLANNED = ("inputs", "files", "strict", "workers")


def prepare(settings: PrepareSettings, output: Path, progress: Progress, problems: Problems) -> dict[str, Any]:
    """Prepare `output`, or go on with what was begun there, and return its metrics. What cannot be used is told to `problems`.

    Raises `DataError` for inputs or an `output` that cannot be used, `StorageError` when the disk refuses,
    `CheckpointError` or `CallerError` for a tokenizer or a template that will not do. After an error the same call goes on.
    """
    tokenizer = TrainingTokenizer(settings.tokenizer)
    packing = PackingSettings(max_length=settings.max_length, pad_id=tokenizer.end_id, packing=settings.packing)
    Renderer(tokenizer, template_named(settings.template), settings.rendering)  # refuses here what a worker could only fail at
    for each in settings.inputs:
        read(each, problems, format=settings.format, split=settings.split)  # opens nothing yet; refuses what is not there
    with claimed(output) as claim:
        sources = sources_of(settings.inputs, progress)
        claim.agree(settings.plan(sources, tokenizer_sums(settings.tokenizer)))
        if not claim.is_complete:
            shutil.rmtree(claim.done, ignore_errors=True)  # half of the files, perhaps
            run = _Run(settings, claim, sources, packing, progress)
            run.tokenize(problems)
            rows = run.write()
            metadata = run.metadata(tokenizer)
            write_description(claim.done, metadata, run.metrics, rows, settings.tokenizer)
        claim.publish()
    return read_metrics(output)


@dataclass(slots=True)
class _Run:
    """One run: what its passes tell one another."""

    settings: PrepareSettings
    claim: Claim
    sources: Sequence[Source]
    packing: PackingSettings
    progress: Progress
    metrics: PackingMetrics = field(default_factory=PackingMetrics)
    chunks: int = 0
    categories: Mapping[str, int] | None = None

    def tokenize(self, problems: Problems) -> None:
        """Write the chunks of articles."""
        settings, place = self.settings, 0
        duplicates = Deduplication(settings.duplicates, settings.similarity)
        names: set[str] = set()
        total = total_lines(self.sources)

        def examples() -> Iterator[Example]:
            nonlocal place
            readers = (read(each, problems, format=settings.format, split=settings.split) for each in settings.inputs)
            for at, example in watched(chain.from_iterable(readers), self.sources):
                place = at
                if duplicates.is_new(example):
                    yield example

        def told(summary: Summary) -> None:
            for where, problem in summary.problems:
                problems.add(where, problem)
            self.metrics.add(summary)
            names.update(summary.categories)
            self.progress("tokenizing", place, total)

        rendering = DialogueRendering(
            tokenizer=settings.tokenizer,
            template=settings.template,
            settings=settings.rendering,
            dev=settings.dev,
            test=settings.test,
            seed=settings.seed,
        )
        self.chunks = tokenize(examples(), rendering, self.claim.chunks, settings.processes, told)
        self.metrics.problems, self.metrics.duplicates = problems.count, duplicates.removed
        if not self.metrics.counts.articles:
            raise DataError("there is nothing to train on: no example was found in the inputs, or every one was left out")
        auto = {name: number for number, name in enumerate(sorted(names))}
        self.categories = auto if settings.categories == "auto" else settings.categories

    def write(self) -> dict[Part, list[int]]:
        """Order, pack and write every part; return how many sequences each of its files has."""
        rows = {}
        with ThreadPoolExecutor(self.settings.processes) as threads:
            for part in PARTS:
                if self.metrics.parts[part].articles:
                    rows[part] = self._write(part, threads)
        return rows

    def metadata(self, tokenizer: TrainingTokenizer) -> dict[str, Any]:
        """What metadata.yaml says of how the data came about; the first fields are those of BLOOMChat's tools."""
        settings = self.settings
        return {
            "max_seq_length": settings.max_length,
            "token_type_ids": True,
            "vocab_size": tokenizer.vocabulary,
            "tokenizer_model_type": config_class(tokenizer.model_type),
            "pad_id": self.packing.pad_id,
            "end_id": tokenizer.end_id,
            "packing": settings.packing,
            "template": settings.template,
            "rendering": asdict(settings.rendering),
            "seed": settings.seed if settings.shuffle else None,
            "dev": settings.dev,
            "test": settings.test,
            "duplicates": settings.duplicates,
            "categories": None if self.categories is None else dict(self.categories),
            "corolla": corolla.__version__,
            "sources": [{"name": each.name, "bytes": each.nbytes, "sha256": each.sha256} for each in self.sources],
        }

    def _write(self, part: Part, threads: ThreadPoolExecutor) -> list[int]:
        settings, metrics = self.settings, self.metrics.parts[part]
        chunks = Chunks(directory=self.claim.chunks, count=self.chunks, part=part, categories=self.categories or {})
        keyed = chunks.keyed(settings.seed)
        nbytes = metrics.rendered_tokens * 5 + metrics.articles * 16
        blocks = in_order(keyed, nbytes, self.claim.work / "shuffled") if settings.shuffle else (each.articles for each in keyed)
        total = sum(each.rendered_tokens for each in self.metrics.parts.values())
        files = settings.files.get(part, 1)
        has_categories = self.categories is not None
        with part_writer(self.claim.done, part, files, settings.max_length, threads, categories=has_categories) as writer:
            for rows in packed(blocks, self.packing):
                kept = rows if settings.keep_prompt_only else with_training(rows)
                self.metrics.prompt_only_sequences += len(rows.ids) - len(kept.ids)
                self.metrics.prompt_only_tokens += (len(rows.ids) - len(kept.ids)) * settings.max_length
                writer.add(kept)
                metrics.add(kept)
                self.progress("writing", sum(each.tokens for each in self.metrics.parts.values()), total)
            if metrics.sequences < files:
                fewer = f"{files} are more than the {metrics.sequences} sequences there are; give fewer, the rest goes on from here"
                raise InvalidSetting(f"{part}-files", fewer)
        return writer.counts
