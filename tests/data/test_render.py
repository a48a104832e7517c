"""Dialogues as tokens: spelled as at inference, and trained on where the model has to speak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import toy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import processors

from corolla.chat.conversation import Conversation
from corolla.chat.templates import TEMPLATES, Turn, encode
from corolla.data.examples import Example, Place
from corolla.data.problems import Problems
from corolla.data.render import Renderer, RenderSettings, instructions
from corolla.data.tokens import Kind, Tokens, TrainingTokenizer
from corolla.errors import CallerError, CheckpointError, InvalidSetting

PLACE = Place("valid.txt", 7)
TURNS = (Turn("user", "hello"), Turn("assistant", "fine"), Turn("user", "and you?"), Turn("assistant", "fine too"))
START, END = 1, toy.END


def tokenizer_in(directory: Path, template: str | None = toy.CHATML) -> TrainingTokenizer:
    return TrainingTokenizer(toy.make_directory(directory, toy.byte_level(), template=template))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TrainingTokenizer:
    return tokenizer_in(tmp_path_factory.mktemp("toy"))


def example(turns: Sequence[Turn] = TURNS, **fields: Any) -> Example:
    return Example(turns=tuple(turns), place=PLACE, **fields)


def articles(tokenizer: TrainingTokenizer, name: str, shown: Example, **options: Any) -> list[Tokens]:
    return list(Renderer(tokenizer, TEMPLATES[name], RenderSettings(**options)).render(shown))


def spelled(tokenizer: TrainingTokenizer, article: Tokens) -> str:
    """The text, what is trained on in brackets: ids as `<n>` where they have no text."""
    pieces, inside = [], False
    for token_id, kind in zip(article.input_ids.tolist(), article.token_type_ids.tolist(), strict=True):
        trained = kind in (Kind.COMPLETION, Kind.END)
        if trained != inside:
            pieces.append("[" if trained else "]")
            inside = trained
        pieces.append(tokenizer.decode([token_id]) or f"<{token_id}>")
    return "".join(pieces) + "]" * inside


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bloomchat", "Kind.\n<human>: hello\n<bot>:[ fine\n<human>:] and you?\n<bot>:[ fine too\n<2>]"),  # `>:` is one token
        ("sft-chat", "Kind.\n<2>hello<1>[fine<2>]and you?<1>[fine too<2>]"),
        (
            "petals",
            "Kind.###Assistant: Hi! How can I help you?###Human: hello###Assistant:[ fine###]Human: and you?###Assistant:[ fine too###<2>]",
        ),
        ("plain", "Kind.\n\nUser: hello\nAssistant:[ fine\nUser:] and you?\nAssistant:[ fine too\n<2>]"),
        (
            "tokenizer",
            "<1>system\nKind.<2>\n<1>user\nhello<2>\n<1>assistant\n[fine<2>]\n<1>user\nand you?<2>\n<1>assistant\n[fine too<2>]",
        ),
    ],
)
def test_what_is_trained_on(tokenizer: TrainingTokenizer, name: str, text: str) -> None:
    (article,) = articles(tokenizer, name, example(system="Kind."))
    assert spelled(tokenizer, article) == text
    kinds = article.token_type_ids.tolist()
    assert kinds[-1] == Kind.END
    assert kinds.count(Kind.END) == 1


WORDS = st.text(st.sampled_from("ab .,!?\n<>:#é☃/s"), min_size=1).map(str.strip).filter(bool)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "sft-chat"])
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4), system=st.one_of(st.none(), WORDS))
@settings(deadline=None, max_examples=60)
def test_each_answer_begins_where_its_prompt_at_inference_ends(
    tokenizer: TrainingTokenizer, name: str, said: list[tuple[str, str]], system: str | None
) -> None:
    # In a model's own template typed special tokens are special, and an answer ends at the first end token.
    assume(name != "tokenizer" or not any(answer.startswith("</s>") for _, answer in said))
    turns = [Turn(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)]
    (article,) = articles(tokenizer, name, example(turns, system=system))
    conversation = Conversation(tokenizer, TEMPLATES[name], context_length=10_000, system=system)
    for question, answer in said:
        conversation.ask(question)
        prompt = conversation.prompt(room=1)
        assert article.input_ids[: len(prompt)].tolist() == prompt
        assert article.token_type_ids[len(prompt) - 1] == Kind.PROMPT
        assert article.token_type_ids[len(prompt)] == Kind.COMPLETION
        conversation.answer(answer)


def test_an_answer_that_begins_with_the_end_token_is_empty(tokenizer: TrainingTokenizer) -> None:
    assert not articles(tokenizer, "tokenizer", example([TURNS[0], Turn("assistant", "</s>never said")]))
    (article,) = articles(tokenizer, "tokenizer", example([*TURNS[:3], Turn("assistant", "</s>never said")]))
    assert article.input_ids[-1] == END
    assert article.token_type_ids[-2:].tolist() == [Kind.PROMPT, Kind.END]


@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_sft_chat_likewise(tokenizer: TrainingTokenizer, said: list[tuple[str, str]]) -> None:
    turns = [Turn(role, text) for pair in said for role, text in zip(("user", "assistant"), pair, strict=True)]
    (article,) = articles(tokenizer, "sft-chat", example(turns))
    for index in range(1, len(turns), 2):
        prompt = encode(TEMPLATES["sft-chat"], tokenizer, "", turns[:index])
        assert article.input_ids[: len(prompt)].tolist() == prompt
    assert article.input_ids[-1] == END


@pytest.mark.parametrize("name", TEMPLATES)
def test_loss_on_everything(tokenizer: TrainingTokenizer, name: str) -> None:
    (article,) = articles(tokenizer, name, example(), loss="all")
    assert article.trained.all()
    assert article.labels.tolist() == article.input_ids.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_typed_marks_stay_what_they_are_at_inference(tokenizer: TrainingTokenizer, name: str) -> None:
    turns = [Turn("user", "</s> ### <human>: x"), Turn("assistant", "### <human>: y")]
    (article,) = articles(tokenizer, name, example(turns))
    prompt = encode(TEMPLATES[name], tokenizer, TEMPLATES[name].system, turns[:1])
    assert article.input_ids[: len(prompt)].tolist() == prompt
    assert article.trained[len(prompt) :].all()


def test_windows_of_history(tokenizer: TrainingTokenizer) -> None:
    first, second = articles(tokenizer, "bloomchat", example(), history=1)
    assert spelled(tokenizer, first) == "<human>: hello\n<bot>:[ fine\n<2>]"
    assert spelled(tokenizer, second) == "<human>: and you?\n<bot>:[ fine too\n<2>]"
    _, longer = articles(tokenizer, "bloomchat", example(), history=3)
    assert spelled(tokenizer, longer) == "<human>: hello\n<bot>: fine\n<human>: and you?\n<bot>:[ fine too\n<2>]"
    assert spelled(tokenizer, articles(tokenizer, "sft-chat", example(), history=0)[1]) == "[fine too<2>]"


def test_what_follows_the_last_answer_is_left_out(tokenizer: TrainingTokenizer) -> None:
    (whole,) = articles(tokenizer, "tokenizer", example())
    (same,) = articles(tokenizer, "tokenizer", example([*TURNS, Turn("user", "bye")]))
    assert same.input_ids.tolist() == whole.input_ids.tolist()


def test_an_example_without_an_answer_has_no_article(tokenizer: TrainingTokenizer) -> None:
    assert not articles(tokenizer, "plain", example([Turn("user", "hello")]))
    assert not articles(tokenizer, "plain", example([]))


def test_persona_and_system(tokenizer: TrainingTokenizer) -> None:
    shown = example(persona=("i sing.", "i row."))
    assert instructions(shown, TEMPLATES["plain"]) == "Your persona: i sing. i row."
    assert instructions(shown, TEMPLATES["petals"]) == f"{TEMPLATES['petals'].system}\nYour persona: i sing. i row."
    assert instructions(example(system="Be kind."), TEMPLATES["petals"]) == "Be kind."
    (article,) = articles(tokenizer, "bloomchat", shown)
    assert spelled(tokenizer, article).startswith("Your persona: i sing. i row.\n<human>: hello")


def test_raw_pairs_end_one_by_one(tokenizer: TrainingTokenizer) -> None:
    pairs = example([Turn("user", "2 + 2 ="), Turn("assistant", " 4"), Turn("user", "so"), Turn("assistant", " 5")], raw=True)
    (article,) = articles(tokenizer, "bloomchat", pairs)
    assert spelled(tokenizer, article) == "2 + 2 =[ 4<2>]so[ 5<2>]"
    assert article.token_type_ids.tolist().count(Kind.END) == 1
    (apart,) = articles(tokenizer, "bloomchat", pairs, boundary="pair")
    assert apart.input_ids.tolist() == article.input_ids.tolist()
    assert apart.segments.max() == 2 - 1
    (open_end,) = articles(tokenizer, "bloomchat", example([*pairs.turns, Turn("user", "or")], raw=True))
    assert spelled(tokenizer, open_end).endswith("or[<2>]")


def test_raw_prompts_without_a_completion_are_left_out(tokenizer: TrainingTokenizer) -> None:
    shown = example([Turn("user", "2 + 2 =")], raw=True)
    assert not articles(tokenizer, "bloomchat", shown)
    assert articles(tokenizer, "bloomchat", shown, loss="all")[0].trained.all()


@pytest.mark.parametrize(("truncation", "part"), [("right", slice(None, 12)), ("left", slice(-12, None))])
def test_truncation(tokenizer: TrainingTokenizer, truncation: Any, part: slice) -> None:
    (whole,) = articles(tokenizer, "plain", example())
    renderer = Renderer(tokenizer, TEMPLATES["plain"], RenderSettings(max_length=12, truncation=truncation))
    (short,) = list(renderer.render(example([Turn("user", "a"), *TURNS[1:]]))) or [None]
    assert short is not None
    assert len(short) == 12
    assert renderer.counts.truncated_articles == 1
    (cut,) = articles(tokenizer, "plain", example(), max_length=len(whole) - 1, truncation="left")
    assert cut.input_ids.tolist() == whole.input_ids[1:].tolist()


def test_too_long_ones_are_dropped_and_counted(tokenizer: TrainingTokenizer) -> None:
    (whole,) = articles(tokenizer, "plain", example())
    renderer = Renderer(tokenizer, TEMPLATES["plain"], RenderSettings(max_length=len(whole) - 1, truncation="drop"))
    assert not list(renderer.render(example()))
    assert (renderer.counts.articles, renderer.counts.too_long_articles, renderer.counts.too_long_tokens) == (0, 1, len(whole))


def test_an_article_cut_before_its_answer_is_dropped_and_counted(tokenizer: TrainingTokenizer) -> None:
    renderer = Renderer(tokenizer, TEMPLATES["plain"], RenderSettings(max_length=4))
    assert not list(renderer.render(example()))
    assert (renderer.counts.untrained_articles, renderer.counts.truncated_articles) == (1, 0)


def test_counts_are_those_of_the_articles(tokenizer: TrainingTokenizer) -> None:
    renderer = Renderer(tokenizer, TEMPLATES["plain"])
    found = list(renderer.render_all([example()] * 3, Problems(strict=True)))
    assert renderer.counts.articles == 3
    assert renderer.counts.completion_tokens == sum(int(article.trained.sum()) for article in found)
    assert renderer.counts.prompt_tokens + renderer.counts.completion_tokens == sum(map(len, found))


def test_categories(tokenizer: TrainingTokenizer) -> None:
    renderer = Renderer(tokenizer, TEMPLATES["plain"], categories={"sums": 4})
    known, unknown = (next(renderer.render(example(category=name))) for name in ("sums", None))
    assert known.category_ids is not None
    assert unknown.category_ids is not None
    assert (set(known.category_ids.tolist()), set(unknown.category_ids.tolist())) == ({4}, {-1})


def test_an_example_that_cannot_be_rendered_is_a_problem(tokenizer: TrainingTokenizer) -> None:
    told: list[str] = []
    broken = example([Turn("user", "hello"), Turn("assistant", "\ud800")])
    found = list(Renderer(tokenizer, TEMPLATES["plain"]).render_all([broken, example()], Problems(tell=told.append)))
    assert len(found) == 1
    assert told == ["valid.txt:7: the text is not valid Unicode: check its encoding"]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation .roles must alternate."),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends an answer with no end token"),
        ("{% for m in messages %}{{ loop.revindex ~ m.content }}</s>{% endfor %}", "spells earlier turns differently"),
    ],
)
def test_own_templates_that_cannot_be_trained_with(tmp_path: Path, template: str, problem: str) -> None:
    with pytest.raises(CallerError, match=problem):
        articles(tokenizer_in(tmp_path, template), "tokenizer", example())


@pytest.mark.parametrize(("template", "problem"), [(None, "has no chat template"), ("{% if %}", "is damaged")])
def test_own_templates_that_are_none(tmp_path: Path, template: str | None, problem: str) -> None:
    with pytest.raises(CheckpointError, match=problem):
        Renderer(tokenizer_in(tmp_path, template), TEMPLATES["tokenizer"])


def test_a_tokenizer_without_an_end_token(tmp_path: Path) -> None:
    tokenizer = tokenizer_in(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert TrainingTokenizer(tmp_path).end_id == tokenizer.end_id == END
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CallerError, match=r"has no end token: name one as eos_token in tokenizer_config.json"):
        Renderer(TrainingTokenizer(tmp_path), TEMPLATES["plain"])


@pytest.mark.parametrize("setting", [{"max_length": 1}, {"history": -1}, {"loss": "some"}, {"truncation": "both"}, {"boundary": "turn"}])
def test_bad_settings(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidSetting, match=f"^{next(iter(setting))}: "):
        RenderSettings(**setting)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "tokenizer"])
def test_a_tokenizer_that_opens_every_text_and_has_no_words(tmp_path: Path, name: str) -> None:
    model = toy.metaspace()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    tokenizer = TrainingTokenizer(toy.make_directory(tmp_path, model))
    (article,) = articles(tokenizer, name, example(system="Bé ☃ kind."))
    for index in (1, 3):
        prompt = encode(TEMPLATES[name], tokenizer, "Bé ☃ kind.", TURNS[:index])
        assert article.input_ids[: len(prompt)].tolist() == prompt
        assert article.trained[len(prompt) - 1 : len(prompt) + 1].tolist() == [False, True]
    (raw,) = articles(tokenizer, name, example([Turn("assistant", "so")], raw=True))
    assert raw.input_ids.tolist() == [*tokenizer.encode("so", opening=True), END]
