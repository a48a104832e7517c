from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import pytest
from rich.console import Console

from corolla.cli.status import WIDTH, Look, draw, look
from corolla.swarm.directory import LocalDirectory
from corolla.swarm.network import LocalHub
from corolla.swarm.probing import ProbeConfig, Probes
from corolla.swarm.records import ServerRecord
from tests.server.local_peer import LocalPeer, answer_probe
from tests.swarm.simulation import make_record


def record(start: int, end: int, **changes: Any) -> ServerRecord:
    fields: dict[str, Any] = {
        "peer": f"12D3KooWpeer{start}",
        "name": "",
        "model": "m" * 32,
        "checkpoint": "c",
        "start": start,
        "end": end,
        "blocks": 30,
        "hidden": 64,
        "dtype": "bfloat16",
        "weights": "packed",
        "throughput": 4412.6,
        "free_tokens": 131072,
        "active": 2,
        "round_trips": {"a": 0.0004, "b": 0.030},
        "addresses": (),
        "version": "0.1.0",
        "state": "ready",
        "expires": time.time() + 20,
    }
    return ServerRecord(**fields | changes)


def shown(*records: ServerRecord, **rest: Any) -> str:
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(draw(Look(records, **rest)))
    return capture.get()


def test_a_server_is_a_line_with_its_figures() -> None:
    lines = shown(record(0, 15), record(15, 30, name="attic", round_trips={}, dtype="float32", state="draining")).splitlines()
    assert lines[0] == "model mmmmmmmmmmmmmmmm, 30 blocks, 2 servers"
    assert " ".join(lines[2].split()) == "ooWpeer0 0:15 ██████······ 294 2 131k 15.2 bf16 packed 0.1.0 ready"
    assert " ".join(lines[3].split()) == "attic 15:30 ······██████ 294 2 131k ? fp32 packed 0.1.0 draining"
    assert lines[4] == "every block is held"


def test_a_narrow_terminal_shows_the_same_with_less_around_it() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(draw(Look([record(0, 15, state="draining")]), console.width))
    assert " ".join(capture.get().splitlines()[2].split()) == "ooWpeer0 0:15 ████···· 294 2 131k 15.2 bf16 packed draining"


def test_gaps_are_named_for_each_model() -> None:
    text = shown(record(0, 10), record(12, 30), record(1, 2, model="other", blocks=2))
    assert "nobody holds blocks 10:12: no answer" in text
    assert "nobody holds blocks 0:1: no answer" in text
    assert "no server is announced" in shown()


def test_adapters_are_named_with_what_lacks_them() -> None:
    poet, cook = "0" * 64, "1" * 64
    first = record(0, 15, adapters={"poet": poet, "cook": cook})
    text = shown(first, record(15, 30, adapters={"poet": poet}, takes_adapters=True))
    assert "adapter cook 111111111111: 1 server, nobody has it for blocks 15:30" in text
    assert "adapter poet 000000000000: 2 servers, every block has it" in text
    assert "adapters of clients are taken by 1 server" in text
    assert "adapter" not in shown(record(0, 30))


def test_the_longest_line_fits() -> None:
    widest = record(
        4000,
        4096,
        blocks=4096,
        name="w" * 64,
        throughput=12345678.0,
        free_tokens=2**53,
        active=2**53,
        round_trips={"a": 1234.5},
        weights="unheard-of",
        version="10.11.12+local.version",
        state="draining",
    )
    lines = shown(widest).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[2].endswith("draining")


@pytest.mark.parametrize("name", ["[red]", "[/]", "[link=http://example.org]here[/link]", ":smile:"])
def test_what_servers_call_themselves_is_no_markup(name: str) -> None:
    assert name[:10] in shown(record(0, 30, name=name))


def test_counters_stand_below_and_in_json() -> None:
    counters = {"12D3KooWpeer0": {"steps": 7, "evictions": 0}}
    assert "ooWpeer0  evictions 0  steps 7" in shown(record(0, 15), record(15, 30), counters=counters)
    first, second = json.loads(json.dumps(Look([record(0, 15), record(15, 30)], counters=counters).as_builtins()))
    assert (first["counters"], first["free_tokens"], first["round_trips"]["b"]) == ({"steps": 7, "evictions": 0}, 131072, 0.03)
    assert "counters" not in second


def test_a_look_that_failed_is_said_beside_the_last_one() -> None:
    assert "as of a while ago" in shown(record(0, 30), problem="as of a while ago: the swarm's DHT did not answer")


def test_status_needs_a_peer(corolla: Any) -> None:
    assert corolla("status").stderr == "error: peers: name a peer of the swarm with --peers\n"


def test_a_server_that_is_not_what_it_says_is_marked_and_holds_nothing() -> None:
    records = [record(0, 15), record(15, 30), record(16, 30), record(14, 30, state="joining")]
    seen = dict(zip((r.peer for r in records), ("proven", "silent", "failing", "alive"), strict=True))
    lines = shown(*records, seen=seen).splitlines()
    assert [line.split()[-1] for line in lines[2:6]] == ["ready", "silent", "failing", "joining"]
    assert "every block is held" in lines[6]
    seen[records[3].peer] = "unproven"
    text = shown(*records, seen=seen)
    assert "unproven" in text
    assert "no server that answers holds blocks 15:30" in text
    assert [entry["seen"] for entry in Look(records, seen).as_builtins()] == ["proven", "silent", "failing", "unproven"]


def test_a_look_asks_every_server_to_compute() -> None:
    hub = LocalHub()
    peer = LocalPeer(hub, LocalDirectory(longest=100.0), "me")
    network = hub.join("works")
    network.listen(partial(answer_probe, network), lambda lost: None)
    for name in ("works", "liar"):
        peer.publish(make_record(name, 0, 12, expires=time.time() + 60))
    probes = Probes(peer.network.send, ProbeConfig(patience=0.5))
    assert look(peer, probes, counters=False).seen == {"works": "proven", "liar": "silent"}


@pytest.mark.parametrize("blocks", [1, 4096])
def test_a_record_of_another_number_of_blocks_is_a_model_of_its_own(blocks: int) -> None:
    lines = shown(record(0, 30), record(0, 1, blocks=blocks)).splitlines()
    assert "model mmmmmmmmmmmmmmmm, 30 blocks, 1 server" in lines
