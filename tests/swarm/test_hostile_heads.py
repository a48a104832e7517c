"""Servers that lie to a client, stall or are full: the answer goes on elsewhere, and nobody honest is banned."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any

import msgspec
import pytest

from corolla.client.session import Session
from corolla.errors import Busy, DeadlineExceeded, InvalidSetting, NetworkError, NoRoute, PromptTooLong
from corolla.messages import Ask, FailedFrame, Gap, Pong, Score, Scores, StepFrame, Token, Whereabouts, WireMessage
from corolla.models.reference import Reference
from corolla.types import FinishReason, GenerationSettings
from tests.models import tiny
from tests.swarm.hostile import BIG, COUNT, GREEDY, PATIENCE, PROMPT, Alter, Swarm, answer, named

SCORED = GenerationSettings(max_tokens_to_generate=COUNT, prompt_logprobs=True, top_logprobs=2)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[int]:
    return Reference(directory).greedy(PROMPT, COUNT)


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    """The head c is hostile, c2 is honest and slower."""
    swarm = Swarm(directory)
    for name, start, end, throughput in (("a", 0, 1, 100.0), ("b", 1, 3, 100.0), ("c", 3, 4, 100.0), ("c2", 3, 4, 1.0)):
        swarm.add(name, start, end, throughput)
    yield swarm
    swarm.close()


def with_token(**fields: Any) -> Alter:
    return instead(lambda token: msgspec.structs.replace(token, **fields))


def instead(make: Callable[[Token], WireMessage | list[WireMessage]], after: int = 3) -> Alter:
    def alter(message: WireMessage) -> WireMessage | list[WireMessage]:
        return make(message) if isinstance(message, Token) and message.position >= len(PROMPT) + after else message

    return alter


def failure(kind: str, text: str = "no", retry_after: float | None = None) -> Alter:
    return instead(lambda token: FailedFrame(token.session, token.generation, kind, text, retry_after, "c"))


def endless(token: Token) -> list[WireMessage]:
    """The answer ends, and goes on as fast as the head likes."""
    more = range(token.position, token.position + 1000)
    return [msgspec.structs.replace(token, finish=None, position=position) for position in more]


def scores(start: int, count: int = 1) -> Alter:
    return instead(lambda token: Scores(token.session, token.generation, start, (Score(-1.0),) * count))


LIES = {
    "a token outside the vocabulary": with_token(token_id=tiny.VOCABULARY),
    "a token far outside": with_token(token_id=BIG),
    "a position far ahead": with_token(position=BIG),
    "a token without a probability": with_token(logprob=float("-inf")),
    "an alternative without a probability": with_token(top_logprobs=((3, float("-inf")),)),
    "alternatives that nobody asked for": with_token(top_logprobs=((3, -1.0),)),
    "an end token that is none": with_token(finish=FinishReason.STOP),
    "tokens beyond the last": instead(endless, after=COUNT - 1),
    "scores that nobody asked for": scores(1),
    "a gap above what it was sent": instead(lambda token: Gap(token.session, token.generation, BIG)),
    "a soft prompt that nobody named": failure("PromptNeeded"),
    "an adapter that nobody named": failure("AdapterNeeded"),
}
KINDS = ("ServerFault", "KeyboardInterrupt", "StorageError", "Unauthorized", "Interrupted", "NoRoute", "RateLimited", "DeadlineExceeded")
FAILURES = {kind: failure(kind, retry_after=0.0) for kind in KINDS}


@pytest.mark.parametrize("alter", named(LIES))
def test_what_no_honest_server_answers_is_counted_and_ends_in_a_ban(swarm: Swarm, expected: list[int], alter: Alter) -> None:
    swarm.alters["c"] = alter
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert swarm.altered["c"]
    assert honest.bans.banned() == {"c"}
    assert (honest.counters.lies, honest.counters.faults) == (1, 1)
    swarm.check_integrity()


@pytest.mark.parametrize("alter", named(FAILURES))
def test_an_error_that_no_server_raises_is_its_fault(swarm: Swarm, expected: list[int], alter: Alter) -> None:
    swarm.alters["c"] = alter
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert honest.bans.banned() == {"c"}


def test_tokens_after_an_answer_has_ended_ban_their_server(swarm: Swarm, expected: list[int]) -> None:
    swarm.alters["c"] = instead(
        lambda token: [token, msgspec.structs.replace(token, position=token.position + 1)] if token.finish else token
    )
    honest = swarm.client("honest")
    with Session(honest, "") as session:
        assert [token.token_id for token in session.generate(PROMPT, GREEDY, timeout=PATIENCE)] == expected
        assert len(list(session.generate([7], GREEDY, timeout=PATIENCE))) == COUNT
    assert honest.bans.banned() == {"c"}


@pytest.mark.parametrize("alter", [scores(0), scores(3, 60), instead(lambda token: [])], ids=["too early", "too many", "kept back"])
def test_scores_that_cannot_be_are_asked_for_elsewhere(swarm: Swarm, alter: Alter) -> None:
    """Nothing is said of the first token, and a prompt's scores come before the answer."""
    honest = swarm.client("honest")
    said: list[WireMessage] = []

    def lie(message: WireMessage) -> WireMessage | list[WireMessage]:
        if not isinstance(message, Scores):
            return message
        said.append(message)
        return alter(Token(message.session, message.generation, len(PROMPT) + 9, 0, 0.0))

    swarm.alters["c"] = lie
    with Session(honest, "") as session:
        assert len(list(session.generate(PROMPT, SCORED, timeout=PATIENCE))) == COUNT
        assert sorted(session.scores) == list(range(1, len(PROMPT)))
    assert said
    assert honest.bans.banned() == {"c"}


