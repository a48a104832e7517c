import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from corolla.errors import CheckpointError, UnsupportedModel
from corolla.models.checkpoint import CHECKSUMS, INDEX, SINGLE, Checkpoint, verify, write_checksums
from tests.models import tiny

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**shape))


@pytest.fixture
def sharded(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    return tmp_path


@pytest.fixture
def shard(sharded: Path) -> Path:
    """The shard that holds QUERY."""
    return sharded / json.loads((sharded / INDEX).read_text())["weight_map"][QUERY]


@pytest.mark.parametrize("shard_size", ["40KB", "1GB"])
def test_hands_out_every_tensor_as_saved(model: LlamaForCausalLM, tmp_path: Path, shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size == "40KB")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == set(model.state_dict())
        for name, expected in model.state_dict().items():
            assert checkpoint.shape(name) == tuple(expected.shape)
            assert torch.equal(checkpoint.tensor(name), expected)


def test_counts_only_what_it_hands_out(sharded: Path) -> None:
    with Checkpoint(sharded) as checkpoint:
        assert checkpoint.bytes_read == 0
        assert checkpoint.tensor(QUERY, torch.bfloat16).dtype == torch.bfloat16
        assert checkpoint.bytes_read == 32 * 32 * 4


def test_a_tensor_outlives_the_checkpoint(sharded: Path, model: LlamaForCausalLM) -> None:
    with Checkpoint(sharded) as checkpoint:
        tensor = checkpoint.tensor(QUERY)
    assert torch.equal(tensor, model.state_dict()[QUERY])


def test_reads_the_configuration_and_no_tensor(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    assert (checkpoint.config.model_type, checkpoint.config.num_hidden_layers) == ("llama", 3)
    assert checkpoint.bytes_read == 0


def test_a_tensor_of_another_shape_names_file_tensor_and_shapes(sharded: Path, shard: Path) -> None:
    with Checkpoint(sharded) as checkpoint, pytest.raises(CheckpointError) as caught:
        checkpoint.tensor(QUERY, shape=(32, 64))
    for part in (str(shard), QUERY, "[32, 32]", "[32, 64]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("read", [Checkpoint.tensor, Checkpoint.shape])
def test_a_missing_tensor_is_named(sharded: Path, read) -> None:
    checkpoint = Checkpoint(sharded)
    assert not checkpoint.has("model.nothing")
    with pytest.raises(CheckpointError, match=r"there is no tensor model\.nothing"):
        read(checkpoint, "model.nothing")


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        Checkpoint(tmp_path / "nowhere")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds neither {SINGLE} nor {INDEX}"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=f"pickled \\({name}\\), which are never read"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(sharded: Path, shard: Path) -> None:
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        Checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_shard_is_found_when_opening(sharded: Path, shard: Path, keep: int) -> None:
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{shard.name} is (truncated|damaged)"):
        Checkpoint(sharded)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"data_offsets": [0], "shape": []}}', b"\xff\xfe"])
def test_garbage_is_no_safetensors(tmp_path: Path, header: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=f"{SINGLE} is damaged"):
        Checkpoint(tmp_path)


def test_a_shard_without_a_tensor_of_the_index(sharded: Path, shard: Path) -> None:
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(CheckpointError, match=f"{shard.name} does not hold tensor"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    "index", ["no json", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a"}}', '{"weight_map": {"a": 1}}']
)
def test_a_bad_index(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=f"{INDEX} is damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "error", "sentence"),
    [
        (None, CheckpointError, "config.json is missing"),
        ("{", CheckpointError, "config.json is damaged"),
        ("{}", CheckpointError, "does not say its model_type"),
        ('{"model_type": "corollary"}', UnsupportedModel, "knows no model_type corollary"),
        ('{"model_type": "llama", "hidden_size": "wide"}', CheckpointError, "not valid for the family llama"),
    ],
)
def test_a_bad_configuration(sharded: Path, config: str | None, error: type[Exception], sentence: str) -> None:
    (sharded / "config.json").unlink()
    if config is not None:
        (sharded / "config.json").write_text(config)
    with pytest.raises(error, match=sentence):
        _ = Checkpoint(sharded).config


def test_verify_reads_every_file_and_reports_bytes(sharded: Path) -> None:
    assert verify(sharded) == 0
    write_checksums(sharded)
    calls: list[tuple[str, int, int | None]] = []
    assert verify(sharded, lambda *call: calls.append(call)) == len(list(sharded.iterdir())) - 1
    stage, done, total = calls[-1]
    assert (stage, done) == ("verifying", total)


def test_verify_names_the_file_with_a_flipped_byte(sharded: Path, shard: Path) -> None:
    write_checksums(sharded)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged: its SHA-256"):
        verify(sharded)


def test_verify_names_a_missing_file(sharded: Path) -> None:
    write_checksums(sharded)
    (sharded / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json is missing"):
        verify(sharded)


@pytest.mark.parametrize("line", ["short  config.json", f"{'0' * 64}  ../config.json", "0" * 64])
def test_verify_refuses_a_bad_list(sharded: Path, line: str) -> None:
    (sharded / CHECKSUMS).write_text(line)
    with pytest.raises(CheckpointError, match=f"{CHECKSUMS} is damaged"):
        verify(sharded)


def test_a_digest_tells_the_weights_of_one_configuration_apart(tmp_path: Path) -> None:
    first, copy = tiny.save("llama", tmp_path / "first"), tiny.save("llama", tmp_path / "copy")
    digests = []
    for directory in (first, copy):
        with Checkpoint(directory) as checkpoint:
            digests.append(checkpoint.digest())
            assert not checkpoint.bytes_read
    assert digests[0] == digests[1]
    tensors = load_file(first / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(copy) as checkpoint:
        assert checkpoint.digest() != digests[0]
