"""`corolla evaluate`: how well a model predicts data, what its tokenizer makes of languages, and how it answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from corolla.cli import logs, options
from corolla.cli.logs import LogLevel
from corolla.cli.opening import opened, soft_prompt
from corolla.cli.progress import showing_progress
from corolla.errors import DataError, InvalidSetting

if TYPE_CHECKING:
    from rich.table import Table

    from corolla.client.discovery import Joined
    from corolla.client.session import Session
    from corolla.data.tokens import Tokens, TrainingTokenizer
    from corolla.server.embedded import Embedded
    from corolla.tuning.evaluation import Loss
    from corolla.tuning.evaluation_text import ReferenceAnswers

_DATA, _ANSWERS, _WORDS = "Loss and perplexity", "Answers", "Tokens per word"


def evaluate(
    model: options.Model = "smollm2",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A file or directory of dialogues or text, or what `corolla prepare` made; may be repeated.", rich_help_panel=_DATA
        ),
    ] = None,
    part: Annotated[str, typer.Option(help="Of prepared data: train, dev or test.", rich_help_panel=_DATA)] = "dev",
    template: Annotated[
        str | None, typer.Option(help="How dialogues become text; the model's own by default.", rich_help_panel=_DATA)
    ] = None,
    loss: Annotated[str, typer.Option(help="answers, or all: which tokens count.", rich_help_panel=_DATA)] = "answers",
    max_length: Annotated[int, typer.Option(min=2, help="Of an article, in tokens; longer ones are cut.", rich_help_panel=_DATA)] = 1024,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Evaluate so many of the examples, drawn by a seed of 0.", rich_help_panel=_DATA)
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="Of dialogues, only those that `tune` and `finetune` keep from training with this share and a seed of 0.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    replies: Annotated[
        int, typer.Option(min=0, help="Answer so many of the data's questions, for distinct-n and lengths.", rich_help_panel=_ANSWERS)
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens an answer may have.", rich_help_panel=_ANSWERS)] = 64,
    words: Annotated[
        list[str] | None, typer.Option(metavar="LANGUAGE=FILE", help="A text of that language; may be repeated.", rich_help_panel=_WORDS)
    ] = None,
    tokenizer: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Also this model's tokenizer; may be repeated.", rich_help_panel=_WORDS)
    ] = None,
    prompt: Annotated[Path | None, typer.Option("--prompt", metavar="DIR", help=options.SOFT_PROMPT)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture there, a PNG.")] = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    threads: options.Threads = None,
    weights: options.Weights = None,
    peers: options.Peers = None,
    secret: options.Secret = None,
    log_level: options.LogLevel = LogLevel.WARNING,
) -> None:
    """Evaluate a model: its loss and perplexity on data, its answers, its tokenizer.

    The loss is on the tokens that a model is trained on (the assistant's answers with their ends), in nats a token, every token counting
    the same. Nothing is trained; over --peers the swarm computes.

    Example: corolla evaluate smollm2 --data held_out.jsonl --replies 50 --words en=english.txt --words fr=french.txt --json figures.json
    """
    logs.set_up(log_level, swarm=bool(peers))
    texts = dict(_language(given) for given in words or [])
    if not (data or texts):
        raise InvalidSetting("data", "there is nothing to evaluate: name --data, or --words LANGUAGE=FILE")
    if replies and not data:
        raise InvalidSetting("replies", "questions come from --data: name it")
    if plot is not None and plot.suffix.lower() != ".png":
        raise InvalidSetting("plot", f"{plot} is no PNG: end its name in .png")
    losses: dict[str, Loss] = {}
    answers: dict[str, ReferenceAnswers] = {}
    lengths: list[int] = []
    if data:
        from corolla.client.session import Session
        from corolla.data.tokens import TrainingTokenizer
        from corolla.models.checkpoint import read_config
        from corolla.models.families import architecture
        from corolla.tuning.evaluation import check_loss
        from corolla.tuning.evaluation import evaluate as evaluated

        machine: dict[str, Any] = {"dtype": dtype, "device": device, "threads": threads, "weights": weights}
        with opened(model, peers=peers, secret=secret, **machine) as entered:
            tuned = soft_prompt(prompt, entered.directory)
            vocabulary = architecture(read_config(entered.directory)).vocabulary
            read = _Reading(
                TrainingTokenizer(entered.directory), template, model, loss, min(max_length, entered.context_length - 1), samples, held_out
            )

            def session() -> Session:
                return Session(entered.transport, entered.peer, tuned)

            for source in data:
                with showing_progress() as progress:
                    losses[source] = evaluated(
                        read.articles(source, part),
                        session,
                        timeout=options.ANSWER_TIMEOUT,
                        report=lambda done, source=source: progress(f"evaluating {source}", done, None),  # type: ignore[misc]
                    )
                check_loss(
                    losses[source].loss,
                    vocabulary,
                    f"over {source}",
                    "the model's weights are damaged, or its tokenizer and template are another model's",
                )
                if replies:
                    answers[source], of_these = _answer(read, entered, tuned, source, replies, max_new_tokens)
                    lengths += of_these
    per_word = _per_word(model, tokenizer or [], texts) if texts else {}
    _show(losses, answers, per_word)
    if json_file is not None:
        figures = {
            "model": model,
            "loss": {source: found.summary() for source, found in losses.items()},
            "answers": {source: asdict(found) for source, found in answers.items()},
            "tokens_per_word": per_word,
        }
        from corolla.models.saving import replacing

        with replacing(json_file) as path:
            path.write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if plot is not None:
        from corolla.tuning.evaluation_plot import plot_evaluation

        plot_evaluation(plot, {name: [a.loss for a in found.articles] for name, found in losses.items()}, per_word, lengths)


class _Reading:
    """The data as articles, and as questions."""

    def __init__(
        self,
        tokenizer: TrainingTokenizer,
        template: str | None,
        model: str,
        loss: str,
        max_length: int,
        samples: int | None,
        held_out: float | None,
    ) -> None:
        from corolla.chat.templates import default_template, template_named
        from corolla.data.problems import Problems
        from corolla.data.render import RenderSettings

        self.tokenizer, self.samples, self.held_out = tokenizer, samples, held_out
        self.template = default_template(tokenizer, model) if template is None else template_named(template)
        self.settings = RenderSettings(max_length=max_length, loss=loss)  # type: ignore[arg-type]
        self.problems = Problems()

    def articles(self, source: str, part: str) -> Iterator[Tokens]:
        """Raises `DataError` as reading does, and `InvalidSetting` for a part that there is not."""
        from corolla.data.dataset import PackedDataset
        from corolla.data.layout import PARTS
        from corolla.data.render import Renderer

        if _is_prepared(source):
            if part not in PARTS:
                raise InvalidSetting("part", f"there is no {part!r}; there are {', '.join(PARTS)}")
            if self.held_out is not None:
                raise InvalidSetting("held-out", f"{source} is prepared data, divided already: choose with --part")
            with PackedDataset(Path(source), part) as dataset:
                most = self.settings.max_length
                for number, article in enumerate(dataset.articles()):
                    if self.samples is None or number < self.samples:
                        yield article[:most]
            return
        yield from Renderer(self.tokenizer, self.template, self.settings).render_all(self.examples(source), self.problems)

    def examples(self, source: str) -> Any:
        from corolla.data.readers.read import read
        from corolla.data.sampling import is_held_out, sampled

        examples = read(source, self.problems)
        if self.held_out is not None:
            share = self.held_out
            examples = (example for example in examples if is_held_out(example, share, seed=0))
        return examples if self.samples is None else sampled(examples, self.samples, 0)

    def questions(self, source: str, count: int) -> list[tuple[tuple[str, str], ...]]:
        """The turns before the last answer, of so many dialogues."""
        from corolla.data.render import instructions

        found: list[tuple[tuple[str, str], ...]] = []
        for example in self.examples(source):
            turns = list(example.turns)
            while turns and turns[-1].role != "user":
                turns.pop()
            if turns and not example.raw and len(found) < count:
                system = instructions(example, self.template)
                found.append((*((("system", system),) if system else ()), *((turn.role, turn.content) for turn in turns)))
        if not found:
            raise DataError(f"{source} has no dialogues whose questions could be answered: leave --replies away")
        return found


def _answer(
    read: _Reading, entered: Embedded | Joined, tuned: Any, source: str, count: int, max_new_tokens: int
) -> tuple[ReferenceAnswers, list[int]]:
    from corolla.chat.requests import Rendering
    from corolla.client.batch import Batch, BatchConfig
    from corolla.client.batch_requests import BatchRequest
    from corolla.tuning.evaluation_text import describe_answers

    if _is_prepared(source):
        raise InvalidSetting("replies", f"{source} is prepared data, which has no questions any more: name the file that it was made of")
    asked = [BatchRequest(index, str(index), messages=turns) for index, turns in enumerate(read.questions(source, count))]
    rendering = Rendering(tokenizer=read.tokenizer, template=read.template, defaults={"max_tokens_to_generate": max_new_tokens})
    config = BatchConfig(concurrency=entered.sessions, cache_tokens=entered.cache_tokens)
    results: dict[int, dict[str, Any]] = {}
    Batch(entered.transport, entered.peer, read.tokenizer, rendering, results.__setitem__, config, prompt=tuned).run(iter(asked))
    answered = [results[index] for index in sorted(results) if "error" not in results[index]]
    if not answered:
        raise DataError(f"{source}: none of its questions could be answered: {results[0]['error']['message']}")
    lengths = [result["completion_tokens"] for result in answered]
    ended = [result["finish_reason"] == "stop" for result in answered]
    return describe_answers([result["text"] for result in answered], lengths, ended), lengths


def _is_prepared(source: str) -> bool:
    from corolla.data.layout import METADATA, UNFINISHED

    return any((Path(source) / name).exists() for name in (METADATA, UNFINISHED))


def _language(given: str) -> tuple[str, str]:
    language, equals, file = given.partition("=")
    if not (language and equals and file):
        raise InvalidSetting("words", f"{given!r} is not LANGUAGE=FILE, as in fr=french.txt")
    try:
        return language, Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no UTF-8") from None


def _per_word(model: str, others: list[str], texts: dict[str, str]) -> dict[str, dict[str, float]]:
    from corolla.client.tokenizer import TextTokenizer
    from corolla.models.catalog import resolve
    from corolla.tuning.evaluation_text import tokens_per_word

    found = {}
    for name in dict.fromkeys([model, *others]):
        tokenizer = TextTokenizer(resolve(name, weights=False))
        found[name] = {language: tokens_per_word(tokenizer, text) for language, text in texts.items()}
    return found


def _show(losses: dict[str, Loss], answers: dict[str, ReferenceAnswers], per_word: dict[str, dict[str, float]]) -> None:
    from rich.console import Console

    console = Console()
    if losses:
        table = _table("data", "articles", "tokens", "loss", "perplexity")
        for source, found in losses.items():
            table.add_row(source, f"{len(found.articles):,}", f"{found.tokens:,}", f"{found.loss:.4f}", f"{found.perplexity:.3f}")
        console.print(table)
    if answers:
        table = _table("answers", *(Path(source).name for source in answers))
        rows: dict[str, Callable[[ReferenceAnswers], str]] = {"number": lambda given: f"{given.count:,}"}
        for n in (1, 2, 3):
            rows[f"distinct-{n}"] = lambda given, n=n: f"{given.distinct[n]:.3f}"  # type: ignore[misc]
        rows["mean length, tokens"] = lambda given: f"{given.mean_length:.1f}"
        rows["median length"] = lambda given: f"{given.median_length:.0f}"
        rows["longest"] = lambda given: f"{given.longest:,}"
        rows["ended by themselves"] = lambda given: f"{given.ended:.0%}"
        for name, figure in rows.items():
            table.add_row(name, *(figure(given) for given in answers.values()))
        console.print(table)
    if per_word:
        table = _table("tokens a word", *per_word)
        for language in next(iter(per_word.values())):
            table.add_row(language, *(f"{figures[language]:.2f}" for figures in per_word.values()))
        console.print(table)


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table
