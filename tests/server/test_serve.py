"""Whole servers over the network and directory of one process: records, draining, moving."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from corolla.barrier import unexpected
from corolla.client.patience import Patience
from corolla.client.session import Session
from corolla.client.swarm import SwarmTransport
from corolla.engine.engine import EngineConfig
from corolla.engine.parts import EngineParts
from corolla.errors import InvalidSetting
from corolla.models.reference import Reference
from corolla.server.serve import RunningServer
from corolla.server.settings import ServeConfig, settle_terms
from corolla.swarm.directory import LocalDirectory
from corolla.swarm.network import LocalHub
from corolla.swarm.placement import MovePolicy
from corolla.swarm.probing import ProbeConfig
from corolla.swarm.records import ServerRecord
from corolla.swarm.routing import Quality, Route, WantedAdapter, find_route
from corolla.types import GenerationSettings, Span
from tests.models import tiny
from tests.server.local_peer import LocalPeer, answer_probe
from tests.swarm.simulation import make_record

DEADLINE = 60.0
PROMPT = [5 + i * 11 % 180 for i in range(20)]
COUNT = 40
LONG = GenerationSettings(max_tokens_to_generate=COUNT)
QUICK: dict[str, Any] = {
    "dtype": "float32",
    "weights": "plain",
    "device": "cpu",
    "announce_every": 0.05,
    "lifetime": 3.0,  # a stalled machine must not make servers expire
    "look_every": 0.05,
    "moving": MovePolicy(pace=0.2, settle=0.2),
    "probing": ProbeConfig(slack=1e9),  # nor to seem slow
    "engine": EngineConfig(cache_tokens=1024),
}


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


class Swarm:
    """Servers by name, and one client that looks for its routes in the directory."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.hub = LocalHub()
        self.directory = LocalDirectory(longest=2000.0)
        self.peers: dict[str, LocalPeer] = {}
        self.servers: dict[str, RunningServer] = {}
        self.transport = SwarmTransport(self.hub.join("client"), self, patience=Patience(silence=0.5, answer=0.5))

    def serve(self, peer: str, **settings: Any) -> RunningServer:
        config = ServeConfig(**{**QUICK, **settings})
        self.peers[peer] = LocalPeer(self.hub, self.directory, peer)
        self.servers[peer] = RunningServer(self.peers[peer], settle_terms(self.model, config), config)
        return self.servers[peer]

    def announce(self, peer: str, start: int, end: int, *, lies: bool = False) -> None:
        """A server that is nothing but a record, and an answer to probes unless it `lies`."""
        terms = settle_terms(self.model, ServeConfig(**QUICK))
        same = {**terms.offer.quality._asdict(), "model": terms.model_id, "blocks": terms.blocks, "hidden": terms.hidden}
        record = make_record(peer, start, end, throughput=1e9, expires=time.time() + 1000, **same)
        if not lies:
            network = self.hub.join(peer)
            network.listen(partial(answer_probe, network), lambda lost: None)
        asyncio.run(self.directory.publish(record))

    def records(self) -> dict[str, ServerRecord]:
        return {record.peer: record for record in asyncio.run(self.directory.servers())}

    def said(self, peer: str) -> ServerRecord:
        """What a server announced last."""
        return self.peers[peer].published[-1]

    def spans(self) -> dict[str, Span]:
        """Of the servers that are ready."""
        return {peer: record.span for peer, record in self.records().items() if record.state == "ready"}

    def route(self, avoid: Collection[str], needed_tokens: int, like: Quality | None = None, adapter: WantedAdapter | None = None) -> Route:
        records = self.records().values()
        return find_route(records, blocks=4, now=time.time(), banned=avoid, needed_tokens=needed_tokens, like=like, adapter=adapter)

    def quicker(self, route: Route, avoid: Collection[str], needed_tokens: int, adapter: WantedAdapter | None = None) -> Route | None:
        return None

    def close(self) -> None:
        self.transport.close()
        for server in self.servers.values():
            server.close()


@pytest.fixture
def swarm(directory: Path) -> Iterator[Swarm]:
    swarm = Swarm(directory)
    yield swarm
    swarm.close()


