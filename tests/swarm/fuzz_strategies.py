"""Well-formed messages with odd contents, for hypothesis: what somebody who speaks the protocol may say to a swarm.

A batch is what two hostile peers say: `mallory` as a client, `eve` as a server of routes. Most of a message is right, so that the odd part
of it gets past the checks before it. Shapes are the tiny model's; honest servers have the names of the spans that are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st

from corolla.messages import (
    MAX_STEP_TOKENS,
    AdapterFrame,
    Array,
    Ask,
    AskCounters,
    BackwardFrame,
    Cached,
    Cancel,
    Close,
    Counters,
    FailedFrame,
    ForwardFrame,
    Gap,
    HiddenFrame,
    Hop,
    HopTiming,
    Leaving,
    Ping,
    Pong,
    ProductFrame,
    PromptFrame,
    Refused,
    ResultFrame,
    Score,
    Scores,
    SettingsFrame,
    StepFrame,
    Token,
    Whereabouts,
    WireMessage,
)
from corolla.models.adapters import Adapter, digest_of, joined_digest
from corolla.swarm.convert import from_adapter_part
from corolla.types import Factors, FinishReason, PromptName, Span

BLOCKS, HIDDEN, VOCABULARY, CONTEXT = 4, 64, 199, 512  # of the tiny model
Spans = Mapping[str, tuple[int, int]]  # of the honest servers, by name
HOSTILE, HONEST = ("mallory", "eve"), ("alice", "bob")
HONEST_SESSIONS = tuple(f"session of {client}" for client in HONEST)  # stand for the names that those have at the moment
PRODUCTS = {"qkv": (128, 64), "out": (64, 64), "up": (112, 64), "gate": (112, 64), "down": (64, 112)}  # outputs and inputs

EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 257, 511, 512, 513, 2048, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**53)
BIGGEST = 2**63 - 1
ODD_FLOATS = (0.0, -0.0, 5e-324, 1e-45, 1e-39, 1.2e-38, 1e-8, 1.0, 1 + 2**-52, 2.0, 2.1, 1e30, 3.4e38, 3.5e38, 1e308)
NO_NUMBERS = (float("inf"), float("-inf"), float("nan"), -1.0, -1e-45)
NAMES = ("", "x", "a", "s", "eve", "mallory", "alice", "client", "\x00", "ä" * 128, "x" * 256, "../../x", "%s %n {}", "\U0001f600")

odd_counts = st.sampled_from((*EDGES, 2**62, BIGGEST))
odd_integers = st.sampled_from((*EDGES, -1, -2, VOCABULARY, VOCABULARY + 1, 2**62, BIGGEST, -(2**31), -(2**63)))
odd_floats = st.sampled_from((*ODD_FLOATS, *NO_NUMBERS))
odd_names = st.sampled_from(NAMES)


class Sent(NamedTuple):
    """One message and its way. Peers are named as here; whoever sends it puts the ids of real ones in their place."""

    sender: str
    receiver: str
    message: WireMessage


@dataclass(slots=True)
class Talk:
    """A hostile session, as far as its messages may continue one another."""

    session: str
    spans: Spans
    route: tuple[Hop, ...]
    generation: int = 1
    position: int = 0
    began: int = 0  # where the generation did
    prompt: PromptName | None = None
    adapter: str = ""
    opened: set[int] = field(default_factory=set)  # hops that were told the route of this generation
    kept: list[Sent] = field(default_factory=list)  # forwards that were to be kept


def rarely(draw: st.DrawFn, one_in: int = 20) -> bool:
    return draw(st.integers(1, one_in)) == one_in


def mostly(draw: st.DrawFn, right: Any, odd: st.SearchStrategy[Any], one_in: int = 20) -> Any:
    """What is `right`, a value or a strategy, or sometimes what is `odd`."""
    if rarely(draw, one_in):
        return draw(odd)
    return draw(right) if isinstance(right, st.SearchStrategy) else right


def server(draw: st.DrawFn, talk: Talk) -> str:
    """Any of the honest ones."""
    return draw(st.sampled_from(list(talk.spans)))


# Parts of messages.


def token_ids(draw: st.DrawFn, count: int) -> tuple[int, ...]:
    first, step = draw(st.integers(0, VOCABULARY - 1)), draw(st.integers(0, 7))
    ids = [(first + index * step) % VOCABULARY for index in range(count)]
    if ids and rarely(draw, 12):
        ids[draw(st.integers(0, count - 1))] = draw(odd_integers)
    return tuple(ids)


def values(draw: st.DrawFn, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Ordinary float32 numbers, or some that are not."""
    made = np.random.default_rng(draw(st.integers(0, 255))).standard_normal(count, dtype=np.float32)
    with np.errstate(over="ignore"):
        match draw(st.integers(0, 11)):
            case 11:
                made[draw(st.integers(0, count - 1))] = draw(odd_floats)
            case 10:
                made *= np.float32(draw(st.sampled_from((0.0, 1e-45, 1e-38, 1e-20, 1e4, 1e18, 1e30, 1e38))))
            case 9:
                made[:] = draw(odd_floats)
            case _:
                pass
    return made


