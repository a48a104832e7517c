"""Loading spans: what is read, what is refused, and the variants of BLOOM's checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corolla.errors import CheckpointError, InvalidSetting
from corolla.models.reference import Reference
from corolla.models.span import load_span
from corolla.types import Span
from tests.engine.driving import Chain, greedy
from tests.models import tiny

PROMPT = list(range(5, 40))


@pytest.fixture
def bloom(tmp_path: Path) -> Path:
    return tiny.save("bloom", tmp_path)


def rewrite(directory: Path, change: Any) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, directory / "model.safetensors", {"format": "pt"})


def test_a_span_reads_only_its_tensors(bloom: Path) -> None:
    tensors = load_file(bloom / "model.safetensors")
    expected = sum(t.nbytes for name, t in tensors.items() if ".h.1." in name or ".h.2." in name)
    span = load_span(bloom, Span(1, 3), dtype="float32")
    assert span.bytes_read == expected
    assert not span.embeds
    assert not span.heads


def test_a_span_takes_memory_for_its_blocks(tmp_path: Path) -> None:
    tiny.save("bloom", tmp_path, hidden_size=512, n_layer=8, n_head=8)  # 100 MB of float32
    code = (
        "import psutil, sys; from pathlib import Path; from corolla.models.span import load_span; from corolla.types import Span\n"
        "directory, start, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])\n"
        "load_span(directory, Span(0, 1), dtype='float32')\n"  # imports, and what libraries keep
        "before = psutil.Process().memory_info().rss\n"
        "span = load_span(directory, Span(start, end), dtype='float32')\n"
        "print(psutil.Process().memory_info().rss - before)\n"
    )

    def grown(start: int, end: int) -> int:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(start), str(end)], stdout=subprocess.PIPE, check=True)
        return int(done.stdout)

    # The file is mapped, so what was read of it counts too, in both.
    assert grown(3, 5) < 0.4 * grown(0, 8)


def test_the_spans_of_a_model_read_each_block_once(bloom: Path) -> None:
    tensors = load_file(bloom / "model.safetensors")
    embedding = tensors["transformer.word_embeddings.weight"].nbytes
    read = sum(load_span(bloom, Span(i, i + 1), dtype="float32").bytes_read for i in range(4))
    # The tied embedding is read by the first span and, as the head, by the last.
    assert read == sum(t.nbytes for t in tensors.values()) + embedding


def test_bloom_without_its_prefix(bloom: Path) -> None:
    expected = Reference(bloom).forward(PROMPT)
    rewrite(bloom, lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()})
    assert (Chain.load(bloom, (4,), dtype="float32").all_logits(PROMPT) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bloom_at_the_shape_of_560m_equals_stock(tmp_path: Path) -> None:
    # The real shape of the blocks; fewer words, which the blocks do not see.
    tiny.save("bloom", tmp_path, spread=0.03, hidden_size=1024, n_layer=24, n_head=16, vocab_size=2000)
    prompts = [PROMPT, PROMPT[:3]]
    chain = Chain.load(tmp_path, (10, 24), dtype="float32")
    expected = Reference(tmp_path).forward(PROMPT)
    assert (chain.all_logits(PROMPT) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for prompt, tokens in zip(prompts, greedy(Chain([stage.model for stage in chain.stages]), prompts, 128), strict=True):
        # Each is what stock says after the ones before it: all of them in one pass, where token by token takes half a minute.
        said = Reference(tmp_path).forward([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        assert said.argmax(dim=-1).tolist() == tokens


def test_a_tensor_of_the_wrong_shape_is_named(bloom: Path) -> None:
    name = "transformer.h.2.mlp.dense_h_to_4h.weight"
    rewrite(bloom, lambda tensors: {**tensors, name: torch.zeros(3, 5)})
    load_span(bloom, Span(0, 2))
    with pytest.raises(CheckpointError, match=name):
        load_span(bloom, Span(2, 4))


def test_a_missing_tensor_is_named(bloom: Path) -> None:
    name = "transformer.h.1.input_layernorm.weight"
    rewrite(bloom, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=name):
        load_span(bloom)


def test_tensors_of_another_family(bloom: Path) -> None:
    rewrite(bloom, lambda tensors: {f"other.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="is it a bloom model"):
        load_span(bloom)


@pytest.mark.parametrize(
    ("settings", "word"), [({"span": Span(2, 5)}, "blocks"), ({"dtype": "int3"}, "dtype"), ({"weights": "int3"}, "weights")]
)
def test_bad_settings_are_named(bloom: Path, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(InvalidSetting, match=word):
        load_span(bloom, **settings)


def changed(directory: Path, **tensors: torch.Tensor | None) -> Path:
    """With other tensors in the file; None leaves one out. Names have `__` in place of dots."""
    stored = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if tensor is not None:
            stored[name.replace("__", ".")] = tensor
    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_a_head_beside_a_tied_embedding_has_to_be_the_same(tmp_path: Path) -> None:
    directory = tiny.save("llama-tied", tmp_path)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    load_span(changed(directory, lm_head__weight=embedding.clone()), dtype="float32")
    with pytest.raises(CheckpointError, match='"tie_word_embeddings": false'):
        load_span(changed(directory, lm_head__weight=embedding + 1), dtype="float32")


def test_biases_of_some_of_query_key_and_value_are_refused(tmp_path: Path) -> None:
    directory = changed(tiny.save("llama-tied", tmp_path), model__layers__1__self_attn__q_proj__bias=None)
    with pytest.raises(CheckpointError, match="some have a bias and others none"):
        load_span(directory, dtype="float32")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_of_two_activations_the_one_that_transformers_computes_counts(family: str, tmp_path: Path) -> None:
    directory = tiny.save(family, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "relu", "hidden_activation": "gelu_pytorch_tanh"}))
    assert load_span(directory, Span(0, 1), dtype="float32").arch.activation == "gelu_tanh"
