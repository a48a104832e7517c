"""`corolla chat`: talk with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from corolla.cli import logs, options
from corolla.cli.adapters import chosen_adapter
from corolla.cli.logs import LogLevel
from corolla.cli.opening import opened, soft_prompt
from corolla.types import GenerationSettings


def chat(
    model: options.Model = "smollm2",
    template: Annotated[
        str | None,
        typer.Option(help="tokenizer, bloomchat, sft-chat, petals or plain; the model's own by default."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    few_shot: Annotated[
        Path | None,
        typer.Option(help='Example turns before the conversation: a JSON list of {"role": "user" or "assistant", "content": "..."}.'),
    ] = None,
    prompt: Annotated[Path | None, typer.Option("--prompt", "--soft-prompt", metavar="DIR", help=options.SOFT_PROMPT)] = None,
    adapter: options.Adapter = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.7,
    top_p: options.TopP = 0.9,
    top_k: options.TopK = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    weights: options.Weights = None,
    batch_invariant: options.BatchInvariant = False,
    peers: options.Peers = None,
    secret: options.Secret = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Talk with a model.

    In a terminal, /help lists what else there is besides talking; Ctrl-C stops an answer, Ctrl-D leaves. When standard
    input is no terminal, each line is one turn and the answers alone go to standard output.

    With --prompt the model answers as its soft prompt was tuned to: corolla chat smollm2 --prompt tuned/
    With --adapter as its LoRA adapter was: corolla chat smollm2 --adapter tuned/, or by the name that servers hold it under.
    """
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    GenerationSettings.parse(**sampling)
    logs.set_up(log_level, swarm=bool(peers))

    from corolla.chat.conversation import Conversation, read_few_shot
    from corolla.chat.dialogue import Dialogue
    from corolla.chat.templates import default_template, template_named
    from corolla.cli.repl import Repl, answer_lines
    from corolla.client.session import Session
    from corolla.client.tokenizer import TextTokenizer

    chosen = template_named(template) if template else None
    examples = read_few_shot(few_shot) if few_shot else []

    with opened(
        model,
        peers=peers,
        secret=secret,
        dtype=dtype,
        device=device,
        threads=threads,
        weights=weights,
        batch_invariant=batch_invariant,
    ) as embedded:
        tokenizer = TextTokenizer(embedded.directory)
        tuned = soft_prompt(prompt, embedded.directory)
        conversation = Conversation(
            tokenizer,
            chosen or default_template(tokenizer, model),
            context_length=embedded.context_length - (0 if tuned is None else len(tuned)),
            system=system,
            few_shot=examples,
        )
        with Session(embedded.transport, embedded.peer, tuned, chosen_adapter(adapter, embedded)) as session:
            dialogue = Dialogue(conversation, session, sampling, timeout=options.ANSWER_TIMEOUT)
            if sys.stdin.isatty():
                Repl(dialogue, model).run()
            else:
                answer_lines(dialogue)