def test_a_record_says_what_is_measured(swarm: Swarm) -> None:
    swarm.serve("a", span=Span(0, 2), name="rose")
    swarm.serve("b", span=Span(2, 4))
    until(lambda: set(swarm.said("a").round_trips) == {"b"} and set(swarm.said("b").round_trips) == {"a"})
    record = swarm.said("a")
    assert (record.span, record.blocks, record.name, record.state) == (Span(0, 2), 4, "rose", "ready")
    assert (record.dtype, record.weights, record.free_tokens, record.active) == ("float32", "plain", 1024, 0)
    assert record.throughput > 0
    assert record.addresses == ("/local/a",)  # and not the one that is too long
    assert [state for state, _ in groupby(said.state for said in swarm.peers["a"].published)] == ["joining", "ready"]


def test_what_is_held_by_sessions_is_not_free(swarm: Swarm) -> None:
    swarm.serve("a")
    with Session(swarm.transport, "") as session:
        answer = session.generate(PROMPT, LONG, timeout=DEADLINE)
        next(answer)
        until(lambda: [r for r in swarm.peers["a"].published if r.active == 1 and r.free_tokens < 1024] or not list(answer))
    until(lambda: swarm.said("a").active == 0 and swarm.said("a").free_tokens == 1024)


def test_servers_share_the_blocks_among_them(swarm: Swarm) -> None:
    assert swarm.serve("a", capacity=2).span == Span(0, 2)
    assert swarm.serve("b", capacity=3).span == Span(1, 4)
    assert swarm.serve("c").span == Span(0, 4)


def test_servers_that_start_together_do_not_all_take_the_same_blocks(swarm: Swarm) -> None:
    threads = [threading.Thread(target=swarm.serve, args=(name,), kwargs={"capacity": 2}) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: sorted(swarm.spans().values()) == [Span(0, 2), Span(2, 4)])


