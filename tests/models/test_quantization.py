"""Quantized directories: what the codes are, that loading them equals quantizing on load, and that transformers reads ours."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corolla.errors import Conflict, InvalidSetting, StorageError, UnsupportedModel
from corolla.models.checkpoint import Checkpoint
from corolla.models.nf4 import NF4
from corolla.models.quantization import quantize_model
from corolla.models.quantized_files import stored_codes
from corolla.models.quantized_tensor import QuantizedFormat, joined, quantize
from corolla.models.span import load_span
from corolla.types import Span
from tests.engine.driving import Chain, greedy
from tests.models import tiny

FORMATS: tuple[QuantizedFormat, ...] = ("nf4", "int8", "int4")
PROMPTS = [[5 + i * 11 % 180 for i in range(30)], [7, 8, 9]]


@pytest.fixture(scope="module", params=["llama", "bloom"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"intermediate_size": 128} if request.param == "llama" else {}
    return tiny.save(request.param, tmp_path_factory.mktemp(request.param), **changes)


@pytest.mark.parametrize("format", FORMATS)
def test_codes_give_back_rows_and_joins(format: QuantizedFormat) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes = quantize(weight, format)
    wide = codes.widened()
    assert (wide - weight).abs().max() < {"int8": 0.03, "int4": 0.3, "nf4": 0.6}[format]
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(codes.rows(order).widened(), wide[order])
    assert torch.equal(joined([codes, codes]).widened(), torch.cat([wide, wide]))


def test_nf4_is_code_for_code_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes comes with the tune extra")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(weight, "nf4")
    assert torch.equal(ours.codes, theirs.flatten())
    torch.testing.assert_close(ours.scale, state.absmax.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_nf4_of_any_number_of_rows(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear, wide = NF4(weight, torch.ones(96, dtype=dtype)), quantize(weight, "nf4").widened()
    torch.testing.assert_close(linear.widened(), wide, rtol=0.02, atol=0.02)
    for rows in (1, 4, 40):
        x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = torch.nn.functional.linear(x.float(), wide.float(), torch.ones(96))
        torch.testing.assert_close(linear.product(x).float(), expected, rtol=0.03, atol=0.3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantized_directory_equals_quantizing_on_load_and_so_do_its_spans(
    format: QuantizedFormat, directory: Path, tmp_path: Path
) -> None:
    quantize_model(directory, tmp_path / "q", format)
    expected = greedy(Chain.load(directory, [4], dtype="float32", weights=format), PROMPTS, 12)
    whole = load_span(tmp_path / "q", dtype="float32")
    assert whole.weights == format
    assert greedy(Chain([whole]), PROMPTS, 12) == expected
    parts = [load_span(tmp_path / "q", span, dtype="float32") for span in (Span(0, 1), Span(1, 4))]
    assert greedy(Chain(parts), PROMPTS, 12) == expected


# Rows of 96 inputs, which bloom-6-heads has, are no whole blocks.
@pytest.mark.parametrize("family", sorted(set(tiny.CONFIGS) - {"llama", "bloom", "bloom-6-heads"}))
def test_every_family_is_quantized(family: str, tmp_path: Path) -> None:
    directory = tiny.save(family, tmp_path / "m")
    for format in ("nf4", "int8"):
        quantize_model(directory, tmp_path / format, format)
        ours, expected = Chain([load_span(tmp_path / format, dtype="float32")]), Chain.load(directory, [4], dtype="float32", weights=format)
        assert torch.equal(ours.all_logits(PROMPTS[0]), expected.all_logits(PROMPTS[0]))


def test_transformers_reads_nf4(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes comes with the tune extra")
    from transformers import AutoModelForCausalLM

    quantize_model(directory, tmp_path / "q", "nf4")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = stock(torch.tensor([PROMPTS[0]])).logits[0]
    ours = Chain.load(tmp_path / "q", [4], dtype="float32", weights="nf4").all_logits(PROMPTS[0])
    assert torch.nn.functional.kl_div(ours.log_softmax(-1), expected.float().log_softmax(-1), reduction="batchmean", log_target=True) < 0.01


def test_transformers_gives_back_the_same_weights(directory: Path, tmp_path: Path) -> None:
    """Every quantized matrix, from the file as bitsandbytes reads it and as we do."""
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes comes with the tune extra")
    from transformers import AutoModelForCausalLM

    quantize_model(directory, tmp_path / "q", "nf4")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    compared = 0
    with Checkpoint(tmp_path / "q") as quantized, Checkpoint(directory) as before:
        for name, parameter in stock.named_parameters():
            if getattr(parameter, "quant_state", None) is None:
                continue
            theirs = functional.dequantize_4bit(parameter.data, parameter.quant_state)
            ours = stored_codes(quantized, name, before.shape(name), torch.float32)  # type: ignore[arg-type]
            assert ours is not None
            torch.testing.assert_close(theirs.float(), ours.widened(), rtol=0, atol=0, msg=name)
            compared += 1
    assert compared == 4 * (7 if "gate_proj" in str(stock) else 4)


def test_many_rows_are_quantized_as_few_are() -> None:
    weight = torch.randn(8256, 512, generator=torch.Generator().manual_seed(0))  # more than are quantized at a time
    for format in FORMATS:
        whole, tail = quantize(weight, format), quantize(weight[-64:], format)
        assert torch.equal(whole.rows(torch.arange(8192, 8256)).widened(), tail.widened())


class Unquantized(TorchDispatchMode):
    """Tells how many bytes of floating point matrices were alive at once, of `least` values or more each."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.peak = least, 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in (*args, result):
            if isinstance(each, torch.Tensor) and each.is_floating_point() and each.ndim > 1 and each.numel() >= self.least:
                self._alive[id(each)] = weakref.ref(each)
        tensors = [tensor for reference in self._alive.values() if (tensor := reference()) is not None]
        self.peak = max(self.peak, sum({tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in tensors}.values()))
        return result


