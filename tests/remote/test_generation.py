"""`generate` against transformers' own: greedy, sampled, beams, padded batches, soft prompts, and conversations in a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, StoppingCriteria, TextStreamer

from corolla.errors import InvalidSetting, PromptTooLong
from corolla.messages import StepFrame, WireMessage
from corolla.remote.models import AutoDistributedModelForCausalLM
from tests.remote.conftest import MakeSwarm
from tests.remote.swarm import Local

SPARE = {"a": (0, 2), "b": (2, 4), "c": (0, 1), "d": (1, 3), "e": (3, 4)}
IDS = torch.tensor([[5, 16, 27, 38, 49, 60], [7, 18, 29, 40, 51, 62]])
PADDED = {"inputs": torch.tensor([[0, 0, 27, 38, 49, 60], [7, 18, 29, 40, 51, 62]]), "attention_mask": IDS.new_ones(2, 6)}
PADDED["attention_mask"][0, :2] = 0


@pytest.fixture(scope="module", params=["llama", "bloom"])
def both(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[tuple[Any, Any]]:
    """A distributed model in this process, and the stock one."""
    directory = checkpoints[request.param]
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32")
    yield model, AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"prefill_chunk_size": 4},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("given", [{"inputs": IDS}, PADDED], ids=["even", "padded"])
def test_it_answers_as_transformers(both: tuple[Any, Any], given: dict[str, Any], settings: dict[str, Any]) -> None:
    answers = []
    for model in both:
        torch.manual_seed(3)
        answers.append(model.generate(**given, max_new_tokens=10, **settings))
    assert torch.equal(*answers)


def test_prompt_lookup_goes_back_in_the_session(both: tuple[Any, Any]) -> None:
    repeated = IDS[:1].repeat(1, 4)
    answers = [model.generate(repeated, max_new_tokens=10, prompt_lookup_num_tokens=3) for model in both]
    assert torch.equal(*answers)


def test_scores_streamers_and_inputs_embeds(both: tuple[Any, Any]) -> None:
    class Collect(TextStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            pass

    streamer = Collect()
    ours, theirs = (
        model.generate(IDS[:1], max_new_tokens=5, return_dict_in_generate=True, output_scores=True, streamer=streamer) for model in both
    )
    assert streamer.seen == ours.sequences[0].tolist() * 2
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
    embedded = [model.generate(inputs_embeds=model.get_input_embeddings()(IDS), max_new_tokens=5) for model in both]
    assert torch.equal(*embedded)


class Even(LogitsProcessor):
    """No odd token is said."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