# Full servers.


@pytest.mark.parametrize("retry_after", [0.0, 1e9])
def test_a_full_server_is_gone_around_at_once(swarm: Swarm, expected: list[int], retry_after: float) -> None:
    swarm.alters["c"] = failure("Busy", retry_after=retry_after)
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert not honest.bans.banned()
    assert (honest.counters.full, honest.counters.moves, honest.counters.replays) == (1, 1, 1)


def test_where_all_servers_are_full_they_are_asked_now_and_then_until_the_deadline(swarm: Swarm) -> None:
    asked: set[tuple[str, int]] = set()

    def full(name: str, token: Token) -> FailedFrame:
        asked.add((name, token.generation))
        return FailedFrame(token.session, token.generation, "Busy", "full", 0.0, name)

    for name in ("c", "c2"):
        swarm.alters[name] = instead(partial(full, name), after=0)
    honest = swarm.client("honest")
    with Session(honest, "") as session, pytest.raises((Busy, DeadlineExceeded)):
        list(session.generate(PROMPT, GREEDY, timeout=1.5))
    assert 2 <= len(asked) <= 14
    assert not honest.bans.banned()


# Errors that blame the caller.


@pytest.mark.parametrize("kind", ["InvalidSetting", "PromptTooLong", "EmptyPrompt"])
def test_an_error_that_blames_the_caller_is_tried_at_another_route(swarm: Swarm, expected: list[int], kind: str) -> None:
    swarm.alters["c"] = failure(kind)
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert not honest.bans.banned()
    assert honest.counters.refusals == 1


def test_what_two_routes_refuse_reaches_the_caller_in_plain_words(swarm: Swarm) -> None:
    forged = "\x1b]0;owned\x07\x1b[31mpay here: evil.example\x1b[0m\nerror: a second line\u202e" + "x" * 3000
    for name in ("c", "c2"):
        swarm.alters[name] = failure("InvalidSetting", forged)
    honest = swarm.client("honest")
    with Session(honest, "") as session, pytest.raises(InvalidSetting) as error:
        list(session.generate(PROMPT, GREEDY, timeout=PATIENCE))
    text = str(error.value)
    assert text.startswith("a server said: ")
    assert text.isprintable()
    assert len(text) < 500
    assert honest.counters.refusals == 1