def arrays(draw: st.DrawFn, rows: int, width: int = HIDDEN, *, float32: bool = False) -> Array:
    """`rows` rows, mostly of the right width."""
    rows = max(1, rows)
    width = mostly(draw, width, st.sampled_from((1, 2, 63, 65, 128, 4096)), 40) if rows <= 64 else width
    dtype = "float32" if float32 else mostly(draw, "float32", st.sampled_from(("bfloat16", "float16", "q8")), 5)
    array = Array(dtype, (rows, width))
    if dtype == "float32":
        data = values(draw, rows * width).tobytes()
    else:  # any bits: every pattern of a NaN, and scales of any size
        data = np.random.default_rng(draw(st.integers(0, 255))).bytes(array.nbytes)
    return Array(dtype, (rows, width), memoryview(data))


@st.composite
def settings(draw: st.DrawFn) -> SettingsFrame:
    """One or two fields of them odd, or none."""
    given: dict[str, Any] = {"max_tokens_to_generate": draw(st.integers(1, 6)), "seed": draw(st.integers(0, 9))}
    if draw(st.booleans()):
        given |= {
            "do_sample": True,
            "temperature": draw(st.sampled_from((0.1, 0.7, 1.0, 2.0))),
            "top_p": draw(st.sampled_from((0.1, 0.9, 1.0))),
        }
    given["repetition_penalty"] = draw(st.sampled_from((1.0, 1.0, 1.3, 2.0)))
    odd: dict[str, st.SearchStrategy[Any]] = {
        "max_tokens_to_generate": odd_integers,
        "do_sample": st.booleans(),
        "temperature": odd_floats,
        "top_k": odd_integers,
        "top_p": odd_floats,
        "repetition_penalty": odd_floats,
        "top_logprobs": st.sampled_from((0, 1, 5, 20, 21, 64, -1, BIGGEST)),
        "prompt_logprobs": st.booleans(),
        "seed": odd_integers,
        "stop_token_ids": st.lists(odd_integers, max_size=3).map(tuple),
    }
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(sorted(odd)))
        given[name] = draw(odd[name])
    return SettingsFrame(**given)


@st.composite
def routes(draw: st.DrawFn, spans: Spans) -> tuple[Hop, ...]:
    """One that may be: each server computes what it holds, or less, and eve what is left."""
    if rarely(draw, 12):
        return draw(st.sampled_from(odd_routes(spans)))
    hops: list[Hop] = []
    while (start := hops[-1].end if hops else 0) < BLOCKS:
        able = [name for name, (first, end) in spans.items() if first <= start < end and name not in {hop.peer for hop in hops}]
        if draw(st.booleans()) and not any(hop.peer == "eve" for hop in hops):
            able.append("eve")
        name = draw(st.sampled_from(able or ["nobody"]))
        last = spans.get(name, (0, BLOCKS))[1]
        hops.append(Hop(name, start, last if draw(st.booleans()) else draw(st.integers(start + 1, last))))
    return tuple(hops)


