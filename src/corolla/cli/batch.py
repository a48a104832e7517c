"""`corolla batch`: the requests of files answered, many at once."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from corolla.cli import logs, options
from corolla.cli.logs import LogLevel
from corolla.cli.opening import opened, soft_prompt
from corolla.cli.progress import CountingTokens
from corolla.errors import CorollaError, DataError, InvalidSetting
from corolla.types import GenerationSettings


def batch(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="A JSON or JSONL file, or a directory of them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory that gets the results; the same one goes on after a kill.")],
    model: Annotated[str, typer.Option("--model", "-m", help="An alias, a directory, or the id of a model on the hub.")] = "smollm2",
    template: Annotated[
        str | None, typer.Option(help="How messages become text, and bare prompts questions; the model's own for messages by default.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system prompt of requests that bring none.")] = None,
    few_shot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Examples before every request, a JSON list; bare prompts are asked as questions then."),
    ] = None,
    tuned: Annotated[Path | None, typer.Option("--prompt", metavar="DIR", help=options.SOFT_PROMPT)] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, max=256, help="Requests at once; what the engine computes best together by default.")
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="The logarithm of each token's probability.", rich_help_panel=options.SAMPLING)
    ] = False,
    top_logprobs: Annotated[int, typer.Option(help="And this many alternatives, 0 to 20.", rich_help_panel=options.SAMPLING)] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop before anything is computed where a request cannot be understood.")
    ] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    weights: options.Weights = None,
    batch_invariant: options.BatchInvariant = False,
    peers: options.Peers = None,
    secret: options.Secret = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Answer every request of INPUT.

    A request is a text, {"prompt"}, {"messages"} or a line of OpenAI's batch files, with its own settings beside it if it has any; the
    options here are for what it leaves open. results.jsonl in the output directory has a line for each, in the order of the input: its id,
    text, finish_reason and token counts, or its error. After a kill the same command goes on where it was.

    Example: corolla batch questions.jsonl --output answers --template tokenizer --max-new-tokens 64
    """
    defaults = _given(
        max_tokens_to_generate=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop_sequences=tuple(stop or ()) or None,
        top_logprobs=top_logprobs or None,
    )
    GenerationSettings.parse(**defaults)
    logs.set_up(log_level, swarm=bool(peers))

    from corolla.chat.conversation import read_few_shot
    from corolla.chat.templates import template_named
    from corolla.client.batch_output import BatchOutput
    from corolla.client.batch_requests import digests, read_requests

    if output.resolve().is_relative_to(source.resolve()):
        raise InvalidSetting("output", f"{output} lies within the input: results would be read as requests; name another directory")
    named = None if template is None else template_named(template)
    examples = read_few_shot(few_shot) if few_shot is not None else []
    total = _checked(source, read_requests(source), strict=strict)
    job: dict[str, Any] = {
        "input": digests(source),
        "model": model,
        "template": template,
        "system": system,
        "few_shot": None if few_shot is None else hashlib.sha256(few_shot.read_bytes()).hexdigest(),
        "prompt": None if tuned is None else str(tuned),
        "settings": defaults,
        "logprobs": logprobs,
        "machine": _given(dtype=dtype, device=device, weights=weights, batch_invariant=batch_invariant or None, swarm=bool(peers) or None),
    }
    with BatchOutput(output, job) as results:
        todo = (request for request in read_requests(source) if not results.done(request.index))
        if results.complete:
            print(f"all {total} results are there already", file=sys.stderr)
            print(results.finish())
            return

        from dataclasses import replace

        from corolla.chat.requests import Rendering
        from corolla.chat.templates import default_template
        from corolla.client.batch import Batch, BatchConfig
        from corolla.client.tokenizer import TextTokenizer

        machine: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "threads": threads,
            "weights": weights,
            "batch_invariant": batch_invariant,
        }
        with opened(model, peers=peers, secret=secret, **machine) as entered:
            tokenizer = TextTokenizer(entered.directory)
            rendering = Rendering(
                tokenizer=tokenizer,
                template=named or default_template(tokenizer, model),
                questions=template is not None or few_shot is not None,
                system=system,
                few_shot=examples,
                defaults=defaults,
            )
            config = BatchConfig(
                concurrency=concurrency or entered.sessions,
                cache_tokens=entered.cache_tokens,
                timeout=options.ANSWER_TIMEOUT,
            )
            prompt = soft_prompt(tuned, entered.directory)
            there = sum(results.done(index) for index in range(total))
            wanted = (
                replace(request, logprobs=logprobs or bool(top_logprobs)) if request.logprobs is None else request for request in todo
            )
            began = time.perf_counter()
            with CountingTokens("answering", total, there) as bar:
                counts = Batch(entered.transport, entered.peer, tokenizer, rendering, results.write, config, prompt).run(
                    wanted, lambda so_far: bar.update(so_far.requests, so_far.completion_tokens)
                )
            seconds = time.perf_counter() - began
        done = f"{counts.requests} requests, {counts.errors} of them errors, {counts.completion_tokens} tokens in {seconds:.1f} s"
        print(f"{done} ({counts.completion_tokens / max(seconds, 1e-9):.0f} tokens/s)", file=sys.stderr)
        print(results.finish())
        if results.to_retry:
            raise CorollaError(f"{results.to_retry} requests failed for want of servers: run the same command again to ask them again")


def _checked(source: Path, requests: Any, *, strict: bool) -> int:
    """How many requests there are. Raises `DataError` for none, and the first one's error with `strict`."""
    total = 0
    for request in requests:
        if strict and request.error is not None:
            raise DataError(f"{request.id}: {request.error}")
        total += 1
    if not total:
        raise DataError(f"{source} holds no request: put one on each line, as a JSON text or object")
    return total


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
