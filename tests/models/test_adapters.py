"""PEFT's LoRA directories read: what is added to each product, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from corolla.errors import AdapterError
from corolla.models.adapters import Adapter, digest_of, joined_digest, load_adapter
from corolla.models.checkpoint import read_config
from corolla.models.config import ModelConfig
from corolla.models.families import architecture
from corolla.types import Span
from tests.models import lora, tiny

WEIGHTS = "adapter_model.safetensors"


def arch_of(directory: Path) -> ModelConfig:
    return architecture(read_config(directory))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lora.save(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_three_matrices_lie_side_by_side(base: Path, saved: Path) -> None:
    adapter, tensors = load_adapter(saved, arch_of(base)), load_file(saved / WEIGHTS)
    x, at = torch.randn(3, 64), "base_model.model.model.layers.2."
    a, b = adapter.blocks[2]["qkv"]
    parts = [
        2.0 * x @ tensors[f"{at}self_attn.{name}.lora_A.weight"].T @ tensors[f"{at}self_attn.{name}.lora_B.weight"].T
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    torch.testing.assert_close(x @ a.T @ b.T, torch.cat(parts, 1))
    assert set(adapter.blocks[0]) == {"qkv", "out", "up", "gate", "down"}
    assert adapter.largest_block == sum(f.numel() for pair in adapter.blocks[0].values() for f in pair)


def test_some_matrices_some_blocks_and_another_scale(base: Path, tmp_path: Path) -> None:
    chosen = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}
    plain = load_adapter(lora.save(base, tmp_path / "a", **chosen), arch_of(base))
    scaled = load_adapter(lora.save(base, tmp_path / "b", use_rslora=True, **chosen), arch_of(base))
    assert [set(block) for block in plain.blocks] == [set(), {"qkv"}, set(), set()]
    keys = slice(64, 96)
    assert not plain.blocks[1]["qkv"].b[keys].any()
    torch.testing.assert_close(scaled.blocks[1]["qkv"].b, plain.blocks[1]["qkv"].b * 2)  # 8 / sqrt(4) and 8 / 4


def test_the_digest_is_of_the_content(base: Path, saved: Path, tmp_path: Path) -> None:
    adapter, again = load_adapter(saved, arch_of(base)), load_adapter(saved, arch_of(base))
    other = load_adapter(lora.save(base, tmp_path / "other", seed=1), arch_of(base))
    assert adapter.digest == again.digest != other.digest
    part = adapter.part(Span(1, 3))
    assert part.digest == joined_digest(part.digests)
    assert [digest_of(block) for block in part.blocks] == list(part.digests[1:3])
    assert Adapter(({},)).digest != Adapter(({}, {})).digest


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return changed


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda d: (d / WEIGHTS).unlink(), "as safetensors"),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:900]), "damaged or cut short"),
        (lambda d: lora.change(d, peft_type="PROMPT_TUNING"), "PROMPT_TUNING, and only LORA"),
        (lambda d: lora.change(d, use_dora=True), "use_dora true is not supported"),
        (lambda d: lora.change(d, rank_pattern={"q_proj": 8}), "rank_pattern"),
        (lambda d: lora.change(d, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda d: lora.change(d, bias="all"), 'bias "all" is not supported'),
        (lambda d: lora.change(d, init_lora_weights="pissa"), "init_lora_weights"),
        (lambda d: lora.change(d, of_next_year={"x": 1}), "of_next_year"),
        (lambda d: lora.change(d, r=0), "r is 0"),
        (lambda d: lora.change(d, lora_alpha=float("nan")), "lora_alpha is nan"),
        (lambda d: lora.change(d, r=8), "has the shape"),
        (change_tensors(lambda t: t[Q].fill_(float("nan"))), "NaN or infinite"),
        (change_tensors(lambda t: t.pop(Q)), "half of what it adds to self_attn.q_proj of block 0"),
        (change_tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[Q].clone()})), "lm_head"),
        (change_tensors(lambda t: [t.pop(k) for k in list(t) if ".3." in k]), "not block 3 of this model's 4"),
        (change_tensors(lambda t: t.clear()), "adapts nothing"),
    ],
)
def test_bad_files_are_one_sentence(base: Path, directory: Path, damage: Callable[[Path], Any], sentence: str) -> None:
    damage(directory)
    with pytest.raises(AdapterError, match=sentence):
        load_adapter(directory, arch_of(base))


@pytest.mark.parametrize(
    ("other", "changes", "sentence"),
    [
        ("bloom", {}, "which is no product of the 4 blocks of this bloom"),
        ("llama", {"hidden_size": 96}, "it is of another model"),
        ("llama", {"num_hidden_layers": 2}, "no product of the 2 blocks"),
        ("llama", {"num_hidden_layers": 6}, "not block 4 of this model's 6"),
    ],
)
def test_an_adapter_for_another_base_is_refused(saved: Path, tmp_path: Path, other: str, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AdapterError, match=sentence):
        load_adapter(saved, arch_of(tiny.save(other, tmp_path, **changes)))