def odd_routes(spans: Spans) -> list[tuple[Hop, ...]]:
    """Routes that end early or begin late, go in circles, beyond the model, or through peers that serve nothing."""
    (first, (start, end)), (last, (last_start, last_end)) = next(iter(spans.items())), list(spans.items())[-1]
    return [
        (Hop(first, start, end),),
        (Hop(last, last_start, last_end),),
        (Hop(first, start, BLOCKS + 1),),
        (Hop(first, BLOCKS, BLOCKS + 1),),
        (Hop(first, start, BIGGEST),),
        (Hop(last, 2**62, BIGGEST),),
        (Hop(first, 0, 1), Hop(first, 1, 2), Hop("eve", 2, BLOCKS)),
        (Hop(first, 0, 1), Hop("eve", 1, 2), Hop(first, 2, BLOCKS)),
        *((Hop(first, start, end), Hop(peer, end, max(BLOCKS, end + 1))) for peer in ("nobody", "alice", "mallory", "")),
        *((Hop(peer, 0, max(1, last_start)), Hop(last, max(1, last_start), BLOCKS)) for peer in ("nobody", "bob", "mallory", "")),
        (Hop(first, 0, 1), *(Hop(f"hop {index}", index, index + 1) for index in range(1, 256))),
        (*(Hop("x" * 100, index, index + 1) for index in range(255)), Hop(last, 255, 256)),
    ]


timings = st.lists(
    st.builds(HopTiming, odd_names, *[st.sampled_from((0.0, 5e-324, 1.0, 1e308))] * 3),
    max_size=2,
).map(tuple)


@st.composite
def prompt_names(draw: st.DrawFn, *, deep: bool | None = None) -> PromptName:
    tokens = mostly(draw, st.integers(1, 4), st.sampled_from((5, 64, 511, 512, 1024, 1025, MAX_STEP_TOKENS)))
    return PromptName(draw(st.sampled_from(("p0", "p1", "p2"))), tokens, draw(st.booleans()) if deep is None else deep)


@cache
def _adapters() -> tuple[tuple[AdapterFrame, ...], ...]:
    """Real adapters, block by block: of honest values, of values that overflow, of none."""
    made = []
    for number, (rank, scale) in enumerate(((1, 0.1), (2, 0.1), (1, float("nan")), (1, 1e-45), (1, 3e38), (1, float("inf")), (0, 1.0))):
        chance = torch.Generator().manual_seed(number)
        blocks = tuple(
            {
                product: Factors(torch.randn(rank, inputs, generator=chance) * scale, torch.randn(outputs, rank, generator=chance) * scale)
                for product, (outputs, inputs) in (PRODUCTS.items() if rank else ())
            }
            for _ in range(BLOCKS)
        )
        made.append(tuple(from_adapter_part(Adapter(blocks).part(Span(0, BLOCKS)))))
    return tuple(made)


adapter_names = st.one_of(st.sampled_from(range(7)).map(lambda number: _adapters()[number][0].digest), odd_names)


# Messages. Each takes the talk that it may continue.


