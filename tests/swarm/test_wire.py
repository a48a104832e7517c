from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corolla import errors
from corolla.errors import (
    Busy,
    CapacityError,
    CheckpointError,
    CorollaError,
    EmptyPrompt,
    InvalidSetting,
    NetworkError,
    PromptTooLong,
    ProtocolError,
    ServerFault,
)
from corolla.messages import (
    MAX_DRAFTS,
    MAX_STEP_TOKENS,
    Q8_BLOCK,
    AdapterFrame,
    Array,
    Cached,
    Cancel,
    Close,
    FailedFrame,
    Gap,
    HiddenFrame,
    Hop,
    HopTiming,
    Ping,
    Pong,
    ProductFrame,
    Refused,
    Reply,
    StepFrame,
    Token,
    Unknown,
    WireDtype,
    WireMessage,
)
from corolla.swarm.arrays import from_array, to_array
from corolla.swarm.convert import (
    error_of,
    failed_of,
    from_adapter_part,
    from_hidden,
    from_settings,
    from_step,
    to_adapter_part,
    to_settings,
    to_step,
)
from corolla.swarm.frames import LENGTH, decode, encode
from corolla.types import AdapterPart, Factors, Failed, FinishReason, GenerationSettings, Hidden, Span, Step

DTYPES: tuple[WireDtype, ...] = ("float32", "bfloat16", "float16", "q8")
EXACT: tuple[WireDtype, ...] = ("float32", "bfloat16", "float16")

patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # shared machines stall

names = st.text(max_size=60)
counts = st.integers(0, 2**63 - 1)
token_ids = st.integers(-(2**63), 2**63 - 1)
seconds = st.floats(0, 1e9)
logprobs = st.floats(max_value=0, allow_nan=False)
options = st.builds(
    GenerationSettings,
    max_tokens_to_generate=st.integers(1, 2**31 - 1),
    do_sample=st.booleans(),
    temperature=st.floats(0.001, 2),
    top_k=st.none() | st.integers(1, 300_000),
    top_p=st.floats(1e-6, 1),
    repetition_penalty=st.floats(1, 2),
    top_logprobs=st.integers(0, 20),
    seed=counts,
    stop_token_ids=st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
)
timings = st.lists(st.builds(HopTiming, names, seconds, seconds, seconds), max_size=3).map(tuple)


@st.composite
def arrays(draw: st.DrawFn, rows: int | None = None) -> Array:
    shape = (draw(st.integers(1, 4)) if rows is None else rows, draw(st.integers(1, 130)))
    dtype = draw(st.sampled_from(DTYPES))
    size = Array(dtype, shape).nbytes
    return Array(dtype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))


@st.composite
def routes(draw: st.DrawFn) -> tuple[Hop, ...]:
    ends = sorted(draw(st.sets(st.integers(1, 2**62), max_size=5)))
    return tuple(Hop(draw(names), start, end) for start, end in zip([0, *ends], ends, strict=False))


@st.composite
def steps(draw: st.DrawFn) -> StepFrame:
    tokens = tuple(draw(st.lists(token_ids, max_size=5)))
    hidden = draw(st.none() | arrays(len(tokens))) if tokens else None
    route = draw(routes())
    hop = draw(st.integers(0, len(route) - 1)) if route else 0
    ours = draw(st.none() | options)
    wired = None if ours is None else from_settings(ours)
    session, client, adapter = draw(names), draw(names), draw(names)
    drafts = draw(st.integers(0, max(0, len(tokens) - 1)))
    return StepFrame(session, draw(counts), draw(counts), tokens, hidden, wired, route, hop, client, adapter, draw(timings), drafts=drafts)


tokens = st.builds(
    Token,
    names,
    counts,
    counts,
    counts,
    logprobs,
    st.lists(st.tuples(counts, logprobs), max_size=20).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    timings,
)
failures = st.builds(
    FailedFrame,
    names,
    counts,
    names,
    names,
    st.none() | seconds,
    names,
    st.dictionaries(names, names | st.integers(-(2**63), 2**63 - 1), max_size=3),
)
messages = st.one_of(
    steps(),
    st.builds(Cancel, names, counts),
    st.builds(Close, names),
    tokens,
    st.builds(HiddenFrame, names, counts, counts, arrays()),
    st.builds(Cached, names, counts, counts),
    st.builds(Gap, names, counts, counts),
    failures,
    st.builds(Ping, counts),
    st.builds(Pong, counts),
    st.builds(Refused, names),
)


def sent(message: WireMessage) -> WireMessage:
    """What a peer receives."""
    received = decode(b"".join(encode(message))[4:])
    assert not isinstance(received, Unknown)
    return received


@patient
@given(messages)
def test_messages_come_back_as_they_were(message: WireMessage) -> None:
    assert sent(message) == message


@patient
@given(options)
def test_settings_come_back_as_they_were(given_settings: GenerationSettings) -> None:
    assert to_settings(from_settings(given_settings)) == given_settings


def test_settings_outside_their_range_are_the_callers_fault() -> None:
    frame = from_settings(GenerationSettings(seed=4))
    object.__setattr__(bad := GenerationSettings(), "top_p", 7.0)
    with pytest.raises(InvalidSetting, match="top_p"):
        to_settings(from_settings(bad))
    assert to_settings(frame).seed == 4


