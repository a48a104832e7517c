from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import pytest

from corolla.errors import InvalidSetting, Unauthorized
from corolla.swarm.handshake import MESSAGE_BYTES, Handshake, derive_key

SECRET = b"correct horse battery staple"


def greeted(dialer: Handshake, listener: Handshake) -> None:
    """Exchange hellos."""
    listener.greeted(dialer.hello())
    dialer.greeted(listener.hello())


def pair(secret: bytes | None = SECRET, other: bytes | None = SECRET) -> tuple[Handshake, Handshake]:
    return Handshake(secret, "QmA", "QmB", "dialer"), Handshake(other, "QmB", "QmA", "listener")


@pytest.mark.parametrize("secret", [SECRET, None], ids=["secret", "open"])
def test_two_that_know_the_secret_agree(secret: bytes | None) -> None:
    dialer, listener = pair(secret, secret)
    greeted(dialer, listener)
    listener.check(dialer.proof())
    dialer.check(listener.proof())
    assert dialer.done
    assert listener.done


def test_another_secret_is_refused() -> None:
    dialer, listener = pair(b"guessed")
    greeted(dialer, listener)
    with pytest.raises(Unauthorized, match="secret"):
        listener.check(dialer.proof())
    assert not listener.done


def test_a_listener_with_another_secret_is_refused() -> None:
    dialer, liar = pair(SECRET, b"guessed")
    greeted(dialer, liar)
    liar.done = True  # it does not care what the dialer proves
    with pytest.raises(Unauthorized):
        dialer.check(liar.proof())


@pytest.mark.parametrize(("ours", "theirs"), [(SECRET, None), (None, SECRET)])
def test_an_open_side_and_a_closed_one_refuse_each_other(ours: bytes | None, theirs: bytes | None) -> None:
    dialer, listener = pair(ours, theirs)
    with pytest.raises(Unauthorized, match="open swarm"):
        listener.greeted(dialer.hello())


def test_a_listener_proves_nothing_to_who_has_not_proved() -> None:
    dialer, listener = pair()
    greeted(dialer, listener)
    with pytest.raises(Unauthorized, match="has not proved"):
        listener.proof()


def test_an_old_transcript_is_refused() -> None:
    dialer, listener = pair()
    greeted(dialer, listener)
    hello, proof = dialer.hello(), dialer.proof()
    listener.check(proof)
    again = Handshake(SECRET, "QmB", "QmA", "listener")
    again.greeted(hello)
    with pytest.raises(Unauthorized):
        again.check(proof)


def test_a_reflected_hello_is_refused() -> None:
    dialer, _ = pair()
    with pytest.raises(Unauthorized, match="repeated"):
        dialer.greeted(dialer.hello())


def test_a_reflected_proof_is_refused() -> None:
    dialer, listener = pair()
    greeted(dialer, listener)
    with pytest.raises(Unauthorized):
        dialer.check(dialer.proof())


def test_a_second_hello_is_refused() -> None:
    dialer, listener = pair()
    greeted(dialer, listener)
    with pytest.raises(Unauthorized, match="repeated"):
        listener.greeted(Handshake(SECRET, "QmA", "QmB", "dialer").hello())


def test_two_dialers_do_not_agree() -> None:
    one, other = Handshake(SECRET, "QmA", "QmB", "dialer"), Handshake(SECRET, "QmB", "QmA", "dialer")
    greeted(one, other)
    with pytest.raises(Unauthorized):
        other.check(one.proof())


def test_a_proof_is_of_no_use_to_a_third_peer() -> None:
    """Mallory stands between A and B and passes everything on: her connections carry her own id."""
    dialer = Handshake(SECRET, "QmA", "QmMallory", "dialer")
    listener = Handshake(SECRET, "QmB", "QmMallory", "listener")
    greeted(dialer, listener)
    with pytest.raises(Unauthorized):
        listener.check(dialer.proof())


def test_a_peer_does_not_shake_hands_with_itself() -> None:
    with pytest.raises(Unauthorized):
        Handshake(SECRET, "QmA", "QmA", "dialer")


@pytest.mark.parametrize("damage", [lambda m: m[:-1], lambda m: m + b"\0", lambda m: b"", lambda m: b"CRL2" + m[4:]])
def test_a_message_of_another_form_is_refused(damage: Callable[[bytes], bytes]) -> None:
    dialer, listener = pair()
    with pytest.raises(Unauthorized, match="version"):
        listener.greeted(damage(dialer.hello()))


def test_every_flipped_bit_of_a_proof_is_refused() -> None:
    dialer, listener = pair()
    greeted(dialer, listener)
    proof = dialer.proof()
    for place in range(len(proof) * 8):
        flipped = bytearray(proof)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(Unauthorized):
            listener.check(bytes(flipped))
    assert not listener.done


def test_a_proof_before_the_hello_is_refused() -> None:
    dialer, listener = pair()
    with pytest.raises(Unauthorized, match="no hello"):
        dialer.proof()
    with pytest.raises(Unauthorized):
        listener.check(dialer.hello())


def test_an_empty_secret_is_no_open_swarm() -> None:
    with pytest.raises(InvalidSetting, match="empty"):
        pair(b"")


def test_keys_of_different_purposes_differ() -> None:
    assert derive_key(SECRET, b"handshake") != derive_key(SECRET, b"directory")
    assert derive_key(SECRET, b"handshake") != derive_key(b"another", b"handshake")


class Pipe:
    """One direction of a stream."""

    def __init__(self) -> None:
        self._reader = asyncio.StreamReader()
        self.read = self._reader.readexactly

    async def write(self, data: bytes) -> None:
        self._reader.feed_data(data)


@pytest.mark.parametrize(("secret", "agree"), [(SECRET, True), (b"guessed", False)])
def test_the_whole_of_it_over_a_stream(secret: bytes, agree: bool) -> None:
    async def shake() -> None:
        there, back = Pipe(), Pipe()
        dialer, listener = pair(secret)
        async with asyncio.timeout(60):
            answered = asyncio.create_task(listener.run(there.read, back.write))
            knocking = asyncio.create_task(dialer.run(back.read, there.write))
            try:
                await answered
                await knocking
            finally:
                knocking.cancel()

    if agree:
        asyncio.run(shake())
    else:
        with pytest.raises(Unauthorized, match=re.escape("QmA")):
            asyncio.run(shake())


def test_messages_have_one_size() -> None:
    dialer, listener = pair()
    greeted(dialer, listener)
    assert {len(dialer.hello()), len(dialer.proof())} == {MESSAGE_BYTES}