def steps(draw: st.DrawFn, talk: Talk) -> Sent:
    route, takes_hidden = talk.route, rarely(draw, 10)
    before = ("mallory", *(hop.peer for hop in route))
    hops = [index for index, hop in enumerate(route) if hop.peer in talk.spans and before[index] in HOSTILE] or [0]
    hop = mostly(draw, st.sampled_from(hops), st.integers(0, len(route) - 1), 30)
    rows = mostly(draw, st.integers(1, 12), st.sampled_from((0, 16, 17, 31, 33, 100, 256, 300, 511, 512, 513)), 25)
    tells = hop not in talk.opened or draw(st.booleans())
    if tells and rarely(draw, 6):
        talk.generation, talk.position, talk.opened = talk.generation + 1, max(0, talk.position - draw(st.integers(0, 8))), set()
        talk.began = talk.position
    tokens: tuple[int, ...] = token_ids(draw, rows)
    hidden = arrays(draw, rows) if rows and mostly(draw, hop > 0 or takes_hidden, st.booleans(), 30) else None
    if hidden is not None and takes_hidden and draw(st.booleans()):
        tokens = ()
    drafts = draw(st.integers(0, min(15, len(tokens) - 1))) if len(tokens) > 1 and rarely(draw, 4) else 0
    route_of, hop_of = (route, hop) if tells else ((), 0)
    start = mostly(draw, talk.position, st.one_of(st.integers(0, 40), odd_counts), 12)
    message = StepFrame(
        talk.session,
        mostly(draw, talk.generation, st.one_of(st.integers(0, 3), odd_counts), 30),
        start,
        tokens,
        hidden,
        draw(settings()) if route_of and draw(st.integers(0, 3)) else None,
        route_of,
        hop_of,
        mostly(draw, "mallory", odd_names, 25) if route_of else "",
        talk.adapter if route_of else "",
        draw(timings) if rarely(draw) else (),
        asked=draw(st.sampled_from((0, 1, 1_700_000_000_000, BIGGEST))),
        more=draw(st.integers(0, 4)) == 0,
        timed=draw(st.integers(0, 4)) == 0,
        output="hidden" if takes_hidden else "token",
        prompt=talk.prompt if route_of else None,
        drafts=drafts,
        began=min(start, mostly(draw, talk.began, odd_counts, 12)) if tells and draw(st.integers(0, 5)) else None,
    )
    talk.opened.add(hop)
    talk.position = min(CONTEXT, start + rows) if draw(st.booleans()) else talk.position
    sender = before[hop] if before[hop] in HOSTILE else "eve"
    receiver = route[hop].peer
    return Sent(mostly(draw, sender, st.sampled_from(HOSTILE), 30), receiver if receiver in talk.spans else server(draw, talk), message)


def ring_steps(draw: st.DrawFn, talk: Talk) -> Sent:
    """A token that comes round, from a server that is the route's last, or says that it is."""
    tokens = token_ids(draw, draw(st.integers(1, 5)))
    message = StepFrame(
        talk.session, talk.generation, talk.position + draw(st.integers(0, 3)), tokens, drafts=draw(st.integers(0, len(tokens) - 1))
    )
    return Sent("eve", talk.route[0].peer if talk.route[0].peer in talk.spans else server(draw, talk), message)


def _lengths(draw: st.DrawFn) -> list[int]:
    return draw(
        st.lists(mostly(draw, st.just(st.integers(1, 6)), st.just(st.sampled_from((1, 64, 255, 512, 513)))), min_size=1, max_size=4)
    )


def calls(draw: st.DrawFn, talk: Talk) -> Sent:
    if talk.kept and draw(st.booleans()):
        return _backward_of_kept(draw, talk.kept.pop())
    sender, receiver = draw(st.sampled_from(HOSTILE)), server(draw, talk)
    start, end = mostly(draw, talk.spans[receiver], st.sampled_from([(2, 3), (0, 1), (1, 3), (3, 4), (3, 5), (2**62, BIGGEST)]), 4)
    lengths = tuple(_lengths(draw))
    if rarely(draw, 60):
        lengths = draw(st.sampled_from(((8192,), (1,) * 1024, (8192, 1), (512,) * 16)))
    prompt = draw(prompt_names(deep=True)) if rarely(draw, 4) else None
    if prompt is not None and prompt.tokens > min(lengths):
        prompt = None
    number, rows = mostly(draw, st.integers(1, 5), odd_counts), sum(lengths)
    if draw(st.booleans()):
        backward = BackwardFrame(number, start, end, lengths, arrays(draw, 2 * rows), prompt)
        return Sent(sender, receiver, backward)
    sent = Sent(sender, receiver, ForwardFrame(number, start, end, lengths, arrays(draw, rows), prompt, keep=draw(st.booleans())))
    talk.kept.append(sent)
    return sent