def random(rows: int, values: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, values, generator=torch.Generator().manual_seed(rows * values)).to(dtype)


@pytest.mark.parametrize("wire_dtype", EXACT)
@pytest.mark.parametrize("shape", [(1, 1), (1, 577), (3, 64)])
def test_a_tensor_arrives_exactly_in_its_own_dtype(wire_dtype: WireDtype, shape: tuple[int, int]) -> None:
    tensor = random(*shape, getattr(torch, wire_dtype))
    array = to_array(tensor, wire_dtype)
    assert array.shape == shape
    assert torch.equal(from_array(array), tensor)
    received = sent(HiddenFrame("s", 0, 0, array))
    assert isinstance(received, HiddenFrame)
    assert torch.equal(from_array(received.hidden), tensor)


@pytest.mark.parametrize("wire_dtype", EXACT)
def test_a_tensor_in_its_own_dtype_is_not_copied(wire_dtype: WireDtype) -> None:
    tensor = random(2, 8, getattr(torch, wire_dtype))
    assert from_array(to_array(tensor, wire_dtype)).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("wire_dtype", DTYPES)
def test_views_and_gradients_may_be_sent(wire_dtype: WireDtype) -> None:
    tensor = random(8, 6).requires_grad_()[::2].T
    assert torch.allclose(from_array(to_array(tensor, wire_dtype)).float(), tensor, atol=0.02)


def test_a_received_tensor_may_be_written_to() -> None:
    received = sent(HiddenFrame("s", 0, 0, to_array(torch.ones(2, 3), "float32")))
    assert isinstance(received, HiddenFrame)
    tensor = from_array(received.hidden)
    tensor += 1
    assert tensor.tolist() == [[2.0] * 3] * 2


@patient
@given(
    st.integers(1, 3),
    st.integers(1, 200),
    st.floats(-30, 30),
    st.integers(0, 2**31),
)
def test_eight_bits_are_within_half_a_code_of_the_blocks_largest(rows: int, values: int, power: float, seed: int) -> None:
    tensor = torch.randn(rows, values, generator=torch.Generator().manual_seed(seed)) * 10**power
    array = to_array(tensor, "q8")
    restored = from_array(array)
    assert array.nbytes == array.data.nbytes == rows * (values + 4 * math.ceil(values / Q8_BLOCK))
    for start in range(0, values, Q8_BLOCK):
        block, got = tensor[:, start : start + Q8_BLOCK], restored[:, start : start + Q8_BLOCK]
        bound = block.abs().amax(dim=1, keepdim=True) / 254 * (1 + 1e-5)
        assert bool(((block - got).abs() <= bound).all())


def test_a_rows_eight_bits_do_not_depend_on_its_company() -> None:
    tensor = random(3, 100)
    assert torch.equal(from_array(to_array(tensor, "q8"))[1:2], from_array(to_array(tensor[1:2], "q8")))
    assert not from_array(to_array(torch.zeros(1, 65), "q8")).any()


