from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from fakes import FakeEngine

from corolla.client.session import Session
from corolla.errors import Busy, DeadlineExceeded, EmptyPrompt, InvalidSetting, NetworkError, PromptTooLong, ServerFault
from corolla.messages import Cancel, Close, Gap, Score, Scores, Token
from corolla.types import FinishReason, GenerationSettings

SETTINGS = GenerationSettings(max_tokens_to_generate=3, stop_token_ids=(99,))


SCORED = GenerationSettings(max_tokens_to_generate=3, prompt_logprobs=True)
STOPPED = """
import sys, threading
from corolla.client.session import Session
from corolla.swarm.local import LocalTransport
from corolla.messages import Token
from corolla.types import FinishReason, GenerationSettings, Step

def answer(step, deliver):
    sys.stdin.readline()
    for position in (1, 2, 3):
        deliver(Token(step.session, step.generation, position, 7, -0.5, finish=FinishReason.LENGTH if position == 3 else None))

def receive(message, deliver):
    if isinstance(message, Step):
        threading.Thread(target=answer, args=(message, deliver), daemon=True).start()
        print("waiting", flush=True)

transport = LocalTransport()
transport.listen("server", receive)
tokens = Session(transport, "server").generate([5], GenerationSettings(max_tokens_to_generate=3), timeout=1.0)
print(len(list(tokens)), "tokens", flush=True)
"""


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(lambda history: itertools.count(len(history) * 100))
    yield engine
    engine.stop()


@pytest.fixture
def session(engine: FakeEngine) -> Session:
    return Session(engine.transport, "fake")


def sent(engine: FakeEngine) -> list[tuple[int, list[int]]]:
    return [(step.start, list(step.payload)) for step in engine.steps]


def test_an_answer_joins_the_history(session: Session) -> None:
    tokens = list(session.generate([5, 6], SETTINGS))
    assert [token.token_id for token in tokens] == [200, 201, 202]
    assert [token.finish for token in tokens] == [None, None, FinishReason.LENGTH]
    assert session.tokens == [5, 6, 200, 201, 202]


def test_only_what_the_server_lacks_is_sent(session: Session, engine: FakeEngine) -> None:
    list(session.generate([5, 6], SETTINGS))
    list(session.generate([7], SETTINGS))
    assert sent(engine) == [(0, [5, 6]), (4, [202, 7])]


def test_an_answer_may_be_continued_without_new_tokens(session: Session, engine: FakeEngine) -> None:
    list(session.generate([5, 6], SETTINGS))
    list(session.generate([], SETTINGS))
    assert sent(engine)[1] == (4, [202])


def test_a_rolled_back_session_goes_on_from_there(session: Session, engine: FakeEngine) -> None:
    list(session.generate([5, 6], SETTINGS))
    session.rollback(3)
    list(session.generate([], SETTINGS))
    assert sent(engine)[1] == (2, [200])
    assert session.tokens[:4] == [5, 6, 200, 300]
    with pytest.raises(ValueError, match="position 9"):
        session.rollback(9)


def test_a_server_that_forgot_is_sent_the_history_again(session: Session, engine: FakeEngine) -> None:
    list(session.generate([5, 6], SETTINGS))
    engine.forget(keep=1)
    list(session.generate([7], SETTINGS))
    assert sent(engine)[1:] == [(4, [202, 7]), (1, [6, 200, 201, 202, 7])]
    assert session.position == 9


def test_a_gap_that_cannot_be_is_the_servers_fault(session: Session, engine: FakeEngine) -> None:
    engine.silent = True
    tokens = session.generate([5], SETTINGS)
    session._replies.put(Gap(session.name, 1, 8))
    with pytest.raises(ServerFault):
        next(tokens)


def test_late_and_repeated_replies_are_ignored(session: Session) -> None:
    tokens = session.generate([5, 6], SETTINGS)
    first = next(tokens)
    for stray in (first, Token(session.name, 0, 3, 7, 0.0), Token("another", 1, 3, 7, 0.0)):
        session._replies.put(stray)
    assert [token.token_id for token in tokens] == [201, 202]


def test_closing_the_answer_cancels_it(session: Session, engine: FakeEngine) -> None:
    endless = GenerationSettings(max_tokens_to_generate=10**9)
    tokens = session.generate([5, 6], endless)
    assert next(tokens).token_id == 200
    tokens.close()
    assert engine.received[-1] == Cancel(session.name, 1)
    assert session.tokens == [5, 6, 200]
    assert next(session.generate([7], endless)).token_id == 400


