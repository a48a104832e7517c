from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

from corolla.messages import Array, FailedFrame, ForwardFrame, Ping, Pong, ResultFrame, WireMessage
from corolla.swarm.probing import ProbeConfig, Probes
from corolla.swarm.records import ServerRecord
from tests.swarm.simulation import make_record

A = make_record("a", 0, 4)


class Asked:
    """Probes on a clock of their own, and what they sent."""

    def __init__(self, **config: Any) -> None:
        self.now = 100.0
        self.sent: list[tuple[str, WireMessage]] = []
        self.probes = Probes(self._send, ProbeConfig(**config), clock=lambda: self.now, chance=random.Random(0))

    def _send(self, peer: str, message: WireMessage) -> None:
        self.sent.append((peer, message))

    def ask(self, *records: ServerRecord, urgent: tuple[str, ...] = ()) -> list[str]:
        """Whom a call of `ask` sent something."""
        self.sent.clear()
        self.probes.ask(records, urgent)
        return sorted({peer for peer, _ in self.sent})

    def question(self, peer: str) -> ForwardFrame:
        return next(message for to, message in self.sent if to == peer and isinstance(message, ForwardFrame))

    def pong(self, peer: str) -> None:
        ping = next(message for to, message in self.sent if to == peer and isinstance(message, Ping))
        self.probes.receive(peer, Pong(ping.nonce))

    def answer(self, peer: str, values: list[float] | None = None, *, number: int | None = None) -> None:
        question = self.question(peer)
        row = [0.5] * question.hidden.shape[1] if values is None else values
        hidden = Array("float32", (1, len(row)), memoryview(array("f", row).tobytes()))
        self.probes.receive(peer, ResultFrame(question.call if number is None else number, hidden))

    def refuse(self, peer: str, kind: str) -> None:
        self.probes.receive(peer, FailedFrame(str(self.question(peer).call), 0, kind, "no"))

    def prove(self, record: ServerRecord, seconds: float = 0.0) -> None:
        self.ask(record)
        self.now += seconds
        self.answer(record.peer)


@pytest.fixture
def asked() -> Asked:
    return Asked()


def test_a_server_that_computes_a_row_over_all_its_blocks_is_proven(asked: Asked) -> None:
    assert asked.probes.verdict(A) == "unproven"
    assert asked.ask(A) == ["a"]
    question = asked.question("a")
    assert (question.start, question.end, question.lengths, question.hidden.shape) == (0, 4, (1,), (1, 64))
    assert asked.probes.believed([A]) == []
    asked.answer("a")
    assert asked.probes.verdict(A) == "proven"
    assert asked.probes.believed([A]) == [A]


@pytest.mark.parametrize(
    "values", [[1.0], [1.0] * 65, [float("nan")] * 64, [float("inf"), *[0.0] * 63], [*[0.0] * 62, float("inf"), float("-inf")]], ids=str
)
def test_an_answer_that_no_block_gives_proves_nothing(asked: Asked, values: list[float]) -> None:
    asked.ask(A)
    asked.answer("a", values)
    assert asked.probes.verdict(A) == "failing"
    assert asked.probes.proven([A]) == []


def test_an_echo_proves_nothing(asked: Asked) -> None:
    asked.ask(A)
    question = asked.question("a")
    asked.probes.receive("a", ResultFrame(question.call, question.hidden))
    assert asked.probes.verdict(A) == "failing"


def test_only_the_asked_peer_answers_its_own_question(asked: Asked) -> None:
    asked.ask(A)
    question = asked.question("a")
    asked.probes.receive("b", ResultFrame(question.call, Array("float32", (1, 64), memoryview(bytes(256)))))
    asked.answer("a", number=question.call + 1)
    assert asked.probes.verdict(A) == "unproven"


def test_who_answers_pings_alone_is_alive_and_who_answers_nothing_is_silent(asked: Asked) -> None:
    asked.ask(A, make_record("b", 0, 4))
    asked.pong("a")
    asked.now += 11.0
    assert [asked.probes.verdict(record) for record in (A, make_record("b", 0, 4))] == ["alive", "silent"]
    assert asked.probes.believed([A]) == []


def test_what_is_not_proven_again_in_time_counts_no_more(asked: Asked) -> None:
    asked.prove(A)
    assert asked.ask(A) == []
    asked.now += 80.0
    assert asked.probes.verdict(A) == "proven"  # nobody asked it since
    assert asked.ask(A) == ["a"]
    assert asked.probes.verdict(A) == "proven"
    asked.now += 11.0
    assert asked.probes.verdict(A) == "silent"
    assert asked.ask(A) == ["a"]
    asked.answer("a")
    assert asked.probes.verdict(A) == "proven"