def test_memory_bounds_the_span(directory: Path) -> None:
    def capacity(**settings: Any) -> int:
        return settle_terms(directory, ServeConfig(**{**QUICK, **settings})).capacity

    assert capacity() == 4
    assert capacity(memory=2**30) == 4
    assert capacity(memory=2**20) == 2
    assert capacity(memory=2**20, capacity=1) == 1
    assert capacity(memory=2**20, capacity=4) == 2
    assert capacity(capacity=3) == 3
    for memory in (2**30, 2**20):  # an eighth of it is for what clients send, and a 32nd for frames on their way
        terms = settle_terms(directory, ServeConfig(**{**QUICK, "memory": memory}))
        assert (terms.offer.engine.client_memory, terms.frames_memory) == (memory // 8, memory // 32)
    with pytest.raises(InvalidSetting, match="memory"):
        capacity(memory=2**16)
    with pytest.raises(InvalidSetting, match="memory"):
        capacity(memory=2**16, span=Span(0, 1))


@pytest.mark.parametrize("device", ["cuda:77", "tpu", "mps", "?"])
def test_a_device_that_is_not_there_is_refused(directory: Path, device: str) -> None:
    with pytest.raises(InvalidSetting, match="device"):
        settle_terms(directory, ServeConfig(device=device))


def test_a_server_that_cannot_load_leaves_no_record(swarm: Swarm) -> None:
    with pytest.raises(InvalidSetting):
        swarm.serve("a", span=Span(2, 9))
    assert swarm.records() == {}


def test_an_answer_goes_on_elsewhere_when_its_server_leaves(swarm: Swarm, directory: Path) -> None:
    swarm.serve("a")
    leaving: list[threading.Thread] = []
    with Session(swarm.transport, "") as session:
        tokens = []
        for token in session.generate(PROMPT, LONG, timeout=DEADLINE):
            tokens.append(token.token_id)
            if len(tokens) == 5:
                swarm.serve("b")
                leaving.append(threading.Thread(target=swarm.servers["a"].close))
                leaving[0].start()
    assert tokens == Reference(directory).greedy(PROMPT, COUNT)
    assert swarm.transport.counters.moves + swarm.transport.counters.faults <= 1
    leaving[0].join(DEADLINE)
    assert swarm.peers["a"].closed
    assert list(swarm.records()) == ["b"]


def test_an_answer_that_nobody_else_can_take_is_served_to_its_end(swarm: Swarm, directory: Path) -> None:
    swarm.serve("a")
    with Session(swarm.transport, "") as session:
        answer = session.generate(PROMPT, LONG, timeout=DEADLINE)
        tokens = [next(answer).token_id]
        closing = threading.Thread(target=swarm.servers["a"].close)
        closing.start()
        until(lambda: not swarm.records())  # withdrawn at once
        tokens += [token.token_id for token in answer]
    assert tokens == Reference(directory).greedy(PROMPT, COUNT)
    closing.join(DEADLINE)
    assert swarm.peers["a"].closed


def test_a_server_that_is_told_twice_ends_at_once(swarm: Swarm) -> None:
    server = swarm.serve("a", drain_timeout=1e6)
    told_again = threading.Event()
    with Session(swarm.transport, "") as session:
        next(session.generate(PROMPT, LONG, timeout=DEADLINE))
        told_again.set()
        server.close(told_again)
        assert swarm.peers["a"].closed
        server.close()  # for good measure


def test_a_server_moves_to_a_gap(swarm: Swarm) -> None:
    for peer in "abc":
        swarm.serve(peer, capacity=2)
    spans = swarm.spans()
    alone = next(peer for peer, span in spans.items() if list(spans.values()).count(span) == 1)
    swarm.hub.kill(alone)
    swarm.peers[alone].cut_off = True
    until(lambda: sorted(swarm.spans().values()) == [Span(0, 2), Span(2, 4)] and alone not in swarm.spans())
    moved = next(peer for peer, span in swarm.spans().items() if span != spans[peer])
    states = [record.state for record in swarm.peers[moved].published]
    assert [state for state, _ in groupby(states)][-4:] == ["ready", "draining", "joining", "ready"]
    with Session(swarm.transport, "") as session:
        answered = [token.token_id for token in session.generate(PROMPT, LONG, timeout=DEADLINE)]
    assert answered == Reference(swarm.model).greedy(PROMPT, COUNT)


def test_answers_go_on_while_a_server_moves(swarm: Swarm, directory: Path) -> None:
    expected = Reference(directory).greedy(PROMPT, COUNT)
    swarm.announce("ghost", 2, 4)
    swarm.serve("whole", span=Span(0, 4))
    for peer in "ab":
        assert swarm.serve(peer, capacity=2).span == Span(0, 2)
    asyncio.run(swarm.directory.withdraw("ghost"))
    deadline = time.monotonic() + DEADLINE
    with Session(swarm.transport, "") as session:
        while Span(2, 4) not in swarm.spans().values():
            assert time.monotonic() < deadline
            session.rollback(0)
            assert [token.token_id for token in session.generate(PROMPT, LONG, timeout=DEADLINE)] == expected


def test_a_drain_that_is_not_needed_any_more_ends(swarm: Swarm) -> None:
    swarm.announce("ghost", 2, 4)
    for peer in "ab":
        swarm.serve(peer, capacity=2, moving=MovePolicy(pace=0.1, settle=1e6))
    asyncio.run(swarm.directory.withdraw("ghost"))
    until(lambda: "draining" in [record.state for record in swarm.records().values()])
    swarm.announce("ghost", 2, 4)
    until(lambda: swarm.spans() == {"a": Span(0, 2), "b": Span(0, 2), "ghost": Span(2, 4)})


def test_a_server_whose_blocks_were_named_stays(swarm: Swarm) -> None:
    for name in "ab":
        swarm.serve(name, span=Span(0, 2))
    said = len(swarm.peers["a"].published)
    until(lambda: len(swarm.peers["a"].published) > said + 30)
    assert set(swarm.spans().values()) == {Span(0, 2)}


def test_a_server_that_cannot_load_where_it_is_needed_goes_back(directory: Path, tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path)
    swarm = Swarm(model)
    swarm.announce("ghost", 2, 4)
    for name in "ab":
        assert swarm.serve(name, capacity=2).span == Span(0, 2)
    weights = {name: tensor for name, tensor in load_file(model / "model.safetensors").items() if "layers.3." not in name}
    save_file(weights, model / "model.safetensors")
    asyncio.run(swarm.directory.withdraw("ghost"))
    until(lambda: any(r.span == Span(2, 4) for name in "ab" for r in swarm.peers[name].published))
    until(lambda: swarm.spans() == {"a": Span(0, 2), "b": Span(0, 2)})
    swarm.close()


def test_a_liar_draws_nobody_away(swarm: Swarm) -> None:
    for name in "ab":
        swarm.serve(name, capacity=2)
    swarm.announce("liar", 0, 3, lies=True)
    said = {name: len(swarm.peers[name].published) for name in "ab"}
    until(lambda: all(len(swarm.peers[name].published) > said[name] + 60 for name in "ab"))
    assert {name: swarm.said(name).span for name in "ab"} == {"a": Span(0, 2), "b": Span(2, 4)}
    assert {record.state for name in "ab" for record in swarm.peers[name].published[said[name] :]} == {"ready"}


def test_a_newcomer_takes_what_only_a_liar_holds(swarm: Swarm) -> None:
    swarm.announce("liar", 0, 3, lies=True)
    swarm.announce("ghost", 2, 4)
    assert swarm.serve("a", capacity=2, proofs=0.2).span == Span(0, 2)


def test_an_unexpected_error_does_not_end_a_server_s_life(swarm: Swarm) -> None:
    swarm.serve("a")
    swarm.peers["a"].error = KeyError("never seen")
    before = unexpected["the server's life"]
    until(lambda: unexpected["the server's life"] > before + 2)
    swarm.peers["a"].error = None
    said = len(swarm.peers["a"].published)
    until(lambda: len(swarm.peers["a"].published) > said + 3)
    assert swarm.said("a").state == "ready"


def test_told_twice_it_does_not_wait_for_a_directory_that_hangs(swarm: Swarm) -> None:
    server = swarm.serve("a")
    swarm.peers["a"].hangs = threading.Event()
    told_again = threading.Event()
    closing = threading.Thread(target=server.close, args=(told_again,))
    closing.start()
    began = time.monotonic()
    told_again.set()
    closing.join(DEADLINE)
    assert swarm.peers["a"].closed
    assert time.monotonic() - began < 5.0
    swarm.peers["a"].hangs.set()


def test_a_server_whose_engine_is_dead_withdraws_and_an_answer_goes_on_elsewhere(swarm: Swarm, directory: Path) -> None:
    """The attention of one server begins to raise what nobody expects."""
    broken = threading.Event()

    def attend(*inputs: Any) -> Any:
        if broken.is_set():
            raise IndexError("never seen")
        return EngineParts().attend(*inputs)

    server = swarm.serve("a", parts=EngineParts(attend=attend))
    tokens = []
    with Session(swarm.transport, "") as session:
        for token in session.generate(PROMPT, LONG, timeout=DEADLINE):
            tokens.append(token.token_id)
            if len(tokens) == 5:
                swarm.serve("b")
                broken.set()
    assert tokens == Reference(directory).greedy(PROMPT, COUNT)
    until(lambda: list(swarm.records()) == ["b"])
    assert server.failure is not None
    assert "the engine ended: IndexError" in server.failure
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 5.0
    assert swarm.peers["a"].closed


def test_a_server_whose_daemon_is_dead_says_so(swarm: Swarm) -> None:
    server = swarm.serve("a")
    assert server.failure is None
    swarm.peers["a"].failure = "this machine's libp2p daemon has ended"
    until(lambda: server.failure == "this machine's libp2p daemon has ended" and swarm.peers["a"].withdrawn)


def test_a_server_that_others_cannot_dial_is_not_ready(swarm: Swarm) -> None:
    swarm.serve("a")
    until(lambda: "a" in swarm.spans())
    swarm.peers["a"].reachable = False
    until(lambda: swarm.said("a").state == "joining")
    swarm.peers["a"].reachable = True
    until(lambda: swarm.said("a").state == "ready")