class AfterFour(StoppingCriteria):
    """Four new tokens are enough."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= IDS.shape[1] + 4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=lambda settings: "-".join(settings))
def test_processors_and_criteria_of_ones_own(both: tuple[Any, Any], settings: dict[str, Any]) -> None:
    answers = [
        model.generate(**PADDED, max_new_tokens=9, logits_processor=[Even()], stopping_criteria=[AfterFour()], **settings) for model in both
    ]
    assert torch.equal(*answers)
    assert answers[0].shape[1] == IDS.shape[1] + 4
    assert not (answers[0][:, IDS.shape[1] :] % 2).any()


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=lambda settings: "-".join(settings))
def test_soft_prompts_are_in_every_answer(checkpoints: dict[str, Path], mode: Any, settings: dict[str, Any]) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(checkpoints["llama"], torch_dtype="float32", tuning_mode=mode, pre_seq_len=3)
    with torch.no_grad():
        for parameter in model.bare.prompts.parameters():
            parameter.normal_()
    answers = []
    for use_cache in (True, False):  # without a cache all goes through the blocks again for every token
        torch.manual_seed(4)
        answers.append(model.generate(**PADDED, max_new_tokens=8, use_cache=use_cache, **settings))
    assert torch.equal(*answers)
    plain = AutoModelForCausalLM.from_pretrained(checkpoints["llama"], dtype=torch.float32).eval()
    assert not torch.equal(answers[0], plain.generate(**PADDED, max_new_tokens=8, **settings))
    with model.inference_session() as session:
        model.generate(**PADDED, session=session, max_new_tokens=2)
        with pytest.raises(InvalidSetting, match="soft tokens"):
            session.position = 2
    model.close()


class Talk:
    """A stock conversation: all that was said is computed again for every answer."""

    def __init__(self, model: Any) -> None:
        self.model, self.said, self.mask = model, None, None

    def answer(self, new: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> torch.Tensor:
        mask = torch.ones_like(new) if mask is None else mask
        if self.said is not None:
            new, mask = torch.cat([self.said, new], 1), torch.cat([self.mask, mask], 1)
        self.said = self.model.generate(new, attention_mask=mask, **settings)
        self.mask = torch.cat([mask, mask.new_ones(len(mask), self.said.shape[1] - mask.shape[1])], 1)
        return self.said


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 30}], ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize("padded", [False, True])
def test_turns_of_a_session_are_one_conversation(both: tuple[Any, Any], settings: dict[str, Any], padded: bool) -> None:
    model, talk = both[0], Talk(both[1])
    first = PADDED if padded else {"inputs": IDS, "attention_mask": torch.ones_like(IDS)}
    turns = [(first["inputs"], first["attention_mask"])] + [(IDS[:, turn : turn + 2] + 90, None) for turn in range(4)]
    with model.inference_session(max_length=200) as session:
        for new, mask in turns:
            seen = 0 if talk.said is None else talk.said.shape[1]
            torch.manual_seed(5)
            expected = talk.answer(new, mask, max_new_tokens=4, eos_token_id=None, **settings)
            torch.manual_seed(5)
            masked = {} if mask is None else {"attention_mask": mask}
            got = model.generate(new, session=session, max_new_tokens=4, eos_token_id=None, **masked, **settings)
            assert torch.equal(got, expected[:, seen:])
            assert torch.equal(session.output_ids, expected)


def test_a_turn_is_undone_by_setting_the_position(both: tuple[Any, Any]) -> None:
    model, stock = both
    with model.inference_session() as session:
        model.generate(IDS[:1], session=session, max_new_tokens=5)
        session.position = 4
        answer = model.generate(IDS[1:, :3], session=session, max_new_tokens=5, do_sample=False)
    expected = stock.generate(torch.cat([IDS[:1, :4], IDS[1:, :3]], 1), max_new_tokens=5, do_sample=False)
    assert torch.equal(answer, expected[:, 4:])


class Stumbling(LogitsProcessor):
    """Raises at the third token."""

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.tokens += 1
        if self.tokens == 3:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize("turns", [0, 1])
def test_a_turn_that_fails_is_as_if_it_had_never_been(both: tuple[Any, Any], turns: int, settings: dict[str, Any]) -> None:
    answers = []
    for fails in (False, True):
        with both[0].inference_session() as session:
            for _ in range(turns):
                both[0].generate(IDS, session=session, max_new_tokens=5)
            if fails:
                with pytest.raises(KeyboardInterrupt):
                    both[0].generate(IDS + 1, session=session, max_new_tokens=5, logits_processor=[Stumbling()], **settings)
            answers.append(both[0].generate(IDS[:, :4], session=session, max_new_tokens=5))
    assert torch.equal(*answers)


def test_earlier_turns_are_not_sent_again(make_swarm: MakeSwarm, checkpoints: dict[str, Path]) -> None:
    model, local = over(make_swarm, checkpoints["llama"], {"a": (0, 2), "b": (2, 4)})
    rows: list[int] = []

    def before(peer: str, message: WireMessage) -> WireMessage:
        rows.extend([message.hidden.shape[0]] if isinstance(message, StepFrame) and message.hidden is not None else [])
        return message

    local.before = before
    with model.inference_session() as session:
        for turn in (IDS[:1], IDS[1:, :3]):
            model.generate(turn, session=session, max_new_tokens=3, eos_token_id=None)
    assert rows == [6, 1, 1, 4, 1, 1]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=lambda settings: "-".join(settings))
@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_a_servers_death_changes_no_token(make_swarm: MakeSwarm, directory: Path, mode: Any, settings: dict[str, Any]) -> None:
    answers = []
    for dies in (False, True):
        torch.manual_seed(6)
        model, local = over(make_swarm, directory, SPARE, tuning_mode=mode, pre_seq_len=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        sent = [0]

        def before(peer: str, message: WireMessage, local: Local = local, dies: bool = dies, sent: list[int] = sent) -> WireMessage:
            sent[0] += 1
            if dies and sent[0] == 9:
                local.hub.kill("b")
            return message

        local.before = before
        torch.manual_seed(7)
        answers.append(model.generate(**PADDED, max_new_tokens=8, eos_token_id=None, **settings))
        assert local.servers.bans.banned() == ({"b"} if dies else set())
    assert torch.equal(*answers)


def over(make_swarm: MakeSwarm, directory: Path, servers: dict[str, tuple[int, int]], **settings: Any) -> tuple[Any, Local]:
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32", **settings)
    model.close()
    local = make_swarm(directory, servers)
    model.connect(local.calls)
    return model, local


def test_what_does_not_fit_is_named(both: tuple[Any, Any]) -> None:
    model = both[0]
    with model.inference_session(max_length=10) as session, pytest.raises(PromptTooLong, match="10"):
        model.generate(IDS, session=session, max_new_tokens=20, eos_token_id=None)
    with model.inference_session() as session:
        model.generate(IDS, session=session, max_new_tokens=2)
        with pytest.raises(InvalidSetting, match="1 sequences"):
            model.generate(IDS[:1], session=session, max_new_tokens=2)
    with pytest.raises(InvalidSetting, match="use_cache=False"):
        model.generate(IDS, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
