"""`corolla generate`: one completion of a text."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.adapters import chosen_adapter
from corolla.cli.hops import Hops
from corolla.cli.logs import LogLevel
from corolla.cli.opening import opened, soft_prompt
from corolla.errors import EmptyPrompt, InvalidSetting
from corolla.types import GenerationSettings


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from standard input.")],
    tuned: Annotated[Path | None, typer.Option("--soft-prompt", metavar="DIR", help=options.SOFT_PROMPT)] = None,
    adapter: options.Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    timings: Annotated[
        bool, typer.Option("--timings", help="With --json and --peers: where the time of a token goes, server by server.")
    ] = False,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    top_logprobs: Annotated[int, typer.Option(help="With --json: this many alternatives for each token, 0 to 20.")] = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    weights: options.Weights = None,
    batch_invariant: options.BatchInvariant = False,
    peers: options.Peers = None,
    secret: options.Secret = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Continue a text.

    The continuation alone goes to standard output, as it is written. With --json it is one object with text, token_ids,
    logprobs, timings (seconds) and finish_reason. --timings adds hops: for each server the milliseconds that a step
    (of a token, or of several that were guessed) waited there, was computed, and was under way to it, as means over the steps;
    and counters: how often a history was replayed, a server given up, the session moved.
    """
    if timings and not (as_json and peers):
        raise InvalidSetting("timings", "they are a swarm's and come in the JSON: give --json and --peers too")
    settings = GenerationSettings.parse(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or None,
        top_logprobs=top_logprobs,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise EmptyPrompt
    logs.set_up(log_level, swarm=bool(peers))

    from corolla.client.completion import Completion
    from corolla.client.session import Session
    from corolla.client.tokenizer import TextTokenizer

    hops = Hops()
    machine = {"dtype": dtype, "device": device, "threads": threads, "weights": weights, "batch_invariant": batch_invariant}
    with opened(model, peers=peers, secret=secret, timed=timings, **machine) as embedded:
        tokenizer = TextTokenizer(embedded.directory)
        settings = dataclasses.replace(settings, stop_token_ids=tokenizer.end_ids)
        tokens = tokenizer.encode(text, opening=True)
        with Session(
            embedded.transport, embedded.peer, soft_prompt(tuned, embedded.directory), chosen_adapter(adapter, embedded)
        ) as session:
            completion = Completion(session, tokenizer, tokens, settings, timeout=options.ANSWER_TIMEOUT)
            for piece in completion:
                if not as_json:
                    print(piece.text, end="", flush=True)
                elif piece.token is not None:
                    hops.add(piece.token.timings)
    result = completion.result
    assert result is not None
    if not as_json:
        print()
        return
    fields = dataclasses.asdict(result)
    if not top_logprobs:
        del fields["top_logprobs"]
    if timings:
        from corolla.client.discovery import Joined

        assert isinstance(embedded, Joined), "timings are asked of a swarm only"
        fields["hops"] = hops.means()
        fields["counters"] = dataclasses.asdict(embedded.transport.counters)
    print(json.dumps({"model": model, **fields}, ensure_ascii=False))