def test_a_finished_answer_is_not_cancelled(session: Session, engine: FakeEngine) -> None:
    list(session.generate([5], SETTINGS))
    assert len(engine.received) == 1


def test_every_wait_has_a_deadline(session: Session, engine: FakeEngine) -> None:
    engine.silent = True
    with pytest.raises(DeadlineExceeded):
        next(session.generate([5], SETTINGS, timeout=0.05))
    assert isinstance(engine.received[-1], Cancel)
    engine.silent = False
    assert len(list(session.generate([], SETTINGS))) == 3


def test_a_busy_server_is_asked_again(session: Session, engine: FakeEngine) -> None:
    engine.refuse = [Busy(0.02)]
    engine.fail = [Busy(0.02)]
    began = time.monotonic()
    assert len(list(session.generate([5], SETTINGS))) == 3
    assert time.monotonic() - began >= 0.04
    assert len(engine.steps) == 3


def test_a_server_that_is_full_for_no_time_is_not_asked_again_and_again(session: Session, engine: FakeEngine) -> None:
    engine.fail = [Busy(0.0) for _ in range(1000)]
    with pytest.raises(Busy):
        next(session.generate([5], SETTINGS, timeout=1.0))
    assert 3 <= len(engine.steps) <= 11


def test_a_reader_that_takes_its_time_runs_into_no_deadline(session: Session) -> None:
    tokens = session.generate([5], SETTINGS, timeout=0.3)
    next(tokens)
    time.sleep(0.4)  # all tokens are there
    assert len(list(tokens)) == 2


def test_scores_that_say_nothing_new_prolong_no_deadline(session: Session, engine: FakeEngine) -> None:
    engine.silent = True
    tokens = session.generate([5, 6], SCORED, timeout=0.5)
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.05):
            session._replies.put(Scores(session.name, 1, 1, (Score(-0.5, ()),)))

    dripping = threading.Thread(target=drip)
    dripping.start()
    with pytest.raises(DeadlineExceeded):
        next(tokens)
    over.set()
    dripping.join()


def test_what_came_while_the_process_was_stopped_is_an_answer() -> None:
    """A session in another process, which stands still for longer than it would wait."""
    process = subprocess.Popen([sys.executable, "-c", STOPPED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        answered, _ = process.communicate("answer\n", timeout=30.0)
    assert answered == "3 tokens\n"


def test_a_server_busy_beyond_the_deadline_says_so(session: Session, engine: FakeEngine) -> None:
    engine.refuse = [Busy(30.0)]
    with pytest.raises(Busy):
        next(session.generate([5], SETTINGS, timeout=1.0))


@pytest.mark.parametrize("when", ["refuse", "fail"])
def test_a_callers_error_leaves_the_history_as_it_was(session: Session, engine: FakeEngine, when: str) -> None:
    list(session.generate([5], SETTINGS))
    setattr(engine, when, [PromptTooLong(9, 8)])
    with pytest.raises(PromptTooLong):
        next(session.generate([6, 7], SETTINGS))
    assert session.position == 4


def test_a_failed_step_can_be_tried_again(session: Session, engine: FakeEngine) -> None:
    engine.fail = [ServerFault("the server lost a block")]
    with pytest.raises(ServerFault):
        next(session.generate([5], SETTINGS))
    assert session.tokens == [5]
    assert len(list(session.generate([], SETTINGS))) == 3


def test_nothing_to_go_on_from(session: Session) -> None:
    with pytest.raises(EmptyPrompt):
        next(session.generate([], SETTINGS))
    with pytest.raises(InvalidSetting):
        GenerationSettings(temperature=2.5)


def test_common_prefix(session: Session) -> None:
    session.tokens = [1, 2, 3]
    assert [session.common_prefix(tokens) for tokens in ([], [1, 2], [1, 9, 3], [1, 2, 3, 4])] == [0, 2, 1, 3]


def test_leaving_closes_the_session(engine: FakeEngine) -> None:
    with Session(engine.transport, "fake") as session:
        pass
    session.close()
    assert engine.received == [Close(session.name)]


def test_leaving_a_server_that_is_gone(engine: FakeEngine, session: Session) -> None:
    engine.transport.leave("fake")
    with pytest.raises(NetworkError):
        next(session.generate([1], SETTINGS))
    session.close()
