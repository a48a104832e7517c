"""`corolla prepare`: dialogues and texts as packed sequences to train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from corolla.cli.progress import showing_progress
from corolla.errors import CheckpointError, DataError, InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Mapping

INPUT = "What is read"
ARTICLES = "Articles"
SEQUENCES = "Sequences"
LOOKING = "Looking at prepared data"


def prepare(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="INPUT...", help="Files (.gz too), directories, or datasets of the hub: dolly, oasst1, oig, personachat, owner/name."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the sequences go; new or empty, or left unfinished.")] = None,
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="An alias, a directory or a hub id: whose tokens to make.")] = "smollm2",
    template: Annotated[
        str,
        typer.Option(
            help="bloomchat (`<human>:` and `<bot>:`), sft-chat, petals, plain, or tokenizer for its own.", rich_help_panel=ARTICLES
        ),
    ] = "bloomchat",
    max_length: Annotated[int, typer.Option(help="The length of a sequence, in tokens.", rich_help_panel=SEQUENCES)] = 2048,
    packing: Annotated[
        Literal["full", "greedy", "single"],
        typer.Option(help="A stream cut into sequences; whole articles while they fit; or one in each.", rich_help_panel=SEQUENCES),
    ] = "greedy",
    seed: Annotated[int, typer.Option(help="Decides the order and what is held out.", rich_help_panel=SEQUENCES)] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle the articles, or keep their order.", rich_help_panel=SEQUENCES)] = True,
    dev: Annotated[float, typer.Option(metavar="SHARE", help="Held out as dev, 0 to 1.", rich_help_panel=SEQUENCES)] = 0.0,
    test: Annotated[float, typer.Option(metavar="SHARE", help="Held out as test, 0 to 1.", rich_help_panel=SEQUENCES)] = 0.0,
    train_files: Annotated[int, typer.Option(help="Files to balance the training sequences over.", rich_help_panel=SEQUENCES)] = 1,
    dev_files: Annotated[int, typer.Option(help="Files to balance the dev sequences over.", rich_help_panel=SEQUENCES)] = 1,
    categories: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Write category_ids: a JSON object of numbers by name, or auto, in the names' order.",
            rich_help_panel=SEQUENCES,
        ),
    ] = None,
    keep_prompt_only: Annotated[
        bool, typer.Option("--keep-prompt-only", help="Keep sequences of which nothing is trained on.", rich_help_panel=SEQUENCES)
    ] = False,
    loss: Annotated[
        Literal["answers", "all"], typer.Option(help="Train on the answers, or on every token, as BLOOMChat was.", rich_help_panel=ARTICLES)
    ] = "answers",
    history: Annotated[
        int | None, typer.Option(metavar="N", help="Each answer its own article, with N turns before it.", rich_help_panel=ARTICLES)
    ] = None,
    truncation: Annotated[
        Literal["right", "left", "drop"],
        typer.Option(help="Which end of an over-long article goes, or all of it.", rich_help_panel=ARTICLES),
    ] = "right",
    boundary: Annotated[
        Literal["article", "pair"], typer.Option(help="Attend within a list of pairs, or within each pair.", rich_help_panel=ARTICLES)
    ] = "article",
    min_tokens: Annotated[int, typer.Option(help="Leave out shorter articles.", rich_help_panel=ARTICLES)] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Leave out longer articles.", rich_help_panel=ARTICLES)] = None,
    duplicates: Annotated[
        Literal["keep", "exact", "near"],
        typer.Option(help="Leave out what is said again, to the letter or nearly so (MinHash).", rich_help_panel=INPUT),
    ] = "keep",
    similarity: Annotated[
        float, typer.Option(help="With --duplicates near: from what share of words in common on.", rich_help_panel=INPUT)
    ] = 0.8,
    format: Annotated[str | None, typer.Option(help="The inputs' format; recognized by default.", rich_help_panel=INPUT)] = None,
    split: Annotated[str, typer.Option(help="The part of a dataset or of a JSON document.", rich_help_panel=INPUT)] = "train",
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first line that cannot be used.", rich_help_panel=INPUT)] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores by default. The bytes are the same.", min=1)] = None,
    inspect: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Check prepared data and show its first sequences, trained on in green.", rich_help_panel=LOOKING),
    ] = None,
    part: Annotated[
        Literal["train", "dev", "test"], typer.Option(help="With --inspect: of which part.", rich_help_panel=LOOKING)
    ] = "train",
    count: Annotated[int, typer.Option(help="With --inspect: how many sequences.", min=0, rich_help_panel=LOOKING)] = 3,
    plot: Annotated[
        bool, typer.Option("--plot", help="Write lengths.png and utilization.png beside the data.", rich_help_panel=LOOKING)
    ] = False,
) -> None:
    """Prepare dialogues and texts to train on: tokens, what of them is trained on, packed into sequences, in HDF5 files.

    corolla prepare dialogues.jsonl --output prepared --tokenizer smollm2 --max-length 2048 --dev 0.02

    The same seed and inputs make the same bytes. A run that was killed goes on when it is started again.
    """
    if inspect is None and (not inputs or output is None):
        raise InvalidSetting("prepare", "give INPUT... and --output DIR, or --inspect DIR")
    if inspect is not None and (inputs or output is not None):
        raise InvalidSetting("inspect", "it looks at prepared data, and prepares none: give it without INPUT and --output")
    if inspect is not None:
        from corolla.cli.inspecting import show

        show(inspect, part, count)
    else:
        assert inputs is not None, "checked above"
        assert output is not None, "checked above"

        from corolla.data.prepare import PrepareSettings
        from corolla.data.render import RenderSettings

        rendering = RenderSettings(
            truncation=truncation, loss=loss, history=history, boundary=boundary, shortest=min_tokens, longest=max_tokens
        )
        settings = PrepareSettings(
            inputs=tuple(inputs),
            tokenizer=_tokenizer(tokenizer),
            template=template,
            max_length=max_length,
            packing=packing,
            render=rendering,
            seed=seed,
            shuffle=shuffle,
            dev=dev,
            test=test,
            files={"train": train_files, "dev": dev_files},
            categories=_categories(categories),
            duplicates=duplicates,
            similarity=similarity,
            keep_prompt_only=keep_prompt_only,
            format=format,
            split=split,
            strict=strict,
            workers=workers,
        )
        _prepare(settings, output)
    if plot:
        from corolla.data.plots import plot_lengths

        for path in plot_lengths(inspect or output):  # type: ignore[arg-type]  # one of them is given
            typer.echo(f"wrote {path}")


def _prepare(settings: Any, output: Path) -> None:
    from corolla.data.prepare import prepare as run
    from corolla.data.problems import Problems

    with showing_progress() as progress:
        problems = Problems(strict=settings.strict, tell=lambda message: typer.echo(f"skipped {message}", err=True))
        metrics = run(settings, output, progress, problems)
    _print(metrics, output)


def _tokenizer(name: str) -> Path:
    """The directory of the tokenizer's files; a local directory needs nothing but tokenizer.json."""
    from corolla.models.catalog import resolve

    if (Path(name) / "tokenizer.json").is_file():
        return Path(name)
    with showing_progress() as progress:
        directory = Path(resolve(name, weights=False, progress=progress))
    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(f"{directory} has no tokenizer.json: name a model with a fast tokenizer")
    return directory