@pytest.mark.parametrize("format", FORMATS)
def test_loading_never_holds_more_than_a_block_unquantized(format: QuantizedFormat, tmp_path: Path) -> None:
    hidden, blocks = 256, 6
    directory = tiny.save("bloom", tmp_path / "m", hidden_size=hidden, n_layer=blocks, n_head=4, dtype=torch.float32)
    block = 12 * hidden**2 * 4  # bytes
    for weights in (format, "plain"):
        with Unquantized(hidden**2) as watched:
            load_span(directory, dtype="float32", weights=weights)  # type: ignore[arg-type]
        if weights == "plain":
            assert watched.peak >= blocks * block * 0.9  # it would be seen
        else:
            assert watched.peak <= block
    with Unquantized(hidden**2) as watched:
        quantize_model(directory, tmp_path / "q", format)
    assert watched.peak <= block


def test_what_is_quantized_is_not_quantized_again(directory: Path, tmp_path: Path) -> None:
    quantize_model(directory, tmp_path / "q", "int8")
    with pytest.raises(InvalidSetting, match="quantized as int8 already"):
        quantize_model(tmp_path / "q", tmp_path / "qq", "nf4")
    with pytest.raises(InvalidSetting, match="quantized as int8 already"):
        load_span(tmp_path / "q", weights="int4")
    with pytest.raises(Conflict, match="not empty"):
        quantize_model(directory, tmp_path / "q", "int8")
    assert not (tmp_path / "qq").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(Conflict, match="not empty"):
        quantize_model(directory, tmp_path / "file", "int8")


@pytest.mark.parametrize(
    ("family", "shape", "said"),
    [("llama", {"hidden_size": 56, "intermediate_size": 50}, "no whole number"), ("bloom", {"hidden_size": 32}, "cannot be parted")],
)
def test_a_shape_that_nf4_cannot_take_leaves_nothing(family: str, shape: dict[str, int], said: str, tmp_path: Path) -> None:
    directory = tiny.save(family, tmp_path / "odd", **shape)
    with pytest.raises(UnsupportedModel, match=said):
        quantize_model(directory, tmp_path / "q", "nf4")
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.parametrize("small_disk", ["100k"], indirect=True)
def test_a_full_disk_is_told_and_leaves_nothing(directory: Path, small_disk: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written: No space left on device"):
        quantize_model(directory, small_disk / "q", "int8")
    assert not list(small_disk.iterdir())
