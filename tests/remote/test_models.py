"""Distributed models against transformers' own in one process: logits, gradients, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, get_scheduler

import corolla
from corolla.errors import InvalidSetting, PromptError, UnsupportedModel
from corolla.messages import BackwardFrame, ForwardFrame
from corolla.remote.models import (
    AutoDistributedConfig,
    AutoDistributedModel,
    AutoDistributedModelForCausalLM,
    AutoDistributedModelForSequenceClassification,
)
from tests.models import tiny
from tests.remote.conftest import MakeSwarm
from tests.remote.stock import IDS, MASK, P, assert_step_equal, stock
from tests.remote.swarm import killing

SERVERS = [
    {"a": (0, 4)},
    {"a": (0, 2), "b": (2, 4)},
    {"a": (0, 1), "b": (1, 3), "c": (3, 4)},
    {"a": (0, 1), "b": (1, 2), "c": (2, 3), "d": (3, 4)},
]


@pytest.fixture
def load(make_swarm: MakeSwarm) -> Callable[..., Any]:
    """A distributed model whose blocks are at the given servers."""

    def load(directory: Path, servers: dict[str, tuple[int, int]], **settings: Any) -> Any:
        model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32", **settings)
        model.close()
        local = make_swarm(directory, servers)
        model.connect(local.calls)
        model.local = local
        return model

    return load


@pytest.mark.parametrize("servers", SERVERS)
@pytest.mark.parametrize("mode", [None, "ptune", "deep_ptune"])
def test_logits_and_gradients_are_transformers(load: Callable[..., Any], directory: Path, servers: Any, mode: Any) -> None:
    model, reference = load(directory, servers, tuning_mode=mode, pre_seq_len=P), stock(directory)
    assert_step_equal(model, reference, mode)


@pytest.mark.parametrize("kind", [ForwardFrame, BackwardFrame])
def test_a_servers_death_changes_no_number(load: Callable[..., Any], directory: Path, kind: type) -> None:
    model = load(directory, {"a": (0, 2), "b": (2, 4), "c": (0, 3), "d": (2, 4)}, tuning_mode="deep_ptune", pre_seq_len=P)
    killed = killing(model.local, kind, "b")
    assert_step_equal(model, stock(directory), "deep_ptune")
    assert killed == ["b"]


@pytest.mark.parametrize("mode", [None, "deep_ptune"])
def test_without_peers_the_blocks_are_in_this_process(directory: Path, mode: Any) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32, tuning_mode=mode, pre_seq_len=P)
    assert_step_equal(model, stock(directory), mode)
    model.close()
    model.close()


def test_hidden_states_between_the_blocks(load: Callable[..., Any], directory: Path) -> None:
    model, reference = load(directory, SERVERS[2]), stock(directory)
    ours = model(IDS[:1], output_hidden_states=True).hidden_states
    theirs = reference(IDS[:1], output_hidden_states=True).hidden_states
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_what_the_client_computes_is_loaded(checkpoints: dict[str, Path], directory: Path) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(directory)
    names = {name for name, _ in model.named_parameters()}
    llama = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    bloom = {f"transformer.{name}" for name in ("word_embeddings.weight", "ln_f.weight", "ln_f.bias")}
    bloom |= {f"transformer.word_embeddings_layernorm.{name}" for name in ("weight", "bias")}
    assert names == (llama if directory == checkpoints["llama"] else bloom)
    assert len(model.bare.blocks) == 4
    model.close()


@pytest.mark.parametrize(
    "family", ["llama3-rope", "mistral-window", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "falcon-40b", "gpt-neox"]
)
def test_any_family_that_servers_compute(family: str, tmp_path: Path) -> None:
    directory = tiny.save(family, tmp_path)
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32", tuning_mode="deep_ptune", pre_seq_len=P)
    assert_step_equal(model, stock(directory), "deep_ptune")
    answers = [each.generate(IDS[:1], max_new_tokens=5, do_sample=False) for each in (load_plain(directory), stock(directory))]
    assert torch.equal(*answers)
    model.close()


def load_plain(directory: Path) -> Any:
    return AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32")


def test_tied_heads_and_base_models(tmp_path: Path) -> None:
    directory = tiny.save("llama-tied", tmp_path)
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, dtype="float32")
    reference = stock(directory)
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    base = AutoDistributedModel.from_pretrained(directory, dtype="float32")
    torch.testing.assert_close(base(IDS).last_hidden_state, reference.model(IDS).last_hidden_state, rtol=1e-5, atol=1e-5)
    for each in (model, base):
        each.close()


@torch.no_grad()
def test_a_heads_packed_product_is_the_stock_one(directory: Path) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32")
    head = model.get_output_embeddings()
    hidden_SxNxE = torch.randn(2, 5, head.in_features)[:, -3:]  # cut from more columns, as `logits_to_keep` does
    for _ in range(2):
        torch.testing.assert_close(head(hidden_SxNxE), functional.linear(hidden_SxNxE, head.weight), atol=1e-5, rtol=1e-5)
        head.weight.mul_(2)  # and the packed copy is made again
    head.to(torch.bfloat16)
    assert head(hidden_SxNxE.bfloat16()).dtype == torch.bfloat16
    with torch.enable_grad():
        assert head(hidden_SxNxE.bfloat16().requires_grad_()).requires_grad
    model.close()


def test_prompts_are_trained(checkpoints: dict[str, Path]) -> None:
    torch.manual_seed(0)
    model = AutoDistributedModelForCausalLM.from_pretrained(
        checkpoints["bloom"], torch_dtype=torch.float32, tuning_mode="deep_ptune", pre_seq_len=4
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(12):
        loss = model(IDS, attention_mask=MASK, labels=IDS.masked_fill(MASK == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    model.close()


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_a_training_loop_as_it_is_written_for_petals(directory: Path, mode: Any) -> None:
    """Their notebook's steps: the model on a device, padding that is not masked, an optimizer of all parameters, and talk after it."""
    torch.manual_seed(0)
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, pre_seq_len=4, tuning_mode=mode).to("cpu")
    texts = [{"input_ids": ids, "labels": ids} for ids in torch.nn.functional.pad(IDS.repeat(6, 1), (0, 3))]
    loader = DataLoader(texts, shuffle=True, batch_size=4, drop_last=True)
    trained = [name.rpartition(".prompts.")[2] for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == (["tokens", "deep"] if mode == "deep_ptune" else ["tokens"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=len(loader))
    losses = []
    for batch in loader:
        model.train()
        loss = model(**{name: tensor.to("cpu") for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    said = model.generate(IDS[:1], temperature=0.6, do_sample=True, top_k=20, eos_token_id=2, max_new_tokens=5)
    assert torch.equal(said[:, :6], IDS[:1])
    assert 6 < said.shape[1] <= 11
    model.close()


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompts_are_saved_and_loaded(directory: Path, tmp_path: Path, mode: Any) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32", tuning_mode=mode, pre_seq_len=P)
    if mode == "deep_ptune":
        torch.nn.init.normal_(model.bare.prompts.deep)
    model.save_pretrained(tmp_path / "prompt")
    again = AutoDistributedModelForCausalLM.from_pretrained(directory, torch_dtype="float32", prompt=tmp_path / "prompt")
    assert again.soft_prompt.digest == model.soft_prompt.digest
    assert [p.requires_grad for p in again.bare.prompts.parameters()] == [True] * (1 + (mode == "deep_ptune"))
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=0)
    for each in (model, again):
        each.close()
    with pytest.raises(PromptError, match="tuning_mode"):
        load_plain(directory).save_pretrained(tmp_path / "none")


def test_a_classifiers_head_is_saved_with_its_prompt(directory: Path, tmp_path: Path) -> None:
    settings = {"torch_dtype": "float32", "num_labels": 3}
    model = AutoDistributedModelForSequenceClassification.from_pretrained(directory, tuning_mode="ptune", pre_seq_len=P, **settings)
    model.save_pretrained(tmp_path)
    again = AutoDistributedModelForSequenceClassification.from_pretrained(directory, prompt=tmp_path, **settings)
    torch.testing.assert_close(again(IDS[:1]).logits, model(IDS[:1]).logits, rtol=0, atol=0)
    with pytest.raises(PromptError, match="num_labels"):
        AutoDistributedModelForSequenceClassification.from_pretrained(directory, prompt=tmp_path, torch_dtype="float32", num_labels=2)
    for each in (model, again):
        each.close()


def test_a_classifiers_head_is_trained_with_its_prompts(directory: Path) -> None:
    torch.manual_seed(0)
    model = AutoDistributedModelForSequenceClassification.from_pretrained(
        directory, torch_dtype="float32", num_labels=3, tuning_mode="ptune", pre_seq_len=P
    )
    reference = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(directory, num_labels=3)).eval()
    reference.base_model.load_state_dict(stock(directory).base_model.state_dict())
    reference.score.weight.data.copy_(model.score.weight)
    labels = torch.tensor([2, 0])
    embeddings = torch.cat(
        [model.bare.prompts.tokens.detach().expand(2, -1, -1), reference.get_input_embeddings()(IDS[:1].expand(2, -1))], 1
    )
    expected = reference(inputs_embeds=embeddings, labels=labels)
    out = model(IDS[:1].expand(2, -1), labels=labels)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(model.score.weight.grad, reference.score.weight.grad, rtol=1e-5, atol=1e-5)
    assert {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.requires_grad} == {"score", "prompts"}
    model.close()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"tuning_mode": "lora"}, "tuning_mode"),
        ({"tuning_mode": "ptune", "pre_seq_len": 0}, "pre_seq_len"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"torch_dtype": torch.float64}, "torch_dtype"),
        ({"request_timeout": -1}, "request_timeout"),
        ({"load_in_8bit": True}, "load_in_8bit"),
    ],
)
def test_settings_that_do_not_fit_are_named(checkpoints: dict[str, Path], settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidSetting, match=word):
        AutoDistributedModelForCausalLM.from_pretrained(checkpoints["llama"], **settings)


