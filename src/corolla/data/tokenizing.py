"""Examples as chunks of articles on disk, by all cores: what comes out does not depend on how many they are."""

from __future__ import annotations

import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

from corolla.chat.templates import TEMPLATES
from corolla.data.chunks import Summary, chunk_path, read_summary, write_chunk
from corolla.data.examples import Example
from corolla.data.layout import PARTS
from corolla.data.render import Renderer, RenderSettings
from corolla.data.rendering import Spelled
from corolla.data.sampling import drawn
from corolla.data.tokens import TrainingTokenizer
from corolla.data.vector_packing import Articles
from corolla.errors import CallerError, StorageError

_CHUNK_CHARACTERS = 2**20  # about 250,000 tokens: half a second of work
_CHUNK_EXAMPLES = 4096
_TOGETHER = 256  # examples that are tokenized together: what the library makes of a token is twenty times as large as its number
_PARALLEL = "TOKENIZERS_PARALLELISM"
_AHEAD = 3  # chunks given out for each worker


@dataclass(frozen=True, slots=True, kw_only=True)
class DialogueRendering:
    """How examples become articles, and by what share (0 to 1) those of `dev` and `test` are held out, by the seed."""

    tokenizer: Path
    template: str
    settings: RenderSettings
    dev: float = 0.0
    test: float = 0.0
    seed: int = 0


def chunked(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in lists of about a megabyte of text."""
    chunk: list[Example] = []
    characters = 0
    for example in examples:
        chunk.append(example)
        characters += sum(len(turn.content) for turn in example.turns)
        if characters >= _CHUNK_CHARACTERS or len(chunk) == _CHUNK_EXAMPLES:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def tokenize(
    examples: Iterable[Example], rendering: DialogueRendering, directory: Path, workers: int, told: Callable[[Summary], None]
) -> int:
    """Write the articles of the examples into chunks in `directory`, and return how many there are; those that are there stay.

    `told` hears of each, in their order. With one worker all is done in this process. Raises what reading the examples raises,
    `StorageError` when the disk refuses or a worker's process ends.
    """
    waiting: deque[Future[Summary] | Summary] = deque()

    def finish() -> None:
        result = waiting.popleft()
        told(result.result() if isinstance(result, Future) else result)

    count = 0
    with _pool(workers) as pool:
        try:
            for count, chunk in enumerate(chunked(examples), 1):
                path = chunk_path(directory, count - 1)
                if path.exists():
                    result: Future[Summary] | Summary = read_summary(path)
                elif pool is None:
                    result = render_chunk(chunk, rendering, path)
                else:
                    result = pool.submit(render_chunk, chunk, rendering, path)
                waiting.append(result)
                while len(waiting) > (_AHEAD * workers if pool else 0):
                    finish()
            while waiting:
                finish()
        except BrokenProcessPool:
            raise StorageError(
                "a worker ended before its time, perhaps for want of memory: run the same again with fewer workers"
            ) from None
    return count


def render_chunk(chunk: list[Example], rendering: DialogueRendering, path: Path) -> Summary:
    """Write the articles of a chunk, and return what else there is to tell. Raises `StorageError`."""
    renderer = _renderer(rendering)
    renderer.counts = type(renderer.counts)()
    summary = Summary(counts=renderer.counts)
    numbers: dict[str, int] = {}
    ids, kinds, lengths, parts, categories = array("i"), bytearray(), array("i"), bytearray(), array("i")
    for example, articles in _spelled(chunk, renderer):
        if isinstance(articles, CallerError):
            summary.problems.append((example.place, str(articles)))
            continue
        part = _part(example, rendering)
        category = -1 if example.category is None else numbers.setdefault(example.category, len(numbers))
        for article in articles:
            ids.extend(article.ids)
            kinds += article.kinds
            lengths.append(len(article.ids))
            parts.append(part)
            categories.append(category)
    summary.categories.extend(numbers)
    whole = Articles(np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(lengths, np.int32), np.array(categories, np.int32))
    of_part = np.array(parts, np.uint8)
    for part in range(len(PARTS)):
        summary.articles.append(int((of_part == part).sum()))
        summary.tokens.append(int(whole.lengths[of_part == part].sum(dtype=np.int64)))
    write_chunk(path, whole, of_part, summary)
    return summary


def _spelled(chunk: list[Example], renderer: Renderer) -> Iterator[tuple[Example, list[Spelled] | CallerError]]:
    for start in range(0, len(chunk), _TOGETHER):
        together = chunk[start : start + _TOGETHER]
        yield from zip(together, renderer.spell_all(together), strict=True)


def _part(example: Example, rendering: DialogueRendering) -> int:
    if not rendering.dev and not rendering.test:
        return PARTS.index("train")
    number = drawn(example, rendering.seed)
    return PARTS.index("test" if number < rendering.test else "dev" if number < rendering.test + rendering.dev else "train")


@cache  # one of a kind: a worker has one rendering to do
def _renderer(rendering: DialogueRendering) -> Renderer:
    return Renderer(TrainingTokenizer(rendering.tokenizer), TEMPLATES[rendering.template], rendering.settings)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    if workers == 1:
        with _one_thread():
            yield None
        return
    # Fresh processes, not forks: this one has threads.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tokenizers library knows no other way to be told how many threads it may use."""
    before = os.environ.get(_PARALLEL)
    os.environ[_PARALLEL] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_PARALLEL]
        else:
            os.environ[_PARALLEL] = before


def _start_worker() -> None:
    os.environ[_PARALLEL] = "false"  # the other workers have the other cores
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the parent to end
    parent = parent_process()
    assert parent is not None, "a worker is a child"

    def follow() -> None:
        parent.join()
        os._exit(1)  # a parent that was killed never says so, and its workers would wait for ever

    threading.Thread(target=follow, daemon=True).start()
