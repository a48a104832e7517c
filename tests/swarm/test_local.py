from __future__ import annotations

import pytest

from corolla.errors import Busy, NetworkError
from corolla.messages import Close, Gap, Message, Reply
from corolla.swarm.local import LocalTransport
from corolla.swarm.transport import Deliver


def echo(message: Message, deliver: Deliver) -> None:
    deliver(Gap(message.session, 0, 7))


def test_messages_and_replies_go_by_reference() -> None:
    transport, sent, replies = LocalTransport(), list[Message](), list[Reply]()
    transport.listen("a", lambda message, deliver: (sent.append(message), echo(message, deliver))[1])
    message = Close("s")
    transport.connect("a", replies.append).send(message)
    assert sent[0] is message
    assert replies == [Gap("s", 0, 7)]


def test_an_unknown_peer_is_a_network_error() -> None:
    with pytest.raises(NetworkError, match="'nobody'"):
        LocalTransport().connect("nobody", print)


def test_a_peer_that_left_is_a_network_error_on_standing_links() -> None:
    transport = LocalTransport()
    transport.listen("a", echo)
    link = transport.connect("a", print)
    transport.leave("a")
    with pytest.raises(NetworkError):
        link.send(Close("s"))


def test_a_handler_may_refuse_at_once() -> None:
    def full(message: Message, deliver: Deliver) -> None:
        raise Busy(0.5)

    transport = LocalTransport()
    transport.listen("a", full)
    with pytest.raises(Busy):
        transport.connect("a", print).send(Close("s"))


def test_a_closed_link_delivers_and_sends_nothing() -> None:
    transport, ears, replies = LocalTransport(), list[Deliver](), list[Reply]()
    transport.listen("a", lambda message, deliver: ears.append(deliver))
    link = transport.connect("a", replies.append)
    link.send(Close("s"))
    link.close()
    link.close()
    ears[0](Gap("s", 0, 0))
    assert replies == []
    with pytest.raises(NetworkError, match="closed"):
        link.send(Close("s"))
