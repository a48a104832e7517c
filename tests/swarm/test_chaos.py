"""Bad networks between servers: delays, stalls, cuts and flipped bytes end in the right tokens, sooner or later."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from corolla.models.reference import Reference
from corolla.types import GenerationSettings
from tests.models import tiny
from tests.swarm.chaos import ChaosProxy, Weather
from tests.swarm.harness import OVER_HIVEMIND, Client, Swarm

pytestmark = OVER_HIVEMIND

FAIR = Weather()
BAD = Weather(delay=0.1, jitter=0.05, stalled=0.01, stall=1.0)


# The proxy alone.


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    peer, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(peer,), daemon=True).start()

        def answer(peer: socket.socket) -> None:
            with peer:
                try:
                    while data := peer.recv(65536):
                        peer.sendall(data)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def there_and_back(connection: socket.socket, data: bytes) -> bytes:
    back = b""
    sending = threading.Thread(target=connection.sendall, args=(data,))
    sending.start()
    while len(back) < len(data):
        piece = connection.recv(65536)
        if not piece:
            break
        back += piece
    sending.join()
    return back


def test_what_goes_through_comes_back_and_is_counted(echo: int) -> None:
    with ChaosProxy(echo) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        data = bytes(range(256)) * 4000
        assert there_and_back(connection, data) == data
        assert (proxy.counters.bytes_in, proxy.counters.bytes_out, proxy.counters.connections) == (len(data), len(data), 1)


def test_each_direction_is_delayed_and_nothing_overtakes(echo: int) -> None:
    with ChaosProxy(echo, Weather(delay=0.05, jitter=0.05)) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        began = time.monotonic()
        data = bytes(range(256)) * 1000
        assert there_and_back(connection, data) == data
        assert time.monotonic() - began >= 0.1


def test_bandwidth_is_kept(echo: int) -> None:
    with ChaosProxy(echo, Weather(bandwidth=1e6)) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        began = time.monotonic()
        there_and_back(connection, bytes(200_000))
        assert time.monotonic() - began >= 0.2


def test_a_stalled_chunk_is_held(echo: int) -> None:
    with ChaosProxy(echo, Weather(stalled=1.0, stall=0.1)) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        began = time.monotonic()
        there_and_back(connection, b"held")
        assert time.monotonic() - began >= 0.2
        assert proxy.counters.stalls == 2


def test_bytes_are_flipped_one_in_a_chunk(echo: int) -> None:
    with ChaosProxy(echo) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        proxy.weather = Weather(corrupted=1.0)
        back = there_and_back(connection, bytes(100))
        assert sum(byte.bit_count() for byte in back) in (0, 2)  # once on each way, perhaps the same bit
        assert proxy.counters.corruptions == 2


def test_a_cut_breaks_what_stands_and_lets_nobody_in_until_it_is_mended(echo: int) -> None:
    with ChaosProxy(echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            assert there_and_back(connection, b"before") == b"before"
            proxy.cut()
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
        proxy.mend()
        with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
            assert there_and_back(connection, b"after") == b"after"


def test_a_target_that_is_gone_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with ChaosProxy(port) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert proxy.counters.refused == 1


# Servers behind proxies: two for each half of the blocks.

PROMPT = [5 + i * 11 % 180 for i in range(60)]
COUNT = 60
SETTINGS = GenerationSettings(max_tokens_to_generate=COUNT)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def expected(directory: Path) -> list[int]:
    return Reference(directory).greedy(PROMPT, COUNT)


@pytest.fixture(scope="module")
def swarm(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    with Swarm(directory, tmp_path_factory.mktemp("swarm"), "--dtype", "float32") as swarm:
        swarm.serve("0:2", "2:4", "0:2", "2:4", proxied=True)
        swarm.wait_ready()
        yield swarm


@pytest.fixture
def client(swarm: Swarm) -> Iterator[Client]:
    """A client that knows every server, in fair weather."""
    change(swarm, FAIR)
    with Client(swarm) as client:
        client.wait_until_known(*swarm.servers)
        yield client
    change(swarm, FAIR)


def proxies(swarm: Swarm) -> list[ChaosProxy]:
    return [server.proxy for server in swarm.servers if server.proxy is not None]


def change(swarm: Swarm, weather: Weather) -> None:
    for proxy in proxies(swarm):
        proxy.weather = weather
        proxy.mend()


def test_every_byte_between_servers_goes_through_the_proxies(swarm: Swarm, client: Client, expected: list[int]) -> None:
    with client.chat() as chat:
        chat.answer(PROMPT, SETTINGS)
        before = sum(proxy.counters.bytes_in + proxy.counters.bytes_out for proxy in proxies(swarm))
        assert chat.answer([7], SETTINGS).tokens
        passed = sum(proxy.counters.bytes_in + proxy.counters.bytes_out for proxy in proxies(swarm)) - before
        # A token comes to the client and goes on to the first server, a hidden state of 64 floats from that to the second.
        assert passed > COUNT * 64 * 4


def test_delay_jitter_and_stalls_change_no_token(swarm: Swarm, client: Client, expected: list[int]) -> None:
    change(swarm, BAD)
    with client.chat() as chat:
        answer = chat.answer(PROMPT, GenerationSettings(max_tokens_to_generate=30))
    print(f"{sum(answer.pauses):.1f} s for 30 tokens, longest pause {answer.longest:.2f} s")
    assert answer.tokens == expected[:30]
    assert sum(proxy.counters.stalls for proxy in proxies(swarm)) > 0


@pytest.mark.parametrize("hop", [0, 1])
def test_a_cut_is_gone_around(swarm: Swarm, client: Client, expected: list[int], hop: int) -> None:
    with client.chat() as chat:

        def cut() -> None:
            proxy = swarm.of(chat.route[hop]).proxy
            assert proxy is not None
            proxy.cut()

        answer = chat.answer(PROMPT, SETTINGS, {20: cut})
    print(f"longest pause {answer.longest:.2f} s")
    assert answer.tokens == expected


def test_flipped_bytes_never_become_tokens(swarm: Swarm, client: Client, expected: list[int]) -> None:
    before = sum(proxy.counters.corruptions for proxy in proxies(swarm))
    with client.chat() as chat:

        def spoil() -> None:
            for peer in chat.route:
                proxy = swarm.of(peer).proxy
                assert proxy is not None
                proxy.weather = Weather(corrupted=0.1)

        answer = chat.answer(PROMPT, SETTINGS, {10: spoil})
    flipped = sum(proxy.counters.corruptions for proxy in proxies(swarm)) - before
    print(f"longest pause {answer.longest:.2f} s, {flipped} bytes flipped")
    assert answer.tokens == expected
    assert flipped > 0