def test_a_refusal_is_believed_where_there_is_no_other_route(swarm: Swarm) -> None:
    del swarm.records["c2"]
    swarm.alters["c"] = failure("PromptTooLong")
    honest = swarm.client("honest")
    with Session(honest, "") as session:
        for _ in range(2):
            with pytest.raises(PromptTooLong):
                list(session.generate(PROMPT, GREEDY, timeout=PATIENCE))
    assert (honest.counters.refusals, honest.counters.faults) == (0, 0)


# Servers that stall.


def stall(swarm: Swarm, name: str, cached: Callable[[], int], pending: int | None) -> None:
    """The server lives, and steps vanish in it. Of a session it says what it likes, or nothing."""

    def alter(message: WireMessage) -> WireMessage | list[WireMessage]:
        if isinstance(message, Ask) and pending is not None:
            swarm.hub.carry(name, "honest", Whereabouts(message.session, message.generation, cached(), pending))
        return [] if isinstance(message, (StepFrame, Ask)) else message

    swarm.gets[name] = alter


STALLS: dict[str, tuple[Callable[[], int], int | None]] = {
    "rows pending for ever": (lambda: 0, 1),
    "more and more cached than there is": (count(len(PROMPT)).__next__, 1),
    "now more, now less": (cycle((20, 0)).__next__, 1),
    "nothing": (lambda: 0, None),
}


@pytest.mark.parametrize("case", named(STALLS))
def test_a_server_that_claims_to_compute_is_left_when_nothing_gets_on(
    swarm: Swarm, expected: list[int], case: tuple[Callable[[], int], int | None]
) -> None:
    stall(swarm, "c", *case)
    honest = swarm.client("honest", answer=0.4, lost=0.4)
    assert answer(honest) == expected
    assert honest.bans.banned() == {"c"}


def test_a_server_that_claims_to_have_nothing_left_is_gone_around_and_banned_the_second_time(swarm: Swarm, expected: list[int]) -> None:
    stall(swarm, "c", lambda: len(PROMPT), 0)
    honest = swarm.client("honest", answer=0.4, lost=0.4)
    assert answer(honest) == expected
    assert (honest.counters.moves, honest.counters.faults) == (1, 0)
    del swarm.records["c2"]
    with Session(honest, "") as session, pytest.raises((DeadlineExceeded, NoRoute)):
        list(session.generate(PROMPT, GREEDY, timeout=2.0))
    assert honest.bans.banned() == {"c"}


def test_a_slow_server_whose_prompt_gets_on_is_not_left(swarm: Swarm, expected: list[int]) -> None:
    """It answers after many rounds of questions."""
    cached = count(1)
    held: list[WireMessage] = []

    def slow(message: WireMessage) -> WireMessage | list[WireMessage]:
        if isinstance(message, Ask):
            done = next(cached)
            swarm.hub.carry("c", "honest", Whereabouts(message.session, message.generation, done, len(PROMPT) - done))
            if done == 6:
                swarm.gets["c"] = lambda message: message
                for each in held:
                    swarm.hub.carry("b", "c", each)
        if isinstance(message, StepFrame):
            held.append(message)
        return [] if isinstance(message, (StepFrame, Ask)) else message

    swarm.gets["c"] = slow
    honest = swarm.client("honest", answer=0.4, lost=0.2)
    assert answer(honest) == expected
    assert not honest.bans.banned()
    assert honest.counters.replays == 0


def test_a_slow_server_that_nobody_can_stand_in_for_is_kept(swarm: Swarm) -> None:
    del swarm.records["c2"]
    stall(swarm, "c", lambda: 0, 1)
    honest = swarm.client("honest", answer=0.4, lost=0.2)
    with Session(honest, "") as session, pytest.raises(DeadlineExceeded):
        list(session.generate(PROMPT, GREEDY, timeout=1.5))
    assert not honest.bans.banned()