def test_another_claim_and_a_lost_connection_need_another_proof(asked: Asked) -> None:
    asked.prove(A)
    assert asked.probes.verdict(make_record("a", 0, 5)) == "unproven"
    asked.probes.forget("a")
    assert asked.probes.believed([A]) == []
    assert asked.ask(A) == ["a"]


def test_busy_keeps_a_proof_for_a_while_and_makes_none(asked: Asked) -> None:
    asked.ask(A)
    asked.refuse("a", "Busy")
    assert asked.probes.verdict(A) != "proven"
    asked.now += 30.0
    asked.prove(A)
    for _ in range(2):
        asked.now += 80.0
        asked.ask(A)
        asked.refuse("a", "Busy")
        assert asked.probes.verdict(A) == "proven"
    asked.now += 300.0
    asked.ask(A)
    asked.refuse("a", "Busy")
    assert asked.probes.verdict(A) != "proven"


def test_who_refuses_is_failing_and_asked_ever_more_rarely(asked: Asked) -> None:
    gaps = []
    for _ in range(8):
        began = asked.now
        while not asked.ask(A):
            asked.now += 1.0
        gaps.append(asked.now - began)
        asked.refuse("a", "NetworkError")
        assert asked.probes.verdict(A) == "failing"
    assert gaps == [0.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 320.0]


def test_claims_are_capped_by_what_was_seen(asked: Asked) -> None:
    boast = make_record("a", 0, 4, throughput=1e300, free_tokens=2**53)
    asked.prove(boast, seconds=0.405)  # 4 blocks in 0.4 s beside the overhead: 10 rows/s through one
    (seen,) = asked.probes.believed([boast])
    assert seen.throughput == pytest.approx(80.0)
    assert seen.free_tokens == 2**26
    modest = make_record("a", 0, 4, throughput=12.0)
    assert asked.probes.believed([modest]) == [modest]


def test_the_way_to_a_server_is_not_its_computation(asked: Asked) -> None:
    boast = make_record("a", 0, 4, throughput=1e300)
    asked.ask(boast)
    asked.now += 0.2
    asked.pong("a")
    asked.now += 0.105
    asked.answer("a")
    assert asked.probes.believed([boast])[0].throughput == pytest.approx(8 * 4 / 0.1)


def test_a_loading_server_counts_for_a_while_if_it_answers_and_boasts_of_nothing(asked: Asked) -> None:
    coming = make_record("b", 4, 8, state="joining", throughput=1e12)
    asked.prove(A)
    assert asked.ask(A, coming) == ["b"]
    assert not [message for _, message in asked.sent if isinstance(message, ForwardFrame)]
    assert asked.probes.believed([A, coming]) == [A]
    asked.pong("b")
    assert [record.throughput for record in asked.probes.believed([A, coming])] == [1000.0, 1000.0]
    for _ in range(100):
        asked.now += 7.0
        if "b" in asked.ask(A, coming):
            asked.pong("b")
        if "a" in {peer for peer, _ in asked.sent}:
            asked.answer("a")
    assert asked.probes.believed([A, coming]) == [A]  # it loads for ever


def test_questions_are_bounded_and_proven_servers_are_asked_all_the_same() -> None:
    asked = Asked(newcomers=4, renewals=2)
    forged = [make_record(f"p{number}", 0, 4) for number in range(1000)]
    asked.prove(A)
    for _ in range(3):
        assert len(asked.ask(A, *forged)) == 4
    asked.now += 80.0
    assert "a" in asked.ask(A, *forged)
    assert len({peer for peer, _ in asked.sent}) == 5


def test_who_is_urgent_is_asked_at_once_but_not_twice_at_a_time(asked: Asked) -> None:
    asked.prove(A)
    assert asked.ask(A, urgent=("a",)) == ["a"]
    assert asked.ask(A, urgent=("a",)) == []


def test_who_is_listed_no_more_is_forgotten(asked: Asked) -> None:
    asked.prove(A)
    asked.now += 130.0
    asked.ask()
    assert asked.probes.verdict(A) == "unproven"


def test_who_says_that_its_engine_is_dead_is_failing(asked: Asked) -> None:
    asked.prove(A)
    asked.probes.receive("a", Pong(7, failing=True))
    assert asked.probes.verdict(A) == "failing"