def test_other_families_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        AutoDistributedModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InvalidSetting, match="is a bloom model"):
        corolla.DistributedLlamaForCausalLM.from_pretrained(checkpoints["bloom"])
    assert AutoDistributedConfig.from_pretrained(checkpoints["bloom"]).model_type == "bloom"


def test_inputs_that_do_not_fit_are_named(checkpoints: dict[str, Path]) -> None:
    model = AutoDistributedModelForCausalLM.from_pretrained(checkpoints["llama"], torch_dtype="float32")
    with pytest.raises(InvalidSetting, match="position_ids"):
        model(IDS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(InvalidSetting, match="inputs_embeds"):
        model.model(IDS, inputs_embeds=torch.zeros(2, 6, 64))
    with pytest.raises(InvalidSetting, match="past_key_values"):
        model(IDS, past_key_values=stock(checkpoints["llama"])(IDS).past_key_values)
    model.close()


def test_importing_corolla_stays_cheap() -> None:
    code = "import corolla, sys; assert 'torch' not in sys.modules; assert 'RemoteSequential' in dir(corolla)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert corolla.AutoDistributedModelForCausalLM is AutoDistributedModelForCausalLM
    with pytest.raises(AttributeError, match="nonsense"):
        corolla.nonsense  # noqa: B018