def test_scores_that_come_again_and_again_prolong_no_deadline(swarm: Swarm) -> None:
    del swarm.records["c2"]

    def drip(message: WireMessage) -> WireMessage | list[WireMessage]:
        if isinstance(message, Scores) and len(message.scores) > 1:
            first = msgspec.structs.replace(message, scores=message.scores[:1])
            threading.Thread(target=repeat, args=(first,), daemon=True).start()
            return first
        return [] if isinstance(message, Token) else message

    over = threading.Event()

    def repeat(frame: WireMessage) -> None:
        with suppress(NetworkError):
            while not over.wait(0.1):
                swarm.hub.carry("c", "honest", frame)

    swarm.alters["c"] = drip
    with Session(swarm.client("honest"), "") as session, pytest.raises(DeadlineExceeded):
        list(session.generate(PROMPT, SCORED, timeout=1.0))
    over.set()


def test_a_server_whose_engine_is_dead_is_left_though_it_answers(swarm: Swarm, expected: list[int]) -> None:
    stall(swarm, "c", lambda: 0, 1)
    swarm.alters["c"] = lambda message: Pong(message.nonce, failing=True) if isinstance(message, Pong) else message
    honest = swarm.client("honest", silence=0.2, answer=0.4)
    assert answer(honest) == expected
    assert honest.bans.banned() == {"c"}


# Honest servers between hostile ones, and answers that get lost.


def test_gaps_for_ever_are_gone_around_and_ban_nobody(swarm: Swarm, expected: list[int]) -> None:
    """The server before it may keep back what it lacks."""
    swarm.alters["c"] = instead(lambda token: Gap(token.session, token.generation, 0))
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert not honest.bans.banned()
    assert swarm.routes[-1].peers == ("a", "b", "c2")


def test_a_gap_after_each_token_does_not_go_on_for_ever(swarm: Swarm) -> None:
    answered: Counter[int] = Counter()  # by generation

    def alter(message: WireMessage) -> WireMessage | list[WireMessage]:
        if not isinstance(message, Token):
            return message
        answered[message.generation] += 1
        gap = Gap(message.session, message.generation, 0)
        return message if answered[message.generation] == 1 else [gap] if answered[message.generation] == 2 else []

    swarm.alters["c"] = alter
    honest = swarm.client("honest")
    assert len(answer(honest, GenerationSettings(max_tokens_to_generate=40))) == 40
    assert 20 < len(answered) < 30
    assert swarm.routes[-1].peers == ("a", "b", "c2")


def test_an_answer_that_got_lost_is_asked_for_again_and_bans_nobody(swarm: Swarm, expected: list[int]) -> None:
    lost: list[WireMessage] = []

    def lose(token: Token) -> Token | list[WireMessage]:
        if lost:
            return token
        lost.append(token)
        return []

    swarm.alters["c"] = instead(lose)
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert (honest.counters.replays, honest.counters.faults) == (1, 0)


def test_a_head_that_loses_answers_again_and_again_is_left(swarm: Swarm, expected: list[int]) -> None:
    swarm.alters["c"] = instead(lambda token: [] if token.position % 3 == 0 else token)
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert honest.bans.banned() == {"c"}


def test_only_the_head_answers_tokens(swarm: Swarm, expected: list[int]) -> None:
    """A server in the middle that sends the client tokens of its own."""
    swarm.add("b2", 1, 3, throughput=1.0)

    def alter(message: WireMessage) -> WireMessage:
        if isinstance(message, StepFrame) and message.hidden is not None:
            swarm.hub.carry("b", "honest", Token(message.session, message.generation, len(PROMPT), 1, -0.1))
        return message

    swarm.alters["b"] = alter
    honest = swarm.client("honest")
    assert answer(honest) == expected
    assert honest.bans.banned() == {"b"}
