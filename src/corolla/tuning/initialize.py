"""A small model from nothing: random weights of a family, and a tokenizer trained on the data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corolla.data.problems import Problems
from corolla.data.readers.read import read
from corolla.errors import DataError, InvalidSetting, StorageError
from corolla.models.saving import disk_error

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>")  # with BLOOM's ids
_FAMILIES: dict[str, dict[str, str]] = {
    "bloom": {"hidden": "hidden_size", "layers": "n_layer", "heads": "n_head", "context": "seq_length"},
    "llama": {
        "hidden": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "context": "max_position_embeddings",
    },
}
FAMILIES = tuple(_FAMILIES)


@dataclass(frozen=True, slots=True, kw_only=True)
class InitSettings:
    """The shape of a model. `heads` of None gives each head 32 dimensions or more, as even as the width allows.

    Raises `InvalidSetting` for a value outside its range.
    """

    family: str = "bloom"
    hidden: int = 256
    layers: int = 4
    heads: int | None = None
    vocabulary: int = 4096
    context: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise InvalidSetting("family", f"there is no {self.family!r}; there are {', '.join(_FAMILIES)}")
        for name, least in (("hidden", 8), ("layers", 1), ("vocabulary", 260), ("context", 8), ("seed", 0)):
            if getattr(self, name) < least:
                raise InvalidSetting(name, f"{getattr(self, name)} is too small; give at least {least}")
        if self.heads is not None and (self.heads < 1 or self.hidden % self.heads):
            raise InvalidSetting("heads", f"{self.heads} heads do not divide a width of {self.hidden} evenly")
        if (self.hidden // self.head_count) % 2:
            raise InvalidSetting("heads", f"{self.head_count} heads of a width of {self.hidden} have an odd size; give another number")

    @property
    def head_count(self) -> int:
        if self.heads is not None:
            return self.heads
        return next(count for count in range(max(1, self.hidden // 32), 0, -1) if self.hidden % count == 0)


def initialize(output: Path, sources: Sequence[str], settings: InitSettings, problems: Problems, *, format: str | None = None) -> int:
    """Write a model's directory, whole or not at all, and return how many parameters it has. The same data and seed make the same bytes.

    Raises `InvalidSetting` where `output` is taken, `DataError` for data without text, `StorageError` when the disk refuses.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InvalidSetting("output", f"{output} is there already: name another directory, or remove it")
    tokenizer = train_tokenizer(_texts(sources, problems, format), settings.vocabulary)
    if tokenizer.get_vocab_size() <= len(SPECIAL_TOKENS) + 256:
        raise DataError(f"{', '.join(sources)}: there is too little text to train a tokenizer on")

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one of our own
    shape = {"hidden": settings.hidden, "layers": settings.layers, "heads": settings.head_count, "context": settings.context}
    named: dict[str, Any] = {_FAMILIES[settings.family][name]: value for name, value in shape.items()}
    if settings.family == "llama":
        named |= {"intermediate_size": 8 * settings.hidden // 3 // 8 * 8 or 8, "tie_word_embeddings": True}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    # A multiple of 64 rows, of which a matrix product is computed quicker.
    rows = -(-tokenizer.get_vocab_size() // 64) * 64
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.family, vocab_size=rows, **ids, **named))
    work = output.parent / f".{output.name}.making"
    try:
        shutil.rmtree(work, ignore_errors=True)
        model.save_pretrained(work)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            model_max_length=settings.context,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(work)
        output.parent.mkdir(parents=True, exist_ok=True)
        if output.exists():
            output.rmdir()
        work.rename(output)
    except (OSError, SafetensorError) as error:
        cause = error if isinstance(error, OSError) else disk_error(error)
        raise StorageError(f"{output} cannot be written: {cause.strerror or cause}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return sum(parameter.numel() for parameter in model.parameters())


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE (Sennrich et al., 2016; bytes after GPT-2) with at most `vocabulary` tokens; any text can be spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _texts(sources: Sequence[str], problems: Problems, format: str | None) -> Iterator[str]:
    for source in sources:
        for example in read(source, problems, format=format):
            yield from example.persona
            if example.system:
                yield example.system
            for turn in example.turns:
                yield turn.content