def _backward_of_kept(draw: st.DrawFn, sent: Sent) -> Sent:
    forward = sent.message
    assert isinstance(forward, ForwardFrame), "only those are kept"
    lengths, array = forward.lengths, arrays(draw, forward.rows)
    kept = mostly(draw, max(1, forward.call), odd_counts.filter(bool), 10)
    backward = BackwardFrame(forward.call + 1 & BIGGEST, forward.start, forward.end, lengths, array, forward.prompt, kept=kept)
    return Sent(mostly(draw, sent.sender, st.sampled_from(HOSTILE), 10), sent.receiver, backward)


def prompts(draw: st.DrawFn, talk: Talk) -> Sent:
    receiver, name = server(draw, talk), draw(prompt_names())
    start, end = draw(st.sampled_from([talk.spans[receiver], talk.spans[receiver], talk.spans[receiver], (2, 3), (1, 4), (3, 9)]))
    has_input = draw(st.booleans()) or not name.deep
    if not name.deep and rarely(draw):
        end = BIGGEST
    rows = (has_input + (end - start if name.deep else 0)) * name.tokens
    return Sent("mallory", receiver, PromptFrame(name, start, end, arrays(draw, rows, float32=True), has_input))


def adapters(draw: st.DrawFn, talk: Talk) -> Sent:
    receiver = server(draw, talk)
    start, end = talk.spans[receiver]
    block = draw(st.integers(start, end - 1))
    frame = _adapters()[draw(st.integers(0, 6))][block]
    if rarely(draw, 6):
        frame = AdapterFrame(frame.digest, frame.digests, draw(odd_counts), frame.products, frame.hidden)
    elif rarely(draw, 6):
        products = tuple(
            ProductFrame(
                draw(st.sampled_from((*PRODUCTS, "", "norm")[index:])),
                *(draw(st.sampled_from((1, 2, 64, 112, 128, 1000))) for _ in range(3)),
            )
            for index in range(draw(st.integers(0, 1)))
        )
        count = max(1, sum(product.values for product in products))
        hidden = Array("float32", (-(-count // 1024), 1024), memoryview(bytes(-(-count // 1024) * 4096)))
        factors = {
            product.product: Factors(torch.zeros(product.rank, product.inputs), torch.zeros(product.outputs, product.rank))
            for product in products
        }
        digests = (digest_of(factors),) * draw(st.sampled_from((0, 1, BLOCKS, BLOCKS, 1024)))
        frame = AdapterFrame(joined_digest(digests), digests, block, products, hidden)
    return Sent("mallory", receiver, frame)


def cancels(draw: st.DrawFn, talk: Talk) -> Sent:
    return _to_server(draw, talk, Cancel(_session(draw, talk), mostly(draw, talk.generation, odd_counts, 5)))


def closes(draw: st.DrawFn, talk: Talk) -> Sent:
    return _to_server(draw, talk, Close(_session(draw, talk), draw(st.none() | st.just(talk.generation) | odd_counts)))


def questions(draw: st.DrawFn, talk: Talk) -> Sent:
    message = draw(
        st.one_of(
            st.builds(Ask, st.just(_session(draw, talk)), st.just(talk.generation) | odd_counts),
            st.builds(Whereabouts, st.just(_session(draw, talk)), odd_counts, odd_counts, odd_counts),
            st.builds(Leaving),
            st.builds(AskCounters),
            st.builds(Counters, st.dictionaries(odd_names, odd_counts, max_size=4)),
            st.builds(Ping, odd_counts),
            st.builds(Pong, odd_counts, st.booleans()),
            st.builds(Refused, odd_names),
        )
    )
    return _to_anybody(draw, talk, message)


logprobs = st.sampled_from((0.0, -5e-324, -1.0, -1e308, float("-inf")))
alternatives = st.lists(st.tuples(odd_counts, logprobs), max_size=3).map(tuple)
KINDS = ("Busy", "ServerFault", "NetworkError", "InvalidSetting", "PromptTooLong", "PromptNeeded", "AdapterNeeded", "Unauthorized", "x", "")


def replies(draw: st.DrawFn, talk: Talk) -> Sent:
    session, generation = st.just(_session(draw, talk)), st.one_of(st.integers(0, 3), odd_counts)
    message = draw(
        st.one_of(
            st.builds(
                Token,
                session,
                generation,
                odd_counts,
                odd_counts,
                logprobs,
                alternatives,
                st.none() | st.sampled_from(FinishReason),
                timings,
            ),
            st.builds(Scores, session, generation, odd_counts, st.lists(st.builds(Score, logprobs, alternatives), max_size=3).map(tuple)),
            st.builds(HiddenFrame, session, generation, odd_counts, st.just(arrays(draw, 2))),
            st.builds(Cached, session, generation, odd_counts),
            st.builds(Gap, session, generation, odd_counts),
            st.builds(
                FailedFrame,
                session,
                generation,
                st.sampled_from(KINDS),
                odd_names,
                st.none() | st.sampled_from((0.0, 5e-324, 1e308)),
                odd_names,
                st.dictionaries(odd_names, odd_integers | odd_names, max_size=2),
            ),
            st.builds(ResultFrame, odd_counts, st.just(arrays(draw, 2)), timings),
        )
    )
    return _to_anybody(draw, talk, message)


def _session(draw: st.DrawFn, talk: Talk) -> str:
    return str(mostly(draw, talk.session, st.sampled_from((*HONEST_SESSIONS, *NAMES)), 4))


def _to_server(draw: st.DrawFn, talk: Talk, message: WireMessage) -> Sent:
    return Sent(draw(st.sampled_from(HOSTILE)), server(draw, talk), message)


def _to_anybody(draw: st.DrawFn, talk: Talk, message: WireMessage) -> Sent:
    return Sent(draw(st.sampled_from(HOSTILE)), draw(st.sampled_from((*talk.spans, *talk.spans, *HONEST))), message)


MESSAGES = (*[steps] * 12, *[ring_steps] * 2, *[calls] * 3, prompts, adapters, cancels, closes, questions, replies)


def gifts(draw: st.DrawFn, talk: Talk) -> list[Sent]:
    """The prompt and the adapter that a talk names, for the honest servers of its route."""
    sent = []
    for hop in talk.route:
        own = range(*talk.spans.get(hop.peer, (0, 0)))
        if not (hop.start in own and hop.end - 1 in own):
            continue
        if talk.prompt is not None and talk.prompt.tokens < CONTEXT:
            has_input = hop.start == 0 or not talk.prompt.deep
            rows = (has_input + (hop.end - hop.start if talk.prompt.deep else 0)) * talk.prompt.tokens
            sent.append(
                Sent("mallory", hop.peer, PromptFrame(talk.prompt, hop.start, hop.end, arrays(draw, rows, float32=True), has_input))
            )
        blocks = next((adapter for adapter in _adapters() if adapter[0].digest == talk.adapter), ())
        sent += [Sent("mallory", hop.peer, blocks[block]) for block in range(hop.start, hop.end) if blocks]
    return sent


@st.composite
def batches(draw: st.DrawFn, spans: Spans, size: int) -> Sequence[Sent]:
    """About `size` messages of two sessions, to servers of these spans."""
    tag = draw(st.integers(0, 2**16))
    talks = [Talk(f"{tag} {number}", spans, draw(routes(spans))) for number in range(2)]
    sent: list[Sent] = []
    for talk in talks:
        if rarely(draw, 5):
            talk.prompt = draw(prompt_names())
        if rarely(draw, 5):
            talk.adapter = draw(adapter_names)
        if not rarely(draw, 5):
            sent += gifts(draw, talk)
    while len(sent) < size:
        sent.append(draw(st.sampled_from(MESSAGES))(draw, draw(st.sampled_from(talks))))
    return sent