@pytest.mark.parametrize("wire_dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_seen_on_the_other_side(wire_dtype: WireDtype, bad: float) -> None:
    tensor = random(2, 70, torch.float16)
    assert bool(from_array(to_array(tensor, wire_dtype)).isfinite().all())
    tensor[1, 69] = bad
    assert not bool(from_array(to_array(tensor, wire_dtype)).isfinite().all())


def test_what_does_not_fit_float16_is_not_sent() -> None:
    with pytest.raises(ServerFault, match="bfloat16"):
        to_array(torch.full((1, 2), 1e6), "float16")


def test_bytes_that_do_not_fit_the_shape() -> None:
    with pytest.raises(ProtocolError, match="takes 24 bytes, not 3"):
        from_array(Array("float32", (2, 3), memoryview(b"abc")))


def test_a_step_of_tokens_there_and_back() -> None:
    step = Step("s", 5, (7, 8), 2, GenerationSettings(seed=1), "a")
    frame = from_step(step, route=(Hop("a", 0, 4), Hop("b", 4, 8)), client="me")
    back = to_step(frame)
    assert (back.session, back.start, back.payload, back.generation) == ("s", 5, (7, 8), 2)
    assert (back.settings, back.adapter) == (step.settings, "a")
    assert (frame.hop, frame.client, frame.hidden) == (0, "me", None)


def test_a_step_of_hidden_states_there_and_back() -> None:
    hidden = random(2, 6)
    frame = from_step(Step("s", 0, hidden, tokens=[7, 8]), wire_dtype="float32")
    payload = to_step(frame).payload
    assert isinstance(payload, torch.Tensor)
    assert torch.equal(payload, hidden)
    assert frame.tokens == (7, 8)
    with pytest.raises(ValueError, match="1 tokens come with 2 rows"):
        from_step(Step("s", 0, hidden, tokens=[7]))


def test_guesses_there_and_back() -> None:
    for step in (Step("s", 5, (7, 8, 9), drafts=2), Step("s", 5, random(3, 6), tokens=(7, 8, 9), drafts=2)):
        assert to_step(from_step(step, wire_dtype="float32")).drafts == 2
    with pytest.raises(ValueError, match="the first of which is none"):
        from_step(Step("s", 5, (7, 8, 9), drafts=3))
    many = b"".join(encode(StepFrame("s", 1, 5, tuple(range(20)), drafts=MAX_DRAFTS + 1)))
    with pytest.raises(ProtocolError, match="<= 15"):
        decode(many[LENGTH.size :])


def test_a_step_carries_only_so_many_tokens() -> None:
    from_step(Step("s", 0, range(MAX_STEP_TOKENS)))
    with pytest.raises(ValueError, match="send them in several"):
        from_step(Step("s", 0, range(MAX_STEP_TOKENS + 1)))


@pytest.mark.parametrize("message", [Cancel("s", 4), Close("s")])
def test_other_messages_there_and_back(message: Cancel | Close) -> None:
    assert sent(message) == message


@pytest.mark.parametrize(
    "reply",
    [
        Token("s", 1, 5, 42, -0.5),
        Token("s", 1, 5, 42, -0.5, ((42, -0.5), (1, -math.inf)), FinishReason.LENGTH),
        Cached("s", 1, 6),
        Gap("s", 1, 3),
    ],
)
def test_replies_there_and_back(reply: Reply) -> None:
    assert not isinstance(reply, (Hidden, Failed))
    assert sent(reply) == reply


def test_hidden_states_as_a_reply() -> None:
    tensor = random(2, 3, torch.bfloat16)
    frame = sent(from_hidden(Hidden("s", 1, 4, tensor), "bfloat16"))
    assert isinstance(frame, HiddenFrame)
    assert (frame.session, frame.generation, frame.start) == ("s", 1, 4)
    assert torch.equal(from_array(frame.hidden), tensor)


def test_an_adapter_there_and_back_block_by_block() -> None:
    blocks = ({"out": Factors(torch.randn(2, 5), torch.randn(700, 2))}, {}, {"up": Factors(torch.randn(1, 3), torch.randn(4, 1))})
    got = []
    for frame in map(sent, from_adapter_part(AdapterPart("f00d", Span(4, 7), blocks, (bytes(32),) * 9))):
        assert isinstance(frame, AdapterFrame)
        got.append(to_adapter_part(frame))
    assert [(part.digest, part.span, len(part.digests)) for part in got] == [("f00d", Span(i, i + 1), 9) for i in (4, 5, 6)]
    for part, block in zip(got, blocks, strict=True):
        assert part.blocks[0].keys() == block.keys()
        assert all(map(torch.equal, part.blocks[0].get("out", ()), block.get("out", ())))


def test_an_adapter_whose_shapes_and_rows_differ_is_refused() -> None:
    array = Array("float32", (1, 16), memoryview(bytes(64)))
    for products in ((ProductFrame("out", 3, 3, 4),), (ProductFrame("out", 1, 1, 1),) * 2):
        with pytest.raises(ValueError, match=r"rows|twice"):
            AdapterFrame("f00d", (), 0, products, array)


ERRORS = (
    InvalidSetting("top_p", "7 is too much"),
    EmptyPrompt(),
    PromptTooLong(9, 8),
    CheckpointError("no config.json"),
    CapacityError("no pages", 2.5),
    Busy(0.5),
    ServerFault("it burns"),
    ProtocolError("no frame"),
    NetworkError("gone"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_keep_their_class_sentence_and_attributes(error: CorollaError) -> None:
    frame = sent(failed_of(error, "s", 3, peer="p"))
    assert isinstance(frame, FailedFrame)
    rebuilt = error_of(frame)
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert vars(rebuilt) == vars(error)
    assert frame.peer == "p"


def test_every_error_can_be_rebuilt_from_its_name_alone() -> None:
    for name, kind in vars(errors).items():
        if isinstance(kind, type) and issubclass(kind, CorollaError):
            error = error_of(FailedFrame("s", 0, name, "why"))
            assert isinstance(error, ServerFault if kind is CorollaError else kind)
            assert str(error) == "why"


def test_an_error_of_an_unknown_kind_is_a_server_fault() -> None:
    error = error_of(FailedFrame("s", 0, "KeyboardInterrupt", "why", details={"args": "x"}))
    assert type(error) is ServerFault
    assert error.args == ("why",)


def test_a_failure_there_and_back() -> None:
    frame = sent(failed_of(Busy(0.5), "s", 2, peer="p"))
    assert isinstance(frame, FailedFrame)
    assert (frame.session, frame.generation) == ("s", 2)
    error = error_of(frame)
    assert isinstance(error, Busy)
    assert error.retry_after == 0.5
    long = failed_of(ServerFault("x" * 10_000), "s", 0)
    assert len(error_of(sent(long)).args[0]) == 4096  # type: ignore[arg-type]
    far = error_of(sent(failed_of(PromptTooLong(2**63 + 5, 512), "s", 0)))  # type: ignore[arg-type]
    assert isinstance(far, PromptTooLong)
    assert (far.tokens, far.limit) == (2**63 - 1, 512)
