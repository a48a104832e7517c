"""What `corolla batch` costs over the engine that computes for it.

    python benchmarks/batch.py [--model smollm2] [--only speed] [--only overhead] [--requests N] [--repeats N] [--json FILE]

`speed`: the engine by itself answers the same requests with 16, 32, 64 and 128 sessions at once, and its best figure is what the batch,
with the concurrency that it chooses by itself, is held against, round by round. `overhead`: what a request costs is measured with a
server that computes nothing: everything from the line of the input to the line of the results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from common import Table, rounds
from corolla.chat.requests import Rendering
from corolla.chat.templates import TEMPLATES
from corolla.client.batch import Batch, BatchConfig
from corolla.client.batch_output import BatchOutput
from corolla.client.batch_requests import read_requests
from corolla.client.tokenizer import TextTokenizer
from corolla.engine.engine import Engine, EngineConfig
from corolla.messages import Message, Reply, Token
from corolla.models import catalog
from corolla.models.span import SpanModel, load_span
from corolla.server.embedded import fast_dtype, open_model
from corolla.swarm.local import LocalTransport
from corolla.swarm.transport import Deliver
from corolla.types import FinishReason, GenerationSettings, Step

SESSIONS = (16, 32, 64, 128)
_WORDS = ("river", "stone", "bridge", "market", "winter", "letter", "garden", "engine", "copper", "harbour", "teacher", "violin", "kettle")


class Requests:
    """Files of short questions, no two alike, so that no prompt is found in a cache by chance."""

    def __init__(self, directory: Path, tokenizer: TextTokenizer) -> None:
        self._directory, self._tokenizer, self._random = directory, tokenizer, random.Random(0)
        self._numbers = itertools.count()

    def file(self, count: int) -> Path:
        path = self._directory / f"requests-{next(self._numbers)}.jsonl"
        path.write_text("".join(json.dumps(self.text()) + "\n" for _ in range(count)), encoding="utf-8")
        return path

    def text(self) -> str:
        return " ".join(self._random.choices(_WORDS, k=12))

    def tokens(self) -> list[int]:
        return self._tokenizer.encode(self.text())


def engine_alone(model: SpanModel, requests: Requests, sessions: int, count: int, new_tokens: int) -> float:
    """Tokens a second with so many sessions at once; another one comes in as one ends."""
    engine = Engine(model, EngineConfig())
    settings = GenerationSettings(max_tokens_to_generate=new_tokens)
    waiting = [requests.tokens() for _ in range(count)]
    written = 0

    def begin() -> None:
        if waiting:
            engine.receive(Step(str(len(waiting)), 0, waiting.pop(), settings=settings), deliver)

    def deliver(reply: Reply) -> None:
        nonlocal written
        if isinstance(reply, Token):
            written += 1
            if reply.finish is not None:
                begin()

    began = time.perf_counter()
    for _ in range(sessions):
        begin()
    while engine.run_once():
        pass
    assert written == count * new_tokens, f"{written} tokens came"
    return written / (time.perf_counter() - began)


def batch(transport: LocalTransport, peer: str, tokenizer: TextTokenizer, source: Path, new_tokens: int, config: BatchConfig) -> float:
    """Seconds of a whole job, from the file of requests to that of results. No answer ends before its limit."""
    rendering = Rendering(tokenizer=tokenizer, template=TEMPLATES["plain"], defaults={"max_tokens_to_generate": new_tokens})
    endless = TextTokenizer(tokenizer.directory)
    endless.__dict__["end_ids"] = ()  # a cached property
    rendering = Rendering(tokenizer=endless, template=rendering.template, defaults=rendering.defaults)
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        with BatchOutput(Path(directory) / "out", {"input": source.name}) as results:
            counts = Batch(transport, peer, tokenizer, rendering, results.write, config).run(read_requests(source))
            results.finish()
        seconds = time.perf_counter() - began
    assert not counts.errors, f"{counts.errors} requests failed"
    return seconds


def instant() -> LocalTransport:
    """A server that answers every step with one token at once."""

    def answer(message: Message, deliver: Deliver) -> None:
        if isinstance(message, Step):
            end = message.start + len(message.payload)
            deliver(Token(message.session, message.generation, end, 100, -1.0, finish=FinishReason.LENGTH))

    transport = LocalTransport()
    transport.listen("instant", answer)
    return transport


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--only", action="append", choices=("speed", "overhead"), help="both by default; may be repeated")
    parser.add_argument("--requests", type=int, default=256, help="of a measurement with the model")
    parser.add_argument("--instant-requests", type=int, default=10_000, help="of the measurement without one")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--concurrency", type=int, help="instead of what the batch chooses by itself")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    directory = catalog.resolve(arguments.model)
    tokenizer = TextTokenizer(directory)
    count, new_tokens = arguments.requests, arguments.new_tokens
    with tempfile.TemporaryDirectory() as scratch, open_model(arguments.model) as opened:
        requests = Requests(Path(scratch), tokenizer)
        model = load_span(directory, dtype=fast_dtype("cpu"))
        config = BatchConfig(concurrency=arguments.concurrency or opened.sessions, cache_tokens=opened.cache_tokens)
        nothing = instant()

        def alone(_round: int) -> Mapping[str, float]:
            return {str(sessions): engine_alone(model, requests, sessions, count, new_tokens) for sessions in SESSIONS}

        def together(_round: int) -> Mapping[str, float]:
            seconds = batch(opened.transport, opened.peer, tokenizer, requests.file(count), new_tokens, config)
            return {"batch": count * new_tokens / seconds}

        def overhead(_round: int) -> Mapping[str, float]:
            seconds = batch(nothing, "instant", tokenizer, requests.file(arguments.instant_requests), 1, config)
            return {"overhead": 1000 * seconds / arguments.instant_requests}

        cells = {"speed": {"engine": alone, "batch": together}, "overhead": {"overhead": overhead}}
        wanted = {name: cell for part in arguments.only or cells for name, cell in cells[part].items()}
        figures = rounds(arguments.repeats, wanted)
    table = Table("batch", {"model": arguments.model, "requests": count, "new tokens": new_tokens, "concurrency": config.concurrency})
    if "batch" in figures:
        for sessions in SESSIONS:
            table.add(f"the engine alone, {sessions} sessions at once", "tokens/s", figures[str(sessions)])
        table.add("batch", "tokens/s", figures["batch"])
        best = [max(values) for values in zip(*(figures[str(sessions)] for sessions in SESSIONS), strict=True)]
        table.ratio("batch / the engine at its best", "x", figures["batch"], best, reach=0.9)
    if "overhead" in figures:
        name = f"a request that costs nothing to compute, {arguments.instant_requests:,} of them"
        table.add(name, "ms", figures["overhead"], reach=1.0, at_most=True)
    table.report(arguments.json)


if __name__ == "__main__":
    main()
