"""A span of a model: its blocks, and the embedding or the head where it reaches the ends; only its tensors are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from corolla.errors import CheckpointError, InvalidSetting
from corolla.models.block import Attention, Block, Norm, rotations
from corolla.models.checkpoint import Checkpoint
from corolla.models.config import ModelConfig
from corolla.models.families import architecture
from corolla.models.linear import Linear, PackedLinear, WeightFormat, make_linear
from corolla.models.quantized_files import settled_weights, stored_codes
from corolla.models.quantized_tensor import QuantizedTensor, joined
from corolla.types import Span

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SpanModel:
    """The mathematics of one span, stateless: what attends to what is the caller's `Attention`.

    Attributes:
        arch, span, dtype, device: of this span.
        weights: the format the linear layers are kept in.
        bytes_read: bytes of tensors that loading took from the checkpoint.
    """

    def __init__(
        self,
        arch: ModelConfig,
        span: Span,
        dtype: torch.dtype,
        device: torch.device,
        weights: WeightFormat,
        blocks: Sequence[Block],
        embedding: torch.Tensor | None,
        embedding_norm: Norm | None,
        final_norm: Norm | None,
        head: Linear | None,
        bytes_read: int,
    ) -> None:
        self.arch, self.span, self.dtype, self.device, self.weights = arch, span, dtype, device, weights
        self.blocks = tuple(blocks)
        self.bytes_read = bytes_read
        self._embedding, self._embedding_norm = embedding, embedding_norm
        # Rounded to the working dtype first, as the models were trained.
        self._embedding_scale = torch.tensor(arch.embedding_scale, dtype=dtype).item()
        self._final_norm, self._head = final_norm, head

    @property
    def embeds(self) -> bool:
        return self.span.start == 0

    @property
    def heads(self) -> bool:
        return self.span.end == self.arch.blocks

    @property
    def kernel_per_row_count(self) -> bool:
        """Whether oneDNN, which keeps a kernel for each number of rows, computes any of the products."""
        linears = [linear for block in self.blocks for linear in block.linears] + ([self._head] if self._head is not None else [])
        return any(isinstance(linear, PackedLinear) for linear in linears)

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] of token ids (int64, on the CPU or the model's device)."""
        assert self._embedding is not None, "this span does not hold block 0"
        hidden = self._embedding[token_ids_T.to(self._embedding.device)].to(self.device, self.dtype)
        if self.arch.embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        return self.enter(hidden)

    def enter(self, rows_TxE: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, hidden] of rows that stand in place of embeddings, as soft tokens do."""
        return rows_TxE if self._embedding_norm is None else self._embedding_norm(rows_TxE)

    def forward(
        self,
        hidden_TxE: torch.Tensor,
        positions_T: torch.Tensor,
        attention: Attention,
        part: Span | None = None,
        entering: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
        adapting: Callable[[Block], Block] | None = None,
    ) -> torch.Tensor:
        """Hidden states [T, hidden] through every block of the span, or of a part of it.

        `entering` makes of a block's index, in the whole model's numbering, and of its input what enters it; `adapting` of a block
        the one that is computed in its place.
        """
        turns = rotations(self.arch, positions_T, self.dtype)
        for block in self.blocks if part is None else self.blocks_of(part):
            if entering is not None:
                hidden_TxE = entering(block.index, hidden_TxE)
            hidden_TxE = (block if adapting is None else adapting(block))(hidden_TxE, attention, turns)
        return hidden_TxE

    def blocks_of(self, part: Span) -> tuple[Block, ...]:
        """The blocks of a part of this span."""
        return self.blocks[part.start - self.span.start : part.end - self.span.start]

    def logits(self, hidden_RxE: torch.Tensor) -> torch.Tensor:
        """Logits [R, vocabulary] of hidden states that left the last block."""
        assert self._final_norm is not None, "this span does not hold the last block"
        assert self._head is not None
        logits = self._head(self._final_norm(hidden_RxE))
        if self.arch.logits_softcap is not None:
            logits = torch.tanh(logits / self.arch.logits_softcap) * self.arch.logits_softcap
        return logits


def load_span(
    directory: Path,
    span: Span | None = None,
    *,
    dtype: str = "bfloat16",
    weights: WeightFormat | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> SpanModel:
    """Read a span (the whole model by default) from a directory of safetensors; each matrix is quantized as it is read, if at all.

    Args:
        weights: the format to keep them in; by default a quantized checkpoint's own, else "packed" on a CPU and "plain" elsewhere.
        progress: called with (blocks loaded, blocks in all).

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor of the wrong shape; the sentence names it.
        UnsupportedModel: the family or the variant has no mathematics here.
        InvalidSetting: blocks that the model does not have, an unknown dtype or format, a quantized model to be quantized again.
    """
    if dtype not in DTYPES:
        raise InvalidSetting("dtype", f"{dtype!r} is none of {', '.join(DTYPES)}")
    with Checkpoint(directory) as checkpoint:
        arch = architecture(checkpoint.config)
        arch = replace(arch, ropes=tuple(replace(r, inverse_frequencies=r.inverse_frequencies.to(device)) for r in arch.ropes))
        span = span or Span(0, arch.blocks)
        if span.end > arch.blocks:
            raise InvalidSetting("blocks", f"{span} does not fit: the model has blocks 0:{arch.blocks}")
        weights = settled_weights(checkpoint, weights, "packed" if device == "cpu" else "plain")
        reader = _Reader(checkpoint, arch, DTYPES[dtype], torch.device(device), weights)
        blocks = []
        for index in range(span.start, span.end):
            blocks.append(reader.block(index))
            if progress is not None:
                progress(len(blocks), len(span))
        names = arch.names
        first, last = span.start == 0, span.end == arch.blocks
        return SpanModel(
            arch,
            span,
            reader.dtype,
            reader.device,
            weights,
            blocks,
            embedding=reader.embedding() if first else None,
            embedding_norm=reader.norm(reader.root + names.embedding_norm) if first and names.embedding_norm else None,
            final_norm=reader.norm(reader.root + names.final_norm) if last else None,
            head=reader.head() if last else None,
            bytes_read=checkpoint.bytes_read,
        )


def check_head(checkpoint: Checkpoint, arch: ModelConfig, embedding: str) -> None:
    """Raises `CheckpointError` where the configuration says that the head is the embedding, and the files hold another head."""
    head = f"{arch.names.head}.weight"
    if not arch.tied or not checkpoint.has(head) or not checkpoint.has(embedding):
        return
    read = checkpoint.bytes_read
    same = torch.equal(checkpoint.tensor(head), checkpoint.tensor(embedding))
    checkpoint.bytes_read = read
    if not same:
        raise CheckpointError(
            f"{checkpoint.directory}: config.json says that the head is the embedding, and {head} is another matrix: "
            'write "tie_word_embeddings": false into config.json'
        )


class _Reader:
    """Reads one family's tensors into our layout."""

    def __init__(self, checkpoint: Checkpoint, arch: ModelConfig, dtype: torch.dtype, device: torch.device, weights: WeightFormat) -> None:
        self.checkpoint, self.arch, self.dtype, self.device, self.weights = checkpoint, arch, dtype, device, weights
        embedding = f"{arch.names.embedding}.weight"
        for prefix in arch.names.prefixes:
            if checkpoint.has(f"{prefix}{embedding}") or checkpoint.has(f"{prefix}{arch.names.blocks}.0.{arch.names.out}.weight"):
                self.root = prefix
                return
        raise CheckpointError(
            f"{checkpoint.directory}: it holds no tensor {arch.names.prefixes[0]}{embedding}; is it a {arch.family} model?"
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self.checkpoint.tensor(name, self.dtype, shape=shape).to(self.device)

    def bias(self, name: str, size: int) -> torch.Tensor | None:
        return self.tensor(f"{name}.bias", (size,)) if self.checkpoint.has(f"{name}.bias") else None

    def norm(self, name: str, size: int | None = None) -> Norm:
        size = size or self.arch.hidden
        weight = self.checkpoint.tensor(f"{name}.weight", torch.float32, shape=(size,))
        if self.arch.norm_offset:
            weight = weight + self.arch.norm_offset
        return Norm(weight.to(self.device, self.dtype), self.bias(name, size), self.arch.norm_eps, self.arch.norm == "rms")

    def linear(self, name: str, outputs: int, inputs: int) -> Linear:
        return make_linear(self.weight(name, outputs, inputs), self.bias(name, outputs), self.weights)

    def weight(self, name: str, outputs: int, inputs: int) -> torch.Tensor | QuantizedTensor:
        """A matrix, as codes where the checkpoint holds codes."""
        codes = stored_codes(self.checkpoint, f"{name}.weight", (outputs, inputs), self.dtype)
        if codes is None:
            return self.tensor(f"{name}.weight", (outputs, inputs))
        low = None if codes.low is None else codes.low.to(self.device)
        return replace(codes, codes=codes.codes.to(self.device), scale=codes.scale.to(self.device), low=low)

    def embedding(self) -> torch.Tensor:
        """In the checkpoint's own dtype: rows are converted when they are read."""
        name, shape = f"{self.root}{self.arch.names.embedding}.weight", (self.arch.vocabulary, self.arch.hidden)
        codes = stored_codes(self.checkpoint, name, shape, self.dtype)
        return (self.checkpoint.values(name, shape=shape) if codes is None else codes.widened()).to(self.device)

    def head(self) -> Linear:
        names = self.arch.names
        name = f"{self.root}{names.embedding}" if self.arch.tied else names.head
        check_head(self.checkpoint, self.arch, f"{self.root}{names.embedding}.weight")
        weight = self.weight(name, self.arch.vocabulary, self.arch.hidden)
        lossless: WeightFormat = "packed" if self.device.type == "cpu" else "plain"
        # Measured on SmolLM2: with an int4 head the KL to bfloat16 is 0.062, with an int8 head 0.003. bitsandbytes leaves it out.
        formats: dict[WeightFormat, WeightFormat] = {"int4": "int8", "nf4": lossless}
        return make_linear(weight, self.bias(name, self.arch.vocabulary), formats.get(self.weights, self.weights))

    def qkv(self, at: str) -> Linear:
        """Query, key and value in one product, as rows [H query heads, K key heads, K value heads] of D."""
        arch = self.arch
        rows = [heads * arch.head_dim for heads in (arch.heads, arch.kv_heads, arch.kv_heads)]
        if len(arch.names.qkv) == 3:
            parts = [self.weight(f"{at}{name}", size, arch.hidden) for name, size in zip(arch.names.qkv, rows, strict=True)]
            biases = [self.bias(f"{at}{name}", size) for name, size in zip(arch.names.qkv, rows, strict=True)]
            codes = [part for part in parts if isinstance(part, QuantizedTensor)]
            weight: torch.Tensor | QuantizedTensor = (
                joined(codes) if codes else torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
            )
            present = [bias for bias in biases if bias is not None]
            if 0 < len(present) < len(biases):
                raise CheckpointError(f"{self.checkpoint.directory}: of query, key and value at {at} some have a bias and others none")
            bias = torch.cat(present) if present else None
        else:
            name = f"{at}{arch.names.qkv[0]}"
            fused = self.weight(name, sum(rows), arch.hidden)
            if isinstance(fused, QuantizedTensor):
                weight = fused.rows(arch.ungrouped(torch.arange(sum(rows), device=self.device)))
            else:
                weight = arch.ungrouped(fused)
            bias = self.bias(name, sum(rows))
            bias = arch.ungrouped(bias) if bias is not None else None
        return make_linear(weight, bias, self.weights)

    def block(self, index: int) -> Block:
        arch, names = self.arch, self.arch.names
        at = f"{self.root}{names.blocks}.{index}."
        return Block(
            arch,
            index,
            attention_norm=self.norm(at + names.attention_norm),
            mlp_norm=self.norm(at + names.mlp_norm) if names.mlp_norm else None,
            qkv=self.qkv(at),
            out=self.linear(at + names.out, arch.hidden, arch.heads * arch.head_dim),
            up=self.linear(at + names.up, arch.intermediate, arch.hidden),
            gate=self.linear(at + names.gate, arch.intermediate, arch.hidden) if names.gate else None,
            down=self.linear(at + names.down, arch.hidden, arch.intermediate),
            query_norm=self.norm(at + names.query_norm, arch.head_dim) if names.query_norm else None,
            key_norm=self.norm(at + names.key_norm, arch.head_dim) if names.key_norm else None,
            attention_post_norm=self.norm(at + names.attention_post_norm) if names.attention_post_norm else None,
            mlp_post_norm=self.norm(at + names.mlp_post_norm) if names.mlp_post_norm else None,
        )