def _categories(given: str | None) -> Mapping[str, int] | Literal["auto"] | None:
    import json

    if given is None or given == "auto":
        return given  # type: ignore[return-value]  # no more than these two strings
    try:
        content = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{given} cannot be read as JSON ({error}): give an object of numbers by name") from None
    if not isinstance(content, dict) or not all(type(number) is int and 0 <= number < 2**31 for number in content.values()):
        raise DataError(f'{given} is no JSON object of numbers (0 or more) by name, as in {{"closed_qa": 0}}')
    return content


def _print(metrics: Mapping[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("part", box=None, pad_edge=False)
    for name in ("articles", "sequences", "prompt tokens", "completion tokens", "padding tokens", "utilization"):
        table.add_column(name, justify="right")
    for part, figures in metrics["parts"].items():
        counted = [f"{figures[name]:,}" for name in ("articles", "sequences", "prompt_tokens", "completion_tokens", "padding_tokens")]
        table.add_row(part, *counted, f"{figures['utilization']:.1%}")
    console.print(table)
    left_out = [f"{count:,} {name.replace('_', ' ')}" for name, count in metrics["left_out"].items() if count]
    if left_out:
        console.print(f"left out: {', '.join(left_out)}", highlight=False)
    console.print(f"{output} is ready: corolla prepare --inspect {output}", highlight=False, soft_wrap=True)
